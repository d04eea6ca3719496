"""How sums over the eigenvalues of `Y^T Y` change when one row of `Y` is replaced, without a new decomposition.

With `A = Y^T Y` and `A' = A - w y_i y_i^T + c c^T / w`, the ratio of characteristic polynomials on the negative axis,

    l(s) = log det(A' + s) - log det(A + s),    s > 0,

is the logarithm of a 2 x 2 determinant (matrix determinant lemma) whose entries are sums over `k` terms in the
eigenbasis of `A`. Sums over eigenvalues are integrals of it:

    sum sqrt(lambda') - sum sqrt(lambda) = 1 / (2 pi) int_0^inf l(s) s^(-1/2) ds
    sum -lambda' log lambda' + sum lambda log lambda = int_0^inf l(s) ds,     when both traces are equal.

They follow from `d sqrt(x)/dx = 1/(2 pi) int s^(-1/2) / (x + s) ds` and `log x = int [1/(1 + s) - 1/(x + s)] ds`. In
`log s` the integrand is analytic in the strip `|Im| < pi` whatever the spectrum, so the trapezoidal rule of step `h`
errs by about `exp(-2 pi^2 / h)` (Trefethen and Weideman, "The exponentially convergent trapezoidal rule", 2014).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# exp(-2 pi^2 / 0.7) is 6e-13.
STEP = 0.7
TINY = 1e-200
SMALLEST = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class RowSpectrum:
    """Singular value decomposition of rows `Y [n, r]` with `k = min(n, r)`, made by `row_spectrum`.

    Fields:
        left: `[n, k]` left singular vectors, zero for the modes that are null. values: `[k]` singular values.
        right: `[r, k]` right singular vectors. weight: `w` above.
        gap: `[n]` how far a row is from being the only one in some direction, `1 / w` minus its leverage; 0 when taking
            it out lowers the rank.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    weight: float
    gap: Tensor

    def log_ratio(self, shifts: Tensor, rows: Tensor, added: Tensor) -> Tensor:
        """`l(s)` `[m, S]` for shifts `s` `[S]`, rows taken out `[m]` or `[1]` and vectors `c` put in `[m, r]`.

        Every term is non-negative, so nothing cancels; the share of the row taken out is summed as `s / (lambda + s)`
        and stays exact when that row alone spans a direction.
        """
        values = self.values.square()[:, None]
        resolvent = 1 / (values + shifts)
        left = self.left[rows]
        inside = added @ self.right
        leverage = self.weight * (left.square() @ (values * resolvent))
        kept = self.weight * (self.gap[rows][:, None] + shifts * (left.square() @ resolvent))
        grown = inside.square() @ resolvent + self._outside(added, inside)[:, None] / shifts
        mixed = (inside * left * self.values) @ resolvent
        # `kept` is `1 - leverage`; each form is exact where the other one rounds, at small and at large shifts.
        removal = torch.where(leverage < 0.5, torch.log1p(-leverage), torch.log(kept.clamp(min=SMALLEST)))
        return removal + torch.log1p(grown / self.weight + mixed.square() / kept.clamp(min=SMALLEST))

    def _outside(self, added: Tensor, inside: Tensor) -> Tensor:
        """Squared length `[m]` of what lies outside the span of the right singular vectors."""
        if self.right.shape[0] == self.right.shape[1]:
            return added.new_zeros(len(added))
        return (added - inside @ self.right.T).square().sum(1)


def row_spectrum(rows: Tensor, weight: float, *, centred: bool) -> RowSpectrum:
    """Decompose rows `[n, r]` in float64.

    Args:
        weight: the `w` of this module's first lines. centred: the rows' sum is 0, so that the vector of ones is no
            direction of theirs. It is taken out before decomposing: left vectors of tiny singular values are off by
            rounding over those values, and what they would have of it counts as a direction of the row's own.
    """
    shared = _without_ones(rows) if centred else rows
    left, values, right = torch.linalg.svd(shared, full_matrices=False)
    complete = left.shape[0] == left.shape[1]
    left = _with_ones(left) if centred else left
    rounding = max(rows.shape) * torch.finfo(rows.dtype).eps
    null = values <= rounding * values.max()
    gap = left[:, null].square().sum(1)
    if not complete:
        gap = gap + (1 / weight - left.square().sum(1)).clamp(min=0)
    # A gap within rounding is none: it would stand for a direction of its own that does not exist.
    gap = torch.where(gap > 8 * rounding, gap, 0.0)
    return RowSpectrum(left.masked_fill(null, 0.0), values.masked_fill(null, 0.0), right.T, weight, gap)


def _without_ones(rows: Tensor) -> Tensor:
    """Rows `[n, r]` in coordinates `[n - 1, r]` of what is orthogonal to the vector of ones (Householder)."""
    mirror = _mirror(rows)
    return rows[1:] - torch.outer(mirror[1:], mirror @ rows)


def _with_ones(left: Tensor) -> Tensor:
    """Back to `[n, k]` from those coordinates `[n - 1, k]`."""
    padded = torch.cat([left.new_zeros(1, left.shape[1]), left])
    mirror = _mirror(padded)
    return padded - torch.outer(mirror, mirror @ padded)


def _mirror(rows: Tensor) -> Tensor:
    """`v [n]` with `1 - v v^T` the reflection that swaps the vector of ones, normed and negated, and the first axis."""
    mirror = rows.new_full((len(rows),), len(rows) ** -0.5)
    mirror[0] += 1
    return mirror * math.sqrt(2 / float(mirror @ mirror))


def sqrt_change(spectrum: RowSpectrum, rows: Tensor, added: Tensor) -> Tensor:
    """Change of the sum of singular values, `sum sqrt(lambda') - sum sqrt(lambda)`, for each of `m` replacements."""
    # The integrand per log s falls as sqrt(s) below and 1 / sqrt(s) above: both ends leave 1e-9 of the scale.
    shifts = _shifts(spectrum, added, 1e-20, 1e18)
    return spectrum.log_ratio(shifts, rows, added) @ shifts.sqrt() * (STEP / (2 * math.pi))


def entropy_change(spectrum: RowSpectrum, rows: Tensor, added: Tensor) -> Tensor:
    """Change of `-sum lambda log lambda` for each of `m` replacements that leave the trace as it is."""
    # The integrand per log s falls as s log s below and 1 / s above.
    shifts = _shifts(spectrum, added, 1e-14, 1e10)
    return spectrum.log_ratio(shifts, rows, added) @ shifts * STEP


def _shifts(spectrum: RowSpectrum, added: Tensor, low: float, high: float) -> Tensor:
    """Nodes evenly spaced in `log s`, from `low` times the smallest to `high` times the largest scale in play."""
    present = max(float(spectrum.values.max()) ** 2, TINY)
    largest = present + float(added.square().sum(1).max())
    count = math.ceil(math.log(largest / present * high / low) / STEP)
    start = math.log(low * present)
    return torch.exp(start + STEP * torch.arange(count, dtype=added.dtype, device=added.device))
