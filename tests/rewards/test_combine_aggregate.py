"""Ensemble aggregation, running moments and Ctrl-U weights as tensor functions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.rewards.combine.aggregate import (
    ensemble_mean,
    entropic,
    nominal_and_worst,
    root,
    total_std,
    uwo,
    variance,
    wco,
)
from diffalign.rewards.combine.moments import RunningMoments
from diffalign.rewards.combine.uncertainty import (
    class_uncertainty,
    inverse_uncertainty,
    paired_uncertainty,
    uncertainty_weighted_loss,
)

R = torch.tensor([1.0, 0.9, 0.8, -2.0, 0.7])
ROWS = st.lists(st.floats(-5, 5), min_size=2, max_size=6)


@pytest.mark.parametrize(("beta", "expected"), [(0.1, -1.839), (1.0, -0.600), (10.0, 0.2108)])
def test_entropic_matches_the_paper_table(beta: float, expected: float) -> None:
    # beta 0.1: all but exp(20) vanish, so -2 + 0.1 log 5 = -1.8391.
    assert entropic(R, beta).item() == pytest.approx(expected, abs=6e-4)


def test_entropic_is_the_textbook_formula() -> None:
    direct = -0.7 * torch.log(torch.exp(-R.double() / 0.7).mean())
    assert entropic(R.double(), 0.7).item() == pytest.approx(direct.item(), abs=1e-12)


def test_entropic_limits() -> None:
    assert entropic(R, 0.0) == -2.0
    assert entropic(R, math.inf).item() == pytest.approx(0.28)
    assert entropic(R, 1e-6).item() == pytest.approx(-2.0, abs=1e-5)
    # mean - var / (2 beta) with the biased variance 1.3096, although float32 knows only 7 digits of log 5.
    assert entropic(R, 1e5).item() == pytest.approx(0.28 - 1.3096 / 2e5, abs=1e-7)


def test_entropic_gradient_is_a_distribution_that_looks_at_the_worst() -> None:
    values = R.clone().requires_grad_()
    entropic(values, 0.5).backward()
    expected = torch.softmax(-R / 0.5, 0)
    assert torch.allclose(values.grad, expected, atol=1e-6)


@given(ROWS, st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_entropic_lies_between_min_and_mean_and_ignores_order(row: list[float], beta: float) -> None:
    values = torch.tensor(row, dtype=torch.float64)
    risk = entropic(values, beta)
    assert wco(values) - 1e-9 <= risk <= ensemble_mean(values) + 1e-9
    assert torch.isclose(entropic(values.flip(0), beta), risk, atol=1e-9)
    assert torch.isclose(entropic(values + 3, beta), risk + 3, atol=1e-9)
    assert risk <= entropic(values, 2 * beta) + 1e-9


def test_uwo_by_hand_with_both_variances() -> None:
    # Mean 2, squared deviations 1 + 1 = 2: variance 2 (unbiased) or 1.
    values = torch.tensor([[1.0], [3.0]])
    assert uwo(values, 0.5).tolist() == [1.0]
    assert uwo(values, 0.5, unbiased=False).tolist() == [1.5]


def test_uwo_takes_the_variance_and_not_the_std() -> None:
    # Variance 8, std 2.83: 4 - 0.5 * 8 = 0.
    assert uwo(torch.tensor([[2.0], [6.0]]), 0.5).tolist() == [0.0]


def test_truncation_can_fall_below_the_minimum_where_entropic_does_not() -> None:
    truncated = uwo(R, 1 / 0.2, unbiased=False)
    assert truncated.item() == pytest.approx(-6.268, abs=1e-3)
    assert entropic(R, 0.1) > -2.0 > truncated


def test_nominal_and_worst_by_hand() -> None:
    values = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
    assert nominal_and_worst(values, 0.25).tolist() == [2.5, 1.0]  # 1 + 0.75 * 2; 0.25 + 0.75
    assert nominal_and_worst(values, 1.0).tolist() == [4.0, 1.0]


def test_mixture_std_adds_variances() -> None:
    within = torch.tensor([[1.0], [math.sqrt(17)]])  # Mean variance 9.
    assert total_std(torch.tensor([16.0]), within).tolist() == [5.0]
    assert total_std(torch.tensor([16.0]), None).tolist() == [4.0]


def test_std_of_agreeing_members_has_a_finite_gradient() -> None:
    values = torch.ones(3, 2, requires_grad=True)
    root(variance(values)).sum().backward()
    assert values.grad.tolist() == [[0.0, 0.0]] * 3


def test_one_member_has_no_variance() -> None:
    with pytest.raises(ValueError, match="at least 2; got 1"):
        uwo(torch.ones(1, 3), 0.5)
    with pytest.raises(ValueError, match="beta is -1"):
        entropic(R, -1)


def test_moments_of_a_stream_equal_those_of_the_whole() -> None:
    data = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) * 3 + 1000
    moments = RunningMoments(2)
    for chunk in data.split([1, 7, 2, 40], 1):
        moments.update(chunk)
    assert torch.allclose(moments.mean, data.double().mean(1), atol=1e-9)
    assert torch.allclose(moments.std, data.double().std(1), atol=1e-9)


def test_moments_merge_and_restore() -> None:
    first, second = RunningMoments(1), RunningMoments(1)
    first.update(torch.tensor([[1.0, 3.0]]))
    second.update(torch.tensor([[5.0]]))
    first.merge(second)
    assert first.mean.tolist() == [3.0]
    assert first.std.tolist() == [2.0]  # Squares 4 + 0 + 4 over 2.
    again = RunningMoments(1)
    again.load_state_dict(first.state_dict())
    first.update(torch.tensor([[100.0]]))
    assert (again.mean.item(), again.std.item()) == (3.0, 2.0)


def test_moments_leave_out_what_is_not_finite() -> None:
    moments = RunningMoments(2)
    moments.update(torch.tensor([[1.0, math.nan, 3.0], [math.inf, 5.0, math.nan]]))
    assert moments.count.tolist() == [2.0, 1.0]
    assert moments.mean.tolist() == [2.0, 5.0]
    assert moments.std.tolist() == [pytest.approx(math.sqrt(2)), 1.0]


def test_inverse_uncertainty_by_hand() -> None:
    weights = inverse_uncertainty(torch.tensor([0.0, math.log(2), math.log(4)]))
    assert weights.tolist() == pytest.approx([1.0, 0.5, 0.25])
    assert inverse_uncertainty(torch.tensor(2.0), scale=0.5).item() == pytest.approx(math.exp(-1))


def test_weighted_loss_is_lowest_where_uncertainty_is_the_log_of_the_loss() -> None:
    # d/du (8 e^-u + 2 u) = 0 at u = log 4.
    u = torch.tensor(math.log(4), requires_grad=True)
    loss = uncertainty_weighted_loss(torch.tensor(8.0), u, penalty=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(2 + 2 * math.log(4), abs=1e-6)
    assert u.grad.item() == pytest.approx(0, abs=1e-6)


def test_ctrl_u_uncertainties() -> None:
    assert paired_uncertainty(torch.tensor([1.0]), torch.tensor([4.0]), spread=2.0).tolist() == [1.5]
    # KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 log 3/2 + 1/4 log 1/2 = 0.13081.
    first, second = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    assert class_uncertainty(first, second).item() == pytest.approx(0.13081, abs=1e-5)
    assert class_uncertainty(second, second).item() == pytest.approx(0, abs=1e-7)
