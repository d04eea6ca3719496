"""Several rewards at once without weights: fronts, crowding, hypervolume.

Points `[N, M]`, every column to be maximised.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dominates(points: Tensor) -> Tensor:
    """`[N, N]`: whether row i is at least as good as row j everywhere and better somewhere; equal rows are not."""
    row, column = points[:, None], points[None]
    return (row >= column).all(-1) & (row > column).any(-1)


def pareto_front(points: Tensor) -> Tensor:
    """Mask `[N]` of the points that no other point dominates; points with a NaN are never among them."""
    return ~dominates(points).any(0) & ~points.isnan().any(1)


def fronts(points: Tensor) -> Tensor:
    """Front number `[N]` of each point: 0 is not dominated, 1 is not dominated once front 0 is gone, and so on.

    Points with a NaN come after all fronts. Source: Deb et al. 2002 (NSGA-II).
    """
    beats = dominates(points)
    known = ~points.isnan().any(1)
    number = torch.full((len(points),), -1, dtype=torch.long, device=points.device)
    left, front = known.clone(), 0
    while left.any():
        current = left & ~(beats & left[:, None]).any(0)
        number[current] = front
        left, front = left & ~current, front + 1
    return torch.where(known, number, front)


def crowding_distance(points: Tensor) -> Tensor:
    """How alone each point of one front is, `[N]`.

    The sum over rewards of the gap between its neighbours, as a share of the range; infinite for the extremes of each
    reward. Source: Deb et al. 2002 (NSGA-II).
    """
    distance = torch.zeros(len(points), dtype=torch.float64, device=points.device)
    for column in points.double().unbind(1):
        order = column.argsort(stable=True)
        ranked = column[order]
        spread = ranked[-1] - ranked[0]
        gaps = torch.full_like(ranked, torch.inf)
        gaps[1:-1] = (ranked[2:] - ranked[:-2]) / torch.where(spread > 0, spread, 1.0)
        distance[order] += gaps
    return distance.to(points.dtype)


def select(points: Tensor, n: int) -> Tensor:
    """Indices of the n best points: by front, within a front the least crowded first (NSGA-II).

    Raises:
        ValueError: n is not between 1 and the number of points.
    """
    if not 1 <= n <= len(points):
        raise ValueError(f"cannot select {n} of {len(points)} points")
    number = fronts(points)
    crowding = torch.zeros(len(points), dtype=torch.float64, device=points.device)
    for front in number.unique():
        members = number == front
        crowding[members] = crowding_distance(points[members].nan_to_num()).double()
    by_crowding = crowding.argsort(descending=True, stable=True)
    return by_crowding[number[by_crowding].argsort(stable=True)][:n]


def chebyshev(points: Tensor, weights: Tensor, ideal: Tensor) -> Tensor:
    """Chebyshev scalarisation `min_k w_k (r_k - z_k)` `[N]`, to be maximised.

    Args:
        weights: `[M]`, positive. ideal: `[M]`, the point z that is wished for, such as the best value of each reward.
            Unlike a weighted sum it can reach every point of a front that is not convex.
    """
    return (weights * (points - ideal)).amin(1)


def hypervolume(points: Tensor, reference: Tensor) -> float:
    """Volume between the points and a reference point `[M]` that is worse in every reward; exact, for few rewards.

    Two rewards by a sweep; more by summing what each point adds to those after it (While et al. 2012, WFG), which takes
    time exponential in the size of the front in the worst case. Points that are not better than the reference
    everywhere, or hold a NaN, add nothing.

    Raises:
        ValueError: the reference has not one number per reward.
    """
    if points.ndim != 2 or reference.shape != points.shape[1:]:
        raise ValueError(
            f"points {list(points.shape)} need a reference point with one number per column; "
            f"got {list(reference.shape)}"
        )
    above = points.detach().double().cpu() - reference.detach().double().cpu()
    return _volume(above[(above > 0).all(1)])


def _volume(points: Tensor) -> float:
    """Volume of the union of the boxes from 0 to each point."""
    if len(points) == 0:
        return 0.0
    front = points[pareto_front(points)].unique(dim=0)
    if front.shape[1] == 1:
        return float(front.max())
    if front.shape[1] == 2:
        return _sweep(front)
    return sum(_added(point, front[i + 1 :]) for i, point in enumerate(front))


def _sweep(front: Tensor) -> float:
    """Area under a two-reward front: steps of falling height from right to left."""
    front = front[front[:, 0].argsort(descending=True)]
    below = torch.cat([front.new_zeros(1), front[:-1, 1]])
    return float((front[:, 0] * (front[:, 1] - below)).sum())


def _added(point: Tensor, others: Tensor) -> float:
    """What a point's box adds to those of the others: its volume minus the part they cover."""
    return float(point.prod()) - _volume(torch.minimum(others, point))
