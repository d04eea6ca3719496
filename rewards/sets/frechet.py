"""Frechet distance between Gaussians fitted to features: FID, FAD and their kin in any encoder.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", eq. 6:

    d^2 = |m_1 - m_2|^2 + tr(S_1) + tr(S_2) - 2 tr((S_1 S_2)^(1/2)).

With `S_1 = X^T X / (n - 1)` of centred features and `S_2 = R R^T`, the last trace is the sum of the singular values of
`X R / sqrt(n - 1)`. No square root of a matrix is formed, so a covariance of low rank does no harm, and the gradient
exists without gaps between eigenvalues.

The estimate is biased upwards: for n samples of a standard normal reference in D dimensions by about
`D/n + D (D + 1) / (4 n)` when n is much larger than D. Compare sets of one size only, or extrapolate with
`frechet_infinity`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.sets.features import as_matrix, replacements, same_width
from diffalign.rewards.sets.lowrank import RowSpectrum, row_spectrum, sqrt_change


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution as mean `[D]` and a factor `R [D, r]` of its covariance `R R^T`, float64."""

    mean: Tensor
    factor: Tensor


class FrechetStats:
    """Count, mean `[D]` and scatter `[D, D]` (sum of outer products about the mean) of features that stream by.

    Groups are merged by the update of Chan, Golub and LeVeque (1983), which does not lose digits to a large mean.
    """

    def __init__(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        self.count, self.mean, self.scatter = count, mean.double(), scatter.double()

    @classmethod
    def empty(cls, width: int) -> FrechetStats:
        """Statistics of no features of a width D."""
        return cls(0, torch.zeros(width), torch.zeros(width, width))

    @classmethod
    def of(cls, features: Tensor) -> FrechetStats:
        """Statistics of features `[N, D]`."""
        features = as_matrix(features.detach())
        mean = features.mean(0)
        return cls(len(features), mean, (features - mean).T @ (features - mean))

    def add(self, features: Tensor) -> None:
        """Take in features `[N, D]`."""
        new = FrechetStats.of(features)
        same_width(features, len(self.mean))
        total = self.count + new.count
        shift = new.mean - self.mean
        self.scatter = (
            self.scatter + new.scatter + torch.outer(shift, shift) * (self.count * new.count / total)
        )
        self.mean = self.mean + shift * (new.count / total)
        self.count = total

    def remove(self, features: Tensor) -> None:
        """Take out features `[N, D]` that were added before.

        Raises:
            DiffalignError: there are not that many.
        """
        old = FrechetStats.of(features)
        same_width(features, len(self.mean))
        left = self.count - old.count
        if left < 0:
            raise DiffalignError(f"{old.count} rows were to be removed from statistics of {self.count}")
        mean = (self.mean * self.count - old.mean * old.count) / max(left, 1)
        shift = old.mean - mean
        self.scatter = (
            self.scatter - old.scatter - torch.outer(shift, shift) * (left * old.count / self.count)
        )
        self.count, self.mean = left, mean

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance `[D, D]`.

        Raises:
            DiffalignError: fewer than two rows.
        """
        if self.count < 2:
            raise DiffalignError(f"a covariance needs at least 2 rows; these statistics have {self.count}")
        return self.scatter / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """The fitted normal distribution."""
        return Gaussian(self.mean, psd_factor(self.covariance))

    def save(self, path: Path) -> None:
        """Write a safetensors file with `count`, `mean`, `scatter`."""
        save_file(
            {"count": torch.tensor([self.count]), "mean": self.mean, "scatter": self.scatter.contiguous()},
            path,
        )

    @classmethod
    def load(cls, path: Path) -> FrechetStats:
        """Read what `save` wrote.

        Raises:
            DiffalignError: the file is missing, not safetensors, or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                return cls(*(file.get_tensor(name) for name in ("count", "mean", "scatter")))
        except (OSError, SafetensorError) as error:
            raise DiffalignError(
                f"{str(path)!r} holds no feature statistics ({error}); expected safetensors with count, mean and "
                "scatter, as FrechetStats.save writes"
            ) from error


Reference: TypeAlias = Tensor | FrechetStats | Gaussian


def psd_factor(covariance: Tensor) -> Tensor:
    """`R [D, r]` with `R R^T` the covariance; eigenvalues below rounding are left out."""
    values, vectors = torch.linalg.eigh(covariance.double())
    values = values.clamp(min=0)
    kept = values >= len(values) * torch.finfo(torch.float64).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def gaussian_of(reference: Reference) -> Gaussian:
    """The normal distribution of features `[N, D]` (N at least 2), of statistics, or as it is."""
    if isinstance(reference, Gaussian):
        return reference
    if isinstance(reference, FrechetStats):
        return reference.gaussian()
    features = as_matrix(reference.detach(), "reference features", at_least=2)
    if len(features) > features.shape[1]:
        return FrechetStats.of(features).gaussian()
    mean = features.mean(0)
    return Gaussian(mean, (features - mean).T / math.sqrt(len(features) - 1))


def gaussian_distance(first: Gaussian, second: Gaussian) -> Tensor:
    """Squared Frechet distance, a float64 scalar."""
    shift = first.mean - second.mean
    traces = first.factor.square().sum() + second.factor.square().sum()
    overlap = torch.linalg.svdvals(first.factor.T @ second.factor).sum()
    return (shift @ shift + traces - 2 * overlap).clamp(min=0)


def frechet_distance(features: Tensor, reference: Reference) -> Tensor:
    """Squared Frechet distance of features `[N, D]`, N at least 2, to a reference; a float64 scalar.

    Differentiable in the features. For very many of them collect `FrechetStats` and use `gaussian_distance`.

    Raises:
        DiffalignError: too few rows, numbers that are not finite, or widths that differ.
    """
    target = gaussian_of(reference)
    features = as_matrix(features, at_least=2)
    same_width(features, len(target.mean))
    mean = features.mean(0)
    return gaussian_distance(Gaussian(mean, (features - mean).T / math.sqrt(len(features) - 1)), target)


@dataclass(frozen=True)
class Extrapolation:
    """Distance at infinitely many samples, slope against 1/N, and the share of variance that the line explains."""

    value: float
    slope: float
    r_squared: float


def frechet_infinity(
    features: Tensor, reference: Reference, smallest: int, points: int = 15, seed: int = 0
) -> Extrapolation:
    """Frechet distance without the bias of finite N: a line through distances of subsets against 1/N, at 1/N = 0.

    Chong and Forsyth 2020, "Effectively Unbiased FID and Inception Score and where to find them". The reference's own
    bias stays. The line is straight only where N is larger than D.

    Args:
        smallest: size of the smallest subset. points: subsets, their sizes evenly spaced up to N.

    Raises:
        DiffalignError: fewer than two different sizes.
    """
    features, target = as_matrix(features, at_least=2), gaussian_of(reference)
    total = len(features)
    if points < 2 or not 2 <= smallest < total:
        raise DiffalignError(
            f"smallest = {smallest}, points = {points} for {total} rows; expected 2 <= smallest < {total} and at "
            "least 2 points"
        )
    random = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(smallest, total, points).round().long()
    chosen = [torch.randperm(total, generator=random)[: int(size)].to(features.device) for size in sizes]
    distances = torch.stack([frechet_distance(features[rows], target) for rows in chosen]).cpu()
    inverse = 1 / sizes.double()
    x, y = inverse - inverse.mean(), distances - distances.mean()
    slope = float(x @ y / (x @ x))
    residual = y - slope * x
    r_squared = 1 - float(residual @ residual / (y @ y).clamp(min=torch.finfo().tiny))
    return Extrapolation(float(distances.mean() - slope * inverse.mean()), slope, r_squared)


class FrechetExchange:
    """Frechet distance of a set that is about to exchange elements, for greedy construction of sets (DRAGON).

    The distance after a replacement costs O(D r + r k) for a reference of rank r and `k = min(n, r)`, many of them at
    once as matrix products. A replacement that is made costs a new decomposition, O(n r k).

    Args:
        features: `[n, D]`, n at least 3, of the set. reference: features, statistics or a Gaussian.
    """

    def __init__(self, features: Tensor, reference: Reference) -> None:
        self.features = as_matrix(features.detach(), at_least=3).clone()
        self.reference = gaussian_of(reference)
        same_width(self.features, len(self.reference.mean))
        self._decompose()

    def _decompose(self) -> None:
        count = len(self.features)
        self.mean = self.features.mean(0)
        centred = (self.features - self.mean) / math.sqrt(count - 1)
        self._lengths = centred.square().sum(1)
        # A row that goes, or comes, changes the scatter by its square about the mean of the others, weight (n - 1) / n.
        self._spectrum: RowSpectrum = row_spectrum(
            centred @ self.reference.factor, count / (count - 1), centred=True
        )
        self._traces = self._lengths.sum() + self.reference.factor.square().sum()
        self._overlap = self._spectrum.values.sum()

    @property
    def distance(self) -> float:
        """Distance of the set as it is."""
        shift = self.mean - self.reference.mean
        return float((shift @ shift + self._traces - 2 * self._overlap).clamp(min=0))

    def swapped(self, row: int, candidates: Tensor) -> Tensor:
        """Distances `[m]` after replacing one row by each of the candidates `[m, D]`."""
        return self.swapped_pairs(torch.tensor([row]), candidates)

    def swapped_pairs(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """Distances `[m]` after replacing `rows[j]` by `candidates[j]`, each alone; rows `[m]` or `[1]`.

        Raises:
            DiffalignError: a row that is not in the set, or candidates of another width.
        """
        rows, candidates = replacements(rows, candidates, self.features)
        removed, count = self.features[rows], len(self.features)
        # What is put in counts from the mean of the others.
        added = (candidates - self.mean + (removed - self.mean) / (count - 1)) / math.sqrt(count - 1)
        weight = self._spectrum.weight
        traces = self._traces - weight * self._lengths[rows] + added.square().sum(1) / weight
        overlap = self._overlap + sqrt_change(self._spectrum, rows, added @ self.reference.factor)
        shift = self.mean + (candidates - removed) / count - self.reference.mean
        return (shift.square().sum(1) + traces - 2 * overlap).clamp(min=0)

    def swap(self, row: int, vector: Tensor) -> float:
        """Replace a row by a vector `[D]`; the new distance."""
        _, vectors = replacements(torch.tensor([row]), vector[None], self.features)
        self.features[row] = vectors[0]
        self._decompose()
        return self.distance
