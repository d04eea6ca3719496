"""Axes of diversity that follow judgements of similarity: which of two pictures is more like a third?

Ding et al. 2024 (QDHF, ICML), arXiv 2310.12103, section 3: a linear map of picture features is trained on triplets so
that squared distances in the map agree with the judgements (a hinge on their difference, eq. 3). A person judges, or
a proxy that knows similarity (the paper: DreamSim). Without judgements the principal axes of the features stand in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.randomness import generator

MARGIN = 0.05
# Epochs whose mean validation accuracy must not fall, as in the release.
WINDOW = 10


@dataclass(frozen=True)
class Axes:
    """A linear map of features to k axes, and the box that a grid divides.

    Fields:
        centre: `[D]`, subtracted first. projection: `[D, k]`. low, high: `[k]`, the places of the box.
    """

    centre: Tensor
    projection: Tensor
    low: Tensor
    high: Tensor

    def places(self, features: Tensor) -> Tensor:
        """Features `[..., D]` on the axes, `[..., k]`."""
        return (features - self.centre) @ self.projection

    def cells(self, features: Tensor, grid: int) -> Tensor:
        """Cell numbers `[...]` in a grid of `grid` cells per axis, the last axis fastest; outside counts as edge."""
        share = (self.places(features) - self.low) / (self.high - self.low)
        index = (share * grid).floor().clamp(0, grid - 1).long()
        found = torch.zeros_like(index[..., 0])
        for axis in range(index.shape[-1]):
            found = found * grid + index[..., axis]
        return found


def principal_axes(features: Tensor, count: int) -> Axes:
    """The k = `count` directions in which features `[N, D]` vary most, scaled to a root mean square of 1 in all.

    Raises:
        DiffalignError: fewer features or dimensions than axes, or no variation.
    """
    centre = features.mean(0)
    around = features - centre
    scale = around.square().sum(1).mean().sqrt()
    if min(features.shape) < count or scale == 0:
        raise DiffalignError(
            f"{count} axes of diversity cannot be found in features of shape {list(features.shape)} with a spread of "
            f"{float(scale):.3g}; expected at least {count} different pictures and feature dimensions."
        )
    _, _, rows = torch.linalg.svd(around, full_matrices=False)
    directions = rows[:count].T
    # A singular vector's sign is a matter of the library; the greatest entry is made positive.
    greatest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return boxed(centre, directions * greatest.sign() / scale, features)


def boxed(centre: Tensor, projection: Tensor, features: Tensor) -> Axes:
    """Axes whose box just holds `features` `[N, D]`."""
    places = (features - centre) @ projection
    low, high = places.amin(0), places.amax(0)
    return Axes(centre, projection, low, torch.where(high > low, high, low + 1))


def distance_gap(projection: Tensor, triplets: Tensor) -> Tensor:
    """`|P (ref - first)|^2 - |P (ref - second)|^2` of triplets `[T, 3, D]`, `[T]`; positive: second is nearer."""
    first, second = triplets[:, 0] - triplets[:, 1], triplets[:, 0] - triplets[:, 2]
    return (first @ projection).square().sum(1) - (second @ projection).square().sum(1)


def triplet_loss(
    projection: Tensor, triplets: Tensor, second_nearer: Tensor, margin: float = MARGIN
) -> Tensor:
    """`max(0, margin - y gap)` per triplet `[T]`, y = 1 where the second is judged nearer and -1 elsewhere.

    Args:
        projection: `[D, k]`. triplets: `[T, 3, D]` (reference, first, second). second_nearer: `[T]` bool.
    """
    return (margin - _signs(second_nearer) * distance_gap(projection, triplets)).clamp(min=0)


def agreement(projection: Tensor, triplets: Tensor, second_nearer: Tensor) -> float:
    """Share of triplets in which the nearer one on the axes is the one judged nearer."""
    return float(((distance_gap(projection, triplets) > 0) == second_nearer).float().mean())


def judged_by(features: Tensor) -> Tensor:
    """A proxy's judgements of triplets `[T, 3, D]` of its own features: is the second nearer by cosine? `[T]` bool."""
    near = torch.nn.functional.cosine_similarity(features[:, :1], features[:, 1:], dim=2)
    return near[:, 1] > near[:, 0]


def learned_axes(
    features: Tensor,
    triplets: Tensor,
    second_nearer: Tensor,
    count: int,
    seed: int = 0,
    *,
    epochs: int = 1000,
    learning_rate: float = 1e-2,
    batch: int = 32,
) -> tuple[Axes, float]:
    """Axes trained on judgements, from the principal ones on, and their agreement with held-out judgements.

    As in the release: Adam, a quarter of the triplets held out (all of fewer than 8 serve both ends), at most 1000
    epochs, the end when the mean agreement of the last 10 epochs falls. Features are centred and scaled first, so
    that the margin means the same for every encoder.

    Args:
        features: `[N, D]`, of what will be placed; gives the centre, scale and box. triplets: `[T, 3, D]`.
            second_nearer: `[T]` bool. count: axes.

    Raises:
        DiffalignError: no judgements, or as for `principal_axes`.
    """
    if len(triplets) == 0:
        raise DiffalignError("axes of diversity need judgements to learn from; got none.")
    start = principal_axes(features, count)
    scale = (features - start.centre).square().sum(1).mean().sqrt()
    triplets = triplets / scale
    projection = (start.projection * scale).requires_grad_()
    optimiser = torch.optim.Adam([projection], lr=learning_rate)
    train = len(triplets) if len(triplets) < 8 else int(0.75 * len(triplets))
    held_out = slice(0 if train == len(triplets) else train, None)
    seen: list[float] = []
    numbers = generator(seed, "axes", len(triplets))
    for _ in range(epochs):
        for _ in range(max(train // batch, 1)):
            rows = torch.randint(train, (batch,), generator=numbers)
            optimiser.zero_grad()
            triplet_loss(projection, triplets[rows], second_nearer[rows]).mean().backward()
            optimiser.step()
        seen.append(agreement(projection.detach(), triplets[held_out], second_nearer[held_out]))
        if len(seen) > WINDOW + 1 and sum(seen[-WINDOW:]) < sum(seen[-WINDOW - 1 : -1]):
            break
    return boxed(start.centre, projection.detach() / scale, features), seen[-1]


def _signs(second_nearer: Tensor) -> Tensor:
    return second_nearer.float() * 2 - 1
