"""Vendi score: the effective number of different elements of a set.

Friedman and Dieng 2022, "The Vendi Score: A Diversity Evaluation Metric for Machine Learning"; orders q from Pasarkar
and Dieng 2023, "Cousins of the Vendi Score". With the eigenvalues `lambda` of `K / n`, K a kernel with ones on its
diagonal (here the cosine):

    q = 1: exp(-sum lambda log lambda),    q = inf: 1 / max lambda,    else (sum lambda^q)^(1 / (1 - q)).

1 for n copies of one element, n for n orthogonal ones. Low orders count rare elements, high orders only what is common.
It grows with n: compare sets of one size only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.sets.features import as_matrix, replacements, unit_rows
from diffalign.rewards.sets.lowrank import entropy_change, row_spectrum

KERNEL_TOLERANCE = 1e-6


def vendi_score(features: Tensor, order: float = 1.0) -> Tensor:
    """Vendi score of features `[N, D]` under the cosine kernel; a float64 scalar in [1, N], differentiable.

    Args:
        order: q above 0, `math.inf` included.

    Raises:
        DiffalignError: no rows, a row of zeros, numbers that are not finite, or a bad order.
    """
    rows = unit_rows(as_matrix(features)) / math.sqrt(len(features))
    values = torch.linalg.svdvals(rows)
    rounding = max(rows.shape) * torch.finfo(rows.dtype).eps
    return effective_number(values[values > rounding * values[0].detach()].square(), order)


def vendi_from_kernel(kernel: Tensor, order: float = 1.0) -> Tensor:
    """Vendi score of a symmetric positive semi-definite kernel `[N, N]` with ones on its diagonal.

    Raises:
        DiffalignError: the kernel is not one, or a bad order.
    """
    kernel = as_matrix(kernel, "the kernel")
    if kernel.shape[0] != kernel.shape[1]:
        raise DiffalignError(f"the kernel has shape {tuple(kernel.shape)}; expected [N, N]")
    symmetric = torch.allclose(kernel, kernel.T, rtol=0, atol=KERNEL_TOLERANCE)
    if not symmetric or float((kernel.diagonal() - 1).abs().max()) > KERNEL_TOLERANCE:
        raise DiffalignError(
            "the kernel is not symmetric with ones on its diagonal; divide it by its own scale"
        )
    values = torch.linalg.eigvalsh((kernel + kernel.T) / 2) / len(kernel)
    if float(values[0]) < -KERNEL_TOLERANCE:
        raise DiffalignError(
            f"the kernel has the eigenvalue {float(values[0]):.3g} below 0; it measures no similarity"
        )
    rounding = len(kernel) * torch.finfo(kernel.dtype).eps
    return effective_number(values[values > rounding * values[-1].detach()], order)


def effective_number(eigenvalues: Tensor, order: float) -> Tensor:
    """Exponential of the Renyi entropy of order q of positive eigenvalues `[k]` that sum to 1.

    Raises:
        DiffalignError: an order that is not above 0.
    """
    if not order > 0:
        raise DiffalignError(f"order {order} of a Vendi score; expected a number above 0, or inf")
    if order == 1:
        return (-torch.xlogy(eigenvalues, eigenvalues)).sum().exp()
    if math.isinf(order):
        return 1 / eigenvalues.max()
    return eigenvalues.pow(order).sum().pow(1 / (1 - order))


class VendiExchange:
    """Vendi score of a set that is about to exchange elements.

    Order 1: a replacement is judged by `entropy_change` in O(r k), and a replacement that is made costs a new
    decomposition, O(n D k). Order 2: the score is `1 / |K / n|^2`, and both cost O(n D).

    Args:
        features: `[n, D]`; only directions count. order: 1 or 2.

    Raises:
        DiffalignError: another order, no rows, or a row of zeros.
    """

    def __init__(self, features: Tensor, order: int = 1) -> None:
        if order not in (1, 2):
            raise DiffalignError(f"VendiExchange got order {order}; expected 1 or 2, else use vendi_score")
        self.order = order
        self.features = unit_rows(as_matrix(features.detach())).clone()
        if order == 1:
            self._decompose()
        else:
            self._kernel = self.features @ self.features.T

    def _decompose(self) -> None:
        self._spectrum = row_spectrum(self.features / math.sqrt(len(self.features)), 1.0, centred=False)
        values = self._spectrum.values.square()
        self._entropy = -torch.xlogy(values, values).sum()

    @property
    def score(self) -> float:
        """Score of the set as it is."""
        if self.order == 1:
            return float(self._entropy.exp())
        return float(len(self.features) ** 2 / self._kernel.square().sum())

    def swapped(self, row: int, candidates: Tensor) -> Tensor:
        """Scores `[m]` after replacing one row by each of the candidates `[m, D]`."""
        return self.swapped_pairs(torch.tensor([row]), candidates)

    def swapped_pairs(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """Scores `[m]` after replacing `rows[j]` by `candidates[j]`, each alone; rows `[m]` or `[1]`.

        Raises:
            DiffalignError: a row that is not in the set, or candidates of another width or without direction.
        """
        rows, candidates = replacements(rows, candidates, self.features)
        vectors, count = unit_rows(candidates, "candidates"), len(self.features)
        if self.order == 1:
            return (self._entropy + entropy_change(self._spectrum, rows, vectors / math.sqrt(count))).exp()
        new = (vectors @ self.features.T).square()
        new = new.scatter(1, rows.expand(len(new))[:, None], 0.0).sum(1)
        old = self._kernel[rows].square().sum(1) - 1
        return count**2 / (self._kernel.square().sum() + 2 * (new - old))

    def swap(self, row: int, vector: Tensor) -> float:
        """Replace a row by a vector `[D]`; the new score."""
        _, vectors = replacements(torch.tensor([row]), vector[None], self.features)
        self.features[row] = unit_rows(vectors, "candidates")[0]
        if self.order == 1:
            self._decompose()
        else:
            similarity = self.features @ self.features[row]
            self._kernel[row], self._kernel[:, row] = similarity, similarity
        return self.score
