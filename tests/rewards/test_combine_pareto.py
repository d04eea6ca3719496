"""Pareto fronts, hypervolume and Lagrange multipliers as tensor functions."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.rewards.combine.lagrange import Lagrangian
from diffalign.rewards.combine.pareto import (
    chebyshev,
    crowding_distance,
    fronts,
    hypervolume,
    pareto_front,
    select,
)

POINTS = torch.tensor([[1.0, 4.0], [3.0, 3.0], [4.0, 1.0], [2.0, 2.0], [1.0, 1.0]])


def clouds(dimensions: int):
    return st.lists(st.tuples(*[st.integers(-1, 4).map(float)] * dimensions), min_size=1, max_size=6).map(
        torch.tensor
    )


def test_fronts_by_hand() -> None:
    assert fronts(POINTS).tolist() == [0, 0, 0, 1, 2]
    assert pareto_front(POINTS).tolist() == [True, True, True, False, False]


def test_equal_points_share_a_front_and_nan_comes_last() -> None:
    points = torch.tensor([[1.0, 1.0], [1.0, 1.0], [math.nan, 9.0], [0.0, 0.0]])
    assert fronts(points).tolist() == [0, 0, 2, 1]
    assert pareto_front(points).tolist() == [True, True, False, False]


@given(clouds(3))
@settings(max_examples=40, deadline=None)
def test_fronts_are_what_is_left_after_peeling(points: torch.Tensor) -> None:
    number = fronts(points)
    for front in range(int(number.max()) + 1):
        rest = points[number >= front]
        assert pareto_front(rest).tolist() == (number[number >= front] == front).tolist()
    shuffled = torch.randperm(len(points), generator=torch.Generator().manual_seed(1))
    assert fronts(points[shuffled]).tolist() == number[shuffled].tolist()


def test_crowding_by_hand() -> None:
    # Ranges 4 and 8: the inner points have gaps 3/4 + 6/8 and 3/4 + 5/8.
    front = torch.tensor([[0.0, 8.0], [1.0, 3.0], [3.0, 2.0], [4.0, 0.0]])
    assert crowding_distance(front).tolist() == [math.inf, 1.5, 1.125, math.inf]


def test_select_takes_fronts_first_then_the_lonely() -> None:
    assert set(select(POINTS, 4).tolist()) == {0, 1, 2, 3}
    assert set(select(POINTS, 2).tolist()) == {0, 2}
    with pytest.raises(ValueError, match="cannot select 6 of 5"):
        select(POINTS, 6)


def test_chebyshev_reaches_a_point_no_weighted_sum_reaches() -> None:
    # The middle point lies inside the line between the others, and does not fall behind in any reward.
    points = torch.tensor([[1.0, 0.0], [0.4, 0.4], [0.0, 1.0]])
    values = chebyshev(points, torch.ones(2), torch.ones(2))
    assert values.tolist() == pytest.approx([-1.0, -0.6, -1.0])
    for weight in torch.linspace(0, 1, 11):
        assert (points @ torch.stack([weight, 1 - weight])).argmax() != 1


def test_hypervolume_by_hand() -> None:
    # Steps 1x4 + 2x3 + 1x1 = 11; the dominated points add nothing.
    assert hypervolume(POINTS, torch.zeros(2)) == 11.0
    assert hypervolume(torch.tensor([[2.0], [5.0]]), torch.tensor([1.0])) == 4.0
    # Two boxes of 4 that share 1.
    assert hypervolume(torch.tensor([[4.0, 1.0, 1.0], [1.0, 4.0, 1.0]]), torch.zeros(3)) == 7.0


def test_hypervolume_counts_only_what_is_above_the_reference() -> None:
    points = torch.tensor([[2.0, 2.0], [9.0, 0.0], [math.nan, 5.0]])
    assert hypervolume(points, torch.zeros(2)) == 4.0
    assert hypervolume(points, torch.tensor([3.0, 3.0])) == 0.0
    with pytest.raises(ValueError, match="one number per column"):
        hypervolume(points, torch.zeros(3))


def _inclusion_exclusion(points: torch.Tensor) -> float:
    """Volume of a union of boxes from 0, by summing intersections over all subsets."""
    boxes = [p for p in points.double() if bool((p > 0).all())]
    total = 0.0
    for size in range(1, len(boxes) + 1):
        sign = 1 if size % 2 else -1
        for subset in combinations(boxes, size):
            total += sign * float(torch.stack(subset).amin(0).prod())
    return total


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_hypervolume_equals_inclusion_and_exclusion(dimensions: int) -> None:
    @given(clouds(dimensions))
    @settings(max_examples=25, deadline=None)
    def check(points: torch.Tensor) -> None:
        assert hypervolume(points, torch.zeros(dimensions)) == pytest.approx(_inclusion_exclusion(points))

    check()


def test_lagrangian_value_by_hand() -> None:
    lagrangian = Lagrangian([1.0, 2.0], ["at_least", "at_most"], start=0.5)
    # 10 + 0.5 (3 - 1) + 0.5 (2 - 6) = 9.
    value = lagrangian.value(torch.tensor([10.0]), torch.tensor([[3.0], [6.0]]))
    assert value.tolist() == [9.0]


def test_projected_multipliers_by_hand() -> None:
    lagrangian = Lagrangian([1.0, 1.0], step=0.5, start=0.25)
    lagrangian.update(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    # Slack -1 and +2: 0.25 + 0.5, and 0.25 - 1 clipped at 0.
    assert lagrangian.multipliers.tolist() == [0.75, 0.0]


def test_unknown_scores_and_the_limit() -> None:
    lagrangian = Lagrangian([1.0, 1.0], step=1.0, start=0.0, limit=1.5)
    lagrangian.update(torch.tensor([[math.nan, 0.0], [math.nan, math.nan]]))
    assert lagrangian.multipliers.tolist() == [1.0, 0.0]
    lagrangian.update(torch.zeros(2, 1))
    assert lagrangian.multipliers.tolist() == [1.5, 1.0]


def test_softplus_multipliers_follow_the_gradient_and_stay_positive() -> None:
    lagrangian = Lagrangian([0.0], step=0.1, form="softplus", start=2.0, limit=2.01)
    assert lagrangian.multipliers.item() == pytest.approx(2.0)
    nu = math.log(math.exp(2.0) - 1)
    lagrangian.update(torch.tensor([[1.0]]))
    moved = nu - 0.1 * (1 / (1 + math.exp(-nu)))
    assert lagrangian.multipliers.item() == pytest.approx(math.log1p(math.exp(moved)))
    for _ in range(50):
        lagrangian.update(torch.tensor([[-1.0]]))
    assert lagrangian.multipliers.item() == pytest.approx(2.01)
    for _ in range(500):
        lagrangian.update(torch.tensor([[9.0]]))
    assert 0 < lagrangian.multipliers.item() < 0.01


@pytest.mark.parametrize("form", ["projected", "softplus"])
def test_dual_ascent_finds_the_saddle_point(form: str) -> None:
    """Maximise -(x - 2)^2 with x at most 1: x = 1, and the multiplier is the pull of the objective there, 2."""
    lagrangian = Lagrangian([1.0], ["at_most"], step=0.05, form=form)
    x = torch.tensor([5.0], requires_grad=True)
    for _ in range(1000):
        value = lagrangian.value(-(x - 2).square(), x[None])
        gradient = torch.autograd.grad(value.sum(), x)[0]
        x = (x + 0.1 * gradient).detach().requires_grad_()
        lagrangian.update(x[None])
    assert x.item() == pytest.approx(1.0, abs=1e-3)
    assert lagrangian.multipliers.item() == pytest.approx(2.0, abs=1e-2)


def test_lagrangian_refuses_bad_options() -> None:
    with pytest.raises(ValueError, match="as many senses"):
        Lagrangian([1.0], ["at_least", "at_most"])
    with pytest.raises(ValueError, match="expected projected or softplus"):
        Lagrangian([1.0], form="clipped")
    with pytest.raises(ValueError, match=r"start > 0 for softplus"):
        Lagrangian([1.0], form="softplus", start=0.0)
