"""Best-of-N without bias: what the gold score does as a proxy picks from ever more samples.

From N scored samples per prompt, the expected gold score of the proxy's favourite among n <= N is computed exactly,
over all subsets of size n, instead of from one draw (Nakano et al. 2021, arXiv 2112.09332; Gao et al. 2022, arXiv
2210.10760).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln
from scipy.stats import rankdata

from diffalign.errors import DiffalignError
from diffalign.evaluation.statistics import Array, Interval, cluster_bootstrap

Policy = Literal["bon", "rl"]


@dataclass(frozen=True)
class BestOfN:
    """A best-of-N curve over n.

    Fields:
        n: sample counts. kl: `log n - (n - 1) / n` for each.
        gold, proxy: mean scores of the sample that the proxy picks.
        gold_interval, proxy_interval: 95 % bootstrap intervals over prompts, None for a single prompt.
        gold_per_prompt, proxy_per_prompt: `[P, len(n)]`, for paired comparisons of two proxies.
    """

    n: list[int]
    kl: list[float]
    gold: list[float]
    proxy: list[float]
    gold_interval: list[Interval] | None
    proxy_interval: list[Interval] | None
    gold_per_prompt: Array
    proxy_per_prompt: Array


@dataclass(frozen=True)
class OverOptimisation:
    """A fit of Gao et al. 2022 to gold scores above the start, `d = sqrt(KL)`.

    Fields:
        alpha, beta: of `d (alpha - beta d)` (bon) or `d (alpha - beta log d)` (rl).
        peak: the d at which gold is highest; None where the fit never falls (beta <= 0) or never rises.
        height: gold above the start at the peak. residual: root mean square of the fit.
    """

    policy: Policy
    alpha: float
    beta: float
    peak: float | None
    height: float | None
    residual: float

    def predict(self, distance: ArrayLike) -> Array:
        """Gold above the start at distances d."""
        return _terms(np.asarray(distance, dtype=np.float64), self.policy) @ np.array([self.alpha, self.beta])


def best_of_n_weights(total: int, n: int) -> Array:
    """Probability `[total]` that the sample of each rank (worst first) is the best of n drawn without replacement.

    `C(i - 1, n - 1) / C(total, n)` for rank i = 1..total.

    Raises:
        DiffalignError: n is not between 1 and total.
    """
    if not 1 <= n <= total:
        raise DiffalignError(f"best of {n} needs at least {n} samples and n >= 1; got {total} samples")
    below = np.arange(n - 1, total, dtype=np.float64)
    logs = _log_choose(below, n - 1) - _log_choose(np.array(float(total)), n)
    return np.concatenate([np.zeros(n - 1), np.exp(logs)])


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> float:
    """Expected gold score of the sample with the highest proxy score among n of one prompt's N, exact.

    Samples with equal proxy scores are picked with equal probability.

    Args:
        proxy, gold: scores `[N]` of the same samples.

    Raises:
        DiffalignError: lengths differ, a score is not finite, or n is not between 1 and N.
    """
    p, g = _samples(proxy, gold)
    ranked = _tie_means(p, g)[np.argsort(p, kind="stable")]
    return float(best_of_n_weights(len(p), n) @ ranked)


def best_of_n_curve(
    proxy: Sequence[ArrayLike] | Array,
    gold: Sequence[ArrayLike] | Array,
    n: Sequence[int] | None = None,
    *,
    seed: int = 0,
) -> BestOfN:
    """The curve over n, averaged over prompts.

    Args:
        proxy, gold: scores per prompt, `[P, N]` or P lists that may differ in length.
        n: sample counts; by default the powers of two up to the smallest N, and that N.
        seed: of the bootstrap, which resamples prompts.

    Raises:
        DiffalignError: no prompts, or as for `best_of_n`; the message names the prompt's row.
    """
    if len(proxy) == 0 or len(proxy) != len(gold):
        raise DiffalignError(
            f"best-of-N needs scores of the same prompts by proxy and gold; got {len(proxy)} and {len(gold)} rows"
        )
    rows = [_samples(p, g, f"prompt {i}: ") for i, (p, g) in enumerate(zip(proxy, gold, strict=True))]
    smallest = min(len(p) for p, _ in rows)
    counts = _powers_of_two(smallest) if n is None else list(n)
    gold_values = np.array([[best_of_n(p, g, k) for k in counts] for p, g in rows])
    proxy_values = np.array([[best_of_n(p, p, k) for k in counts] for p, _ in rows])
    return BestOfN(
        counts,
        [best_of_n_kl(k) for k in counts],
        gold_values.mean(0).tolist(),
        proxy_values.mean(0).tolist(),
        _intervals(gold_values, seed),
        _intervals(proxy_values, seed),
        gold_values,
        proxy_values,
    )


def best_of_n_kl(n: int) -> float:
    """KL divergence of best-of-n from the base policy in nats, `log n - (n - 1) / n`; an upper bound with ties."""
    return math.log(n) - (n - 1) / n


def fit_over_optimisation(
    kl: ArrayLike, gold: ArrayLike, start: float, policy: Policy = "bon"
) -> OverOptimisation:
    """Least-squares fit of gold against drift (Gao et al. 2022, eq. 1 and 2).

    `bon`: `R(d) = d (alpha - beta d)`, peak at `alpha / (2 beta)`. `rl`: `R(d) = d (alpha - beta log d)`, peak at
    `exp(alpha / beta - 1)`. R is gold minus `start`, the gold score of the base policy; d = sqrt(KL).

    Raises:
        DiffalignError: fewer than two different positive KLs, a negative one, or lengths differ.
    """
    divergence, scores = _samples(kl, gold)
    if (divergence < 0).any() or len(np.unique(divergence[divergence > 0])) < 2:
        raise DiffalignError(
            f"a fit of over-optimisation needs at least two different positive KLs and no negative one; "
            f"got {divergence.tolist()}"
        )
    design, gains = _terms(np.sqrt(divergence), policy), scores - start
    alpha, beta = (float(x) for x in np.linalg.lstsq(design, gains, rcond=None)[0])
    residual = float(np.sqrt(np.mean((design @ np.array([alpha, beta]) - gains) ** 2)))
    peak = _peak(alpha, beta, policy)
    height = None if peak is None else float(_terms(np.array([peak]), policy)[0] @ np.array([alpha, beta]))
    return OverOptimisation(policy, alpha, beta, peak, height, residual)


def _peak(alpha: float, beta: float, policy: Policy) -> float | None:
    if beta <= 0:
        return None
    if policy == "rl":
        return math.exp(alpha / beta - 1)
    return alpha / (2 * beta) if alpha > 0 else None


def _terms(d: Array, policy: Policy) -> Array:
    """Design matrix `[D, 2]` of (alpha, beta); `d log d` is 0 at 0."""
    second = d**2 if policy == "bon" else d * np.log(np.where(d > 0, d, 1.0))
    return np.stack([d, -second], 1)


def _tie_means(proxy: Array, gold: Array) -> Array:
    """Gold scores, each replaced by the mean over the samples with the same proxy score."""
    groups = rankdata(proxy, method="dense").astype(np.int64) - 1
    means = np.bincount(groups, weights=gold) / np.bincount(groups)
    return np.asarray(means[groups], dtype=np.float64)


def _samples(proxy: ArrayLike, gold: ArrayLike, where: str = "") -> tuple[Array, Array]:
    p, g = np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if p.ndim != 1 or p.shape != g.shape or len(p) == 0:
        raise DiffalignError(
            f"{where}expected two lists of equal length with at least one number; "
            f"got shapes {p.shape} and {g.shape}"
        )
    bad = int((~(np.isfinite(p) & np.isfinite(g))).sum())
    if bad:
        raise DiffalignError(f"{where}{bad} of {len(p)} samples have a score that is not a finite number")
    return p, g


def _intervals(values: Array, seed: int) -> list[Interval] | None:
    if len(values) < 2:
        return None
    return [cluster_bootstrap(column, seed=seed) for column in values.T]


def _powers_of_two(largest: int) -> list[int]:
    counts = [1 << k for k in range(largest.bit_length())]
    return counts if counts[-1] == largest else [*counts, largest]


def _log_choose(n: Array, k: float) -> Array:
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1), dtype=np.float64)
