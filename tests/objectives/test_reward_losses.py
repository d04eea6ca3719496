"""Reward-model losses against numbers worked out by hand, their probabilities, and PAL's geometry."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.objectives.reward_model import (
    angle_reward,
    bounded,
    bradley_terry_loss,
    credit,
    distance_reward,
    hpsv3_loss,
    ideal_points,
    probit_loss,
    sampled_loss,
    smoothed,
    ties_loss,
    win_probability,
)

margins = st.floats(-20, 20)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_bradley_terry_by_hand():
    # sigmoid(log 3) = 3/4. Win: -log 3/4; loss: -log 1/4; tie: the mean of both; undecided margin: log 2.
    margin = double(math.log(3), math.log(3), math.log(3), 0.0)
    expected = double(math.log(4 / 3), math.log(4), 0.5 * math.log(16 / 3), math.log(2))
    assert torch.allclose(bradley_terry_loss(margin, double(1, 0, 0.5, 1)), expected)


def test_ties_by_hand():
    # k = 5, d = log 5: P(win) = 1/2, P(loss) = sigmoid(-2 log 5) = 1/26, P(tie) = 24/52 = 6/13; they sum to 1.
    margin = double(math.log(5)).expand(3)
    losses = ties_loss(margin, double(1, 0, 0.5))
    assert torch.allclose(losses, double(math.log(2), math.log(26), math.log(13 / 6)))
    # d = 0: P(win) = P(loss) = 1/6, P(tie) = 24/36 = 2/3.
    at_zero = ties_loss(double(0, 0), double(1, 0.5))
    assert torch.allclose(at_zero, double(math.log(6), math.log(1.5)))


@given(margins, st.floats(1.01, 50))
def test_probabilities_of_win_tie_and_loss_sum_to_one(margin, k):
    d = double(margin, margin, margin)
    total = torch.exp(-ties_loss(d, double(1, 0.5, 0), k)).sum()
    assert float(total) == pytest.approx(1.0, abs=1e-9)


def test_ties_prefer_equal_scores_and_a_soft_label_is_a_mixture():
    margin = torch.linspace(-3, 3, 61, dtype=torch.float64)
    assert int(ties_loss(margin, double(0.5)).argmin()) == 30
    # p = 0.7 is 0.4 win and 0.6 tie.
    mixed = 0.4 * ties_loss(margin, double(1)) + 0.6 * ties_loss(margin, double(0.5))
    assert torch.allclose(ties_loss(margin, double(0.7)), mixed)


def test_a_tie_is_not_a_win():
    # The historic bug: counting ties as wins of the first image pushes the margin up for ever.
    margin = double(2.0).requires_grad_()
    ties_loss(margin, double(0.5)).sum().backward()
    assert margin.grad.item() > 0


def test_tie_parameter_and_smoothing_are_checked():
    with pytest.raises(ValueError, match="above 1"):
        ties_loss(double(0), double(1), k=1.0)
    with pytest.raises(ValueError, match=r"\[0, 0.5\)"):
        smoothed(double(1), 0.5)


def test_smoothing_moves_wins_and_leaves_ties():
    assert torch.allclose(smoothed(double(1, 0, 0.5), 0.1), double(0.9, 0.1, 0.5))
    # The optimum of a win with a tenth of wrong labels is log 9.
    margin = torch.linspace(0, 4, 4001, dtype=torch.float64)
    best = margin[bradley_terry_loss(margin, smoothed(double(1), 0.1)).argmin()]
    assert float(best) == pytest.approx(math.log(9), abs=1e-3)


def test_probit_by_hand():
    # v = 24 / pi: sqrt(1 + pi v / 8) = 2, so the margin 2 log 3 counts as log 3.
    loss = probit_loss(double(2 * math.log(3)), double(24 / math.pi), double(1))
    assert float(loss) == pytest.approx(math.log(4 / 3))
    assert torch.equal(
        probit_loss(double(1.3), double(0), double(1)), bradley_terry_loss(double(1.3), double(1))
    )


def test_variance_helps_when_the_answer_is_wrong_and_hurts_when_it_is_right():
    variance = double(0, 1, 4, 16)
    right, wrong = (probit_loss(double(sign * 2.0), variance, double(1)) for sign in (1, -1))
    assert (right.diff() > 0).all()
    assert (wrong.diff() < 0).all()


def test_sampled_loss_is_what_the_probit_approximates():
    noise = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for margin, variance in ((1.0, 1.0), (2.5, 4.0), (-1.5, 2.0)):
        exact = sampled_loss(double(margin), double(variance), double(1), noise)
        near = probit_loss(double(margin), double(variance), double(1))
        assert float(exact) == pytest.approx(float(near), abs=0.02)
    # Two samples by hand: z = log 3 -+ 2 log 3, sigmoid 1/4 and 27/28.
    two = double(-1, 1)[:, None]
    loss = sampled_loss(double(math.log(3)), double(4 * math.log(3) ** 2), double(1), two)
    assert float(loss) == pytest.approx(-math.log((1 / 4 + 27 / 28) / 2))


@given(margins, st.floats(0, 5), st.floats(0.1, 5))
def test_hpsv3_loss_never_rewards_variance(margin, variance, more):
    noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.cat([noise, -noise])  # symmetric samples make Jensen's inequality exact
    low, high = (hpsv3_loss(double(margin), double(v), double(1), noise) for v in (variance, variance + more))
    assert float(high) >= float(low) - 1e-12


def test_hpsv3_loss_by_hand():
    two = double(-1, 1)[:, None]
    loss = hpsv3_loss(double(math.log(3)), double(4 * math.log(3) ** 2), double(1), two)
    assert float(loss) == pytest.approx((math.log(4) + math.log(28 / 27)) / 2)


def test_win_probability_of_decided_pairs():
    assert float(win_probability(double(math.log(3)))) == pytest.approx(0.75)
    # Ties: (1/2) / (1/2 + 1/26) = 13/14.
    assert float(win_probability(double(math.log(5)), k=5.0)) == pytest.approx(13 / 14)
    assert float(win_probability(double(2 * math.log(3)), double(24 / math.pi))) == pytest.approx(0.75)


def test_credit():
    assert credit(double(2, -1, 3, 0), double(1, 1, 0.5, 0)).tolist() == [1, 0, 0.5, 0.5]


def test_ideal_points_and_distances_by_hand():
    prototypes = double(0, 0, 8, 6).reshape(2, 2)
    weights = double(1, 0, 0.5, 0.5).reshape(2, 2)
    ideals = ideal_points(weights, prototypes)
    assert ideals.tolist() == [[0, 0], [4, 3]]
    assert distance_reward(double(3, 4, 4, 3).reshape(2, 2), ideals).tolist() == [-5, 0]
    # Prototypes of each row's own prompt.
    assert ideal_points(weights, torch.stack([prototypes, 2 * prototypes])).tolist() == [[0, 0], [8, 6]]


def test_angles_ignore_length():
    items, ideals = double(3, 4, 0, 2).reshape(2, 2), double(30, 40, 5, 0).reshape(2, 2)
    assert angle_reward(items, ideals).tolist() == pytest.approx([1.0, 0.0])


def test_bounded_shortens_only_what_is_too_long():
    shortened = bounded(double(6, 8, 0, 1).reshape(2, 2))
    assert torch.allclose(shortened, double(2.4, 3.2, 0, 1).reshape(2, 2))
