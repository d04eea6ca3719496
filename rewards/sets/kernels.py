"""Maximum mean discrepancies: KID and CMMD.

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

Gretton et al. 2012, "A Kernel Two-Sample Test". Unbiased: pairs of an element with itself are left out (eq. 3, the
U-statistic), and the value can be below 0. Biased: they stay in (eq. 5, the V-statistic).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.sets.features import as_matrix, replacements, same_width, unit_rows

Kernel: TypeAlias = Callable[[Tensor, Tensor], Tensor]

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """`(x . y / D + 1)^3` of KID, `[N, M]`: Binkowski et al. 2018, "Demystifying MMD GANs"."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: Tensor, y: Tensor, sigma: float = CMMD_SIGMA) -> Tensor:
    """`exp(-|x - y|^2 / (2 sigma^2))`, `[N, M]`."""
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(-squared.clamp(min=0) / (2 * sigma**2))


def mmd2(x: Tensor, y: Tensor, kernel: Kernel, unbiased: bool) -> Tensor:
    """Squared maximum mean discrepancy of features `[N, D]` and `[M, D]`; a float64 scalar, differentiable.

    Raises:
        DiffalignError: too few rows (two for the unbiased form), widths that differ, numbers that are not finite.
    """
    x = as_matrix(x, at_least=1 + unbiased)
    y = as_matrix(y, "reference features", at_least=1 + unbiased)
    same_width(x, y.shape[1])
    return _within(kernel(x, x), unbiased) + _within(kernel(y, y), unbiased) - 2 * kernel(x, y).mean()


def _within(values: Tensor, unbiased: bool) -> Tensor:
    count = len(values)
    if unbiased:
        return (values.sum() - values.diagonal().sum()) / (count * (count - 1))
    return values.mean()


def kid(features: Tensor, reference: Tensor) -> Tensor:
    """Kernel inception distance: unbiased MMD^2 with the cubic kernel; expectation 0 for equal distributions."""
    return mmd2(features, reference, polynomial_kernel, unbiased=True)


@dataclass(frozen=True)
class SubsetEstimate:
    """Mean and standard deviation over subsets."""

    mean: float
    std: float


def kid_subsets(
    features: Tensor, reference: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> SubsetEstimate:
    """KID as it is usually printed: mean and deviation over random subsets of both sets, no repeats inside of one.

    Args:
        size: rows of a subset, at most the smaller set's.

    Raises:
        DiffalignError: subsets are larger than a set.
    """
    smaller = min(len(features), len(reference))
    if not 2 <= size <= smaller or subsets < 1:
        raise DiffalignError(
            f"size = {size}, subsets = {subsets} for sets of {len(features)} and {len(reference)} rows; expected "
            f"2 <= size <= {smaller} and at least 1 subset"
        )
    random = torch.Generator().manual_seed(seed)
    values = torch.stack(
        [kid(_some(features, size, random), _some(reference, size, random)) for _ in range(subsets)]
    )
    return SubsetEstimate(float(values.mean()), float(values.std(correction=0)))


def _some(features: Tensor, size: int, random: torch.Generator) -> Tensor:
    return features[torch.randperm(len(features), generator=random)[:size].to(features.device)]


def cmmd(features: Tensor, reference: Tensor) -> Tensor:
    """CLIP maximum mean discrepancy of embeddings, normalised here: 1000 times the biased MMD^2, sigma 10.

    Jayasumana et al. 2024, "Rethinking FID". At least 0; 0.5 to 0.7 between pictures of a good model and photographs in
    the embeddings of CLIP ViT-L/14 at 336 px.
    """
    x, y = unit_rows(as_matrix(features)), unit_rows(as_matrix(reference, "reference features"))
    return CMMD_SCALE * mmd2(x, y, gaussian_kernel, unbiased=False)


class MMDExchange:
    """Squared maximum mean discrepancy of a set that is about to exchange elements; each question costs O((n + m) D).

    For CMMD give rows of length 1 and multiply by 1000.

    Args:
        features: `[n, D]` of the set. reference: `[M, D]`. kernel, unbiased: as in `mmd2`.
    """

    def __init__(
        self, features: Tensor, reference: Tensor, kernel: Kernel = polynomial_kernel, unbiased: bool = True
    ) -> None:
        self.kernel, self.unbiased = kernel, unbiased
        self.features = as_matrix(features.detach(), at_least=1 + unbiased).clone()
        self.reference = as_matrix(reference.detach(), "reference features", at_least=1 + unbiased)
        same_width(self.features, self.reference.shape[1])
        self._own = kernel(self.features, self.features)
        self._cross = kernel(self.features, self.reference).sum(1)
        self._reference_part = _within(kernel(self.reference, self.reference), unbiased)

    @property
    def distance(self) -> float:
        """MMD^2 of the set as it is."""
        return float(self._distance(self._own.sum(), self._own.diagonal().sum(), self._cross.sum()))

    def swapped(self, row: int, candidates: Tensor) -> Tensor:
        """MMD^2 `[m]` after replacing one row by each of the candidates `[m, D]`."""
        return self.swapped_pairs(torch.tensor([row]), candidates)

    def swapped_pairs(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """MMD^2 `[m]` after replacing `rows[j]` by `candidates[j]`, each alone; rows `[m]` or `[1]`.

        Raises:
            DiffalignError: a row that is not in the set, or candidates of another width.
        """
        rows, candidates = replacements(rows, candidates, self.features)
        rows = rows.expand(len(candidates))
        itself = torch.vmap(lambda one: self.kernel(one[None], one[None])[0, 0])(candidates)
        others = self.kernel(candidates, self.features).scatter(1, rows[:, None], 0.0).sum(1)
        removed, diagonal = self._own[rows].sum(1), self._own.diagonal()[rows]
        total = self._own.sum() - 2 * removed + diagonal + 2 * others + itself
        trace = self._own.diagonal().sum() - diagonal + itself
        cross = self._cross.sum() - self._cross[rows] + self.kernel(candidates, self.reference).sum(1)
        return self._distance(total, trace, cross)

    def swap(self, row: int, vector: Tensor) -> float:
        """Replace a row by a vector `[D]`; the new MMD^2."""
        _, vectors = replacements(torch.tensor([row]), vector[None], self.features)
        self.features[row] = vectors[0]
        values = self.kernel(vectors, self.features)[0]
        self._own[row], self._own[:, row] = values, values
        self._cross[row] = self.kernel(vectors, self.reference).sum()
        return self.distance

    def _distance(self, total: Tensor, trace: Tensor, cross: Tensor) -> Tensor:
        count = len(self.features)
        own = (total - trace) / (count * (count - 1)) if self.unbiased else total / count**2
        return own + self._reference_part - 2 * cross / (count * len(self.reference))
