"""Fidelity and coverage from nearest neighbours: improved precision and recall, density and coverage.

Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models"; Naeem et al. 2020,
"Reliable Fidelity and Diversity Metrics for Generative Models". The ball of an element reaches to its k-th nearest
neighbour in its own set. All four depend on the sizes of the sets: compare equal sizes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.sets.features import as_matrix, same_width

CHUNK = 1024


@dataclass(frozen=True)
class NeighbourMetrics:
    """Four shares.

    Fields:
        precision: of the features, inside some ball of the reference, [0, 1].
        recall: of the reference, inside some ball of the features, [0, 1].
        density: mean number of reference balls around a feature over k; can be above 1.
        coverage: of the reference balls, those that hold a feature, [0, 1]; less moved by outliers than recall.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbour_metrics(features: Tensor, reference: Tensor, k: int = 5) -> NeighbourMetrics:
    """Compare features `[N, D]` with reference features `[M, D]`; distances are taken in chunks of rows.

    Raises:
        DiffalignError: k is not in 1 .. min(N, M) - 1, widths differ, numbers are not finite.
    """
    features, reference = as_matrix(features.detach()), as_matrix(reference.detach(), "reference features")
    same_width(features, reference.shape[1])
    smaller = min(len(features), len(reference))
    if not 1 <= k < smaller:
        raise DiffalignError(
            f"k = {k} nearest neighbours in sets of {smaller} rows; expected 1 <= k < {smaller}"
        )
    reference_radii, own_radii = radii(reference, k), radii(features, k)
    inside = torch.cat([(d <= reference_radii).sum(1) for d in _distances(features, reference)])
    recalled = torch.cat([(d <= own_radii).any(1) for d in _distances(reference, features)])
    nearest = torch.cat([d.min(1).values for d in _distances(reference, features)])
    return NeighbourMetrics(
        precision=float((inside > 0).double().mean()),
        recall=float(recalled.double().mean()),
        density=float(inside.double().mean() / k),
        coverage=float((nearest <= reference_radii).double().mean()),
    )


def radii(features: Tensor, k: int) -> Tensor:
    """Distance `[N]` of each row to its k-th nearest neighbour, itself not counted."""
    return torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(features, features)])


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Euclidean distances `[chunk, M]` of rows of x to all of y; exact, so that equal rows are at distance 0."""
    for rows in x.split(CHUNK):
        yield torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist")
