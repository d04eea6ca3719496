"""Intervals and tests for paired measurements: the same prompts and seeds, two models.

Several seeds of a prompt are not independent, so bootstraps resample whole prompts (clusters). All functions
are deterministic: the bootstrap draws from a seeded generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from diffalign.errors import DiffalignError

Interval = tuple[float, float]
Array = NDArray[np.float64]
Labels = Sequence[object] | NDArray[np.int64]

RESAMPLES = 10_000
_CHUNK = 1 << 22  # cluster draws held in memory at once


@dataclass(frozen=True)
class PairedDifference:
    """Means of two paired samples, and `difference` = tuned - base with its interval."""

    base: float
    tuned: float
    difference: float
    interval: Interval
    n: int
    prompts: int


@dataclass(frozen=True)
class WinRate:
    """How often the tuned model scored higher.

    `rate` counts a tie as half a win. `decided_rate` leaves ties out (None when all are ties), and `p_value`
    is the exact two-sided sign test on the decided pairs; for right/wrong scores that is McNemar's exact
    test. Both treat pairs as independent, which several seeds of a prompt are not.
    """

    wins: int
    ties: int
    losses: int
    rate: float
    interval: Interval
    decided_rate: float | None
    decided_interval: Interval | None
    p_value: float


def paired_difference(
    base: ArrayLike, tuned: ArrayLike, clusters: Labels | None = None, *, seed: int = 0
) -> PairedDifference:
    """Mean difference tuned - base with its 95 % bootstrap interval over clusters (prompts).

    Args:
        base, tuned: scores `[N]`, row i of both from the same prompt and seed.
        clusters: label of each row's prompt; None: every row is its own prompt.

    Raises:
        DiffalignError: lengths differ, a score is not finite, or there are fewer than two prompts.
    """
    a, b = _paired(base, tuned)
    labels = _labels(clusters, len(a))
    interval = cluster_bootstrap(b - a, labels, seed=seed)
    return PairedDifference(
        float(a.mean()), float(b.mean()), float((b - a).mean()), interval, len(a), int(labels.max()) + 1
    )


def win_rate(base: ArrayLike, tuned: ArrayLike, clusters: Labels | None = None, *, seed: int = 0) -> WinRate:
    """Share of pairs where tuned scores higher than base, ties counted as half, with a 95 % interval.

    Raises:
        DiffalignError: as for `paired_difference`.
    """
    a, b = _paired(base, tuned)
    wins, ties, losses = int((b > a).sum()), int((b == a).sum()), int((b < a).sum())
    outcome = (np.sign(b - a) + 1) / 2
    decided = wins + losses
    return WinRate(
        wins,
        ties,
        losses,
        float(outcome.mean()),
        proportion_interval(outcome, clusters, seed=seed),
        wins / decided if decided else None,
        wilson(wins, decided) if decided else None,
        sign_test(wins, losses),
    )


def proportion_interval(values: ArrayLike, clusters: Labels | None = None, *, seed: int = 0) -> Interval:
    """95 % interval of the mean of values in [0, 1]: Wilson for independent right/wrong values.

    A bootstrap cannot see an outcome that never happened, so a mean of exactly 0 or 1 gets Wilson's interval
    for as many trials as there are prompts.
    """
    v = _finite(values)
    labels = _labels(clusters, len(v))
    prompts = int(labels.max()) + 1
    mean = float(v.mean())
    if mean in (0.0, 1.0):
        return wilson(mean * prompts, prompts)
    if prompts == len(v) and np.isin(v, (0.0, 1.0)).all():
        return wilson(float(v.sum()), prompts)
    low, high = cluster_bootstrap(v, labels, seed=seed)
    return max(low, 0.0), min(high, 1.0)


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927); half successes (ties) are allowed.

    Raises:
        DiffalignError: no trials, or successes outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise DiffalignError(f"a proportion needs 0 <= successes <= n and n >= 1; got {successes} of {n}")
    z2 = float(stats.norm.ppf((1 + level) / 2)) ** 2
    p = successes / n
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, float(center - half)), min(1.0, float(center + half))


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of `wins` against `losses` under equal odds; ties are not part of it."""
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses, 0.5).pvalue)


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Labels | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of the mean of `values` `[N]`, whole clusters drawn with replacement.

    Percentiles are expanded for few clusters (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap"): plain ones are too narrow by sqrt((K-1)/K) and by normal against t quantiles.

    Raises:
        DiffalignError: fewer than two clusters, or a value that is not finite.
    """
    v = _finite(values)
    labels = _labels(clusters, len(v))
    sums = np.asarray(np.bincount(labels, weights=v), dtype=np.float64)
    counts = np.bincount(labels).astype(np.float64)
    k = len(sums)
    if k < 2:
        raise DiffalignError(f"an interval needs at least 2 different prompts; got {k}. Use more prompts.")
    means = _resampled_means(sums, counts, resamples, np.random.default_rng(seed))
    tail = _expanded_tail((1 - level) / 2, k)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def jackknife_interval(whole: float, without: ArrayLike, *, level: float = 0.95) -> Interval:
    """Delete-a-group jackknife interval around a statistic that is no mean (Kott 2001; Efron and Tibshirani 1993, 11).

    Args:
        whole: the statistic of all groups. without: the statistic without each group in turn `[G]`, groups of about
            equal size.

    Raises:
        DiffalignError: fewer than two groups, or a value that is not finite.
    """
    left_out = _finite(without)
    k = len(left_out)
    if k < 2:
        raise DiffalignError(f"a jackknife needs at least 2 groups; got {k}")
    error = float(np.sqrt((k - 1) / k * np.square(left_out - left_out.mean()).sum()))
    half = float(stats.t.ppf((1 + level) / 2, k - 1)) * error
    return whole - half, whole + half


def _expanded_tail(tail: float, k: int) -> float:
    """Tail probability whose normal quantile equals the t quantile widened by sqrt(K / (K-1))."""
    return float(stats.norm.cdf(np.sqrt(k / (k - 1)) * stats.t.ppf(tail, k - 1)))


def _resampled_means(sums: Array, counts: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Means `[R]` over resampled clusters, in chunks so that memory stays small for many prompts."""
    k = len(sums)
    step = max(1, _CHUNK // k)
    parts = []
    for start in range(0, resamples, step):
        drawn = rng.integers(0, k, (min(step, resamples - start), k))
        parts.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(parts)


def _labels(clusters: Labels | None, n: int) -> NDArray[np.int64]:
    """Cluster index 0..K-1 of each row, in order of first appearance."""
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise DiffalignError(
            f"{n} scores came with {len(clusters)} prompt labels; expected one label per score"
        )
    index: dict[object, int] = {}
    return np.array([index.setdefault(label, len(index)) for label in clusters])


def _paired(base: ArrayLike, tuned: ArrayLike) -> tuple[Array, Array]:
    a, b = _finite(base), _finite(tuned)
    if len(a) != len(b):
        raise DiffalignError(f"paired scores need equal lengths; got {len(a)} (base) and {len(b)} (tuned)")
    return a, b


def _finite(values: ArrayLike) -> Array:
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or len(v) == 0:
        raise DiffalignError(f"expected a list of scores with at least one entry; got shape {v.shape}")
    if not np.isfinite(v).all():
        raise DiffalignError(f"{int((~np.isfinite(v)).sum())} of {len(v)} scores are not finite numbers")
    return v
