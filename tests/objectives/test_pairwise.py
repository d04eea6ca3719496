"""Hand-worked numbers and historic bugs of the pair objectives."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.objectives.pairwise import dpo_loss, dpo_margin, error_delta, squared_error


def official_loss(policy, reference, target, beta):
    """The released computation, in float64: first half chosen, second half rejected."""
    policy_w, policy_l = (policy - target).pow(2).flatten(1).mean(1).chunk(2)
    reference_w, reference_l = (reference - target).pow(2).flatten(1).mean(1).chunk(2)
    inside = -0.5 * beta * ((policy_w - policy_l) - (reference_w - reference_l))
    return -F.logsigmoid(inside)


def test_hand_worked_numbers():
    # Errors: policy chosen (1^2 + 3^2)/2 = 5, reference chosen (2^2 + 4^2)/2 = 10: delta -5;
    # policy rejected (2^2 + 0)/2 = 2, reference rejected (0 + 0)/2 = 0: delta +2.
    target = torch.zeros(2, 2)
    policy = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    reference = torch.tensor([[2.0, -4.0], [0.0, 0.0]])
    assert squared_error(policy, target).tolist() == [5.0, 2.0]
    delta = error_delta(policy, reference, target)
    assert delta.tolist() == [-5.0, 2.0]
    margin = dpo_margin(delta[:1], delta[1:], beta=0.2)
    assert margin.item() == pytest.approx(0.7)  # -(0.2 / 2) * (-5 - 2)
    assert dpo_loss(margin).item() == pytest.approx(math.log(1 + math.exp(-0.7)))
    assert dpo_loss(margin, preference=0.5).item() == pytest.approx(math.log(1 + math.exp(-0.7)) + 0.35)


@given(seed=st.integers(0, 9999), beta=st.sampled_from([10.0, 500.0, 5000.0]))
@settings(deadline=None, max_examples=30)
def test_equals_the_official_formula_in_float64(seed, beta):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(8, 4, 8, 8, generator=generator)
    reference = target + 0.3 * torch.randn(8, 4, 8, 8, generator=generator)
    policy = reference + 0.01 * torch.randn(8, 4, 8, 8, generator=generator)
    delta_w, delta_l = error_delta(policy, reference, target).chunk(2)
    ours = dpo_loss(dpo_margin(delta_w, delta_l, beta))
    official = official_loss(policy.double(), reference.double(), target.double(), beta)
    assert torch.allclose(ours.double(), official, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_models_give_margin_zero_and_log_two_in_every_precision(dtype):
    pred, target = torch.randn(2, 6, 4, 8, 8).to(dtype)
    delta_w, delta_l = error_delta(pred, pred.clone(), target).chunk(2)
    margin = dpo_margin(delta_w, delta_l, 5000.0)
    assert margin.dtype == torch.float32
    assert margin.abs().max().item() == 0.0
    assert torch.equal(dpo_loss(margin), torch.full((3,), math.log(2)))


def test_cancellation_free_form_keeps_digits_that_the_plain_difference_loses():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 4096, generator=generator)
    reference = target + 0.3 * torch.randn(64, 4096, generator=generator)
    policy = reference + 1e-5 * torch.randn(64, 4096, generator=generator)
    exact = squared_error_double(policy, target) - squared_error_double(reference, target)
    plain = (squared_error(policy, target) - squared_error(reference, target)).double()
    ours = error_delta(policy, reference, target).double()
    assert (ours - exact).abs().max() < 0.01 * (plain - exact).abs().max()


def squared_error_double(pred, target):
    return (pred.double() - target.double()).square().mean(1)


def test_sum_and_mean_reductions_agree_when_beta_is_scaled_by_the_elements():
    delta_mean = torch.tensor([-0.002, 0.001])
    elements, beta_mean = 1024, 2048.0
    by_mean = dpo_margin(delta_mean[:1], delta_mean[1:], beta_mean)
    by_sum = dpo_margin(elements * delta_mean[:1], elements * delta_mean[1:], beta_mean / elements)
    assert by_mean.item() == pytest.approx(by_sum.item()) == pytest.approx(3.072)


def test_swapping_the_labels_negates_the_margin():
    w, l = torch.tensor([-0.01, 0.02]), torch.tensor([0.005, 0.01])  # noqa: E741
    assert torch.equal(dpo_margin(w, l, 100.0), -dpo_margin(l, w, 100.0))


def test_moving_the_chosen_prediction_towards_its_target_raises_the_margin():
    target, reference = torch.zeros(2, 4), torch.ones(2, 4)
    policy = reference.clone()
    policy[0] *= 0.9
    assert dpo_margin(*error_delta(policy, reference, target).chunk(2), 1.0).item() > 0


def test_historic_bug_log_sigmoid_of_the_batch_mean_is_not_our_loss():
    margin = torch.tensor([4.0, -4.0])
    wrong = -F.logsigmoid(margin.mean())
    assert wrong.item() == pytest.approx(math.log(2))
    assert dpo_loss(margin).mean().item() == pytest.approx(
        (math.log1p(math.exp(-4)) + math.log1p(math.exp(4))) / 2
    )


def test_historic_bug_a_tie_is_not_a_win():
    margin = torch.tensor([3.0])
    assert dpo_loss(margin, 0.5).item() > dpo_loss(margin, 1.0).item()
    at_zero = torch.zeros(1, requires_grad=True)
    dpo_loss(at_zero, 0.5).sum().backward()
    assert at_zero.grad.item() == pytest.approx(0.0)


def test_conservative_loss_is_stationary_at_its_log_odds():
    margin = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    dpo_loss(margin, 1.0, label_smoothing=0.1).sum().backward()
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_large_margins_stay_finite():
    assert dpo_loss(torch.tensor([-1e4, 1e4])).tolist() == [1e4, 0.0]


def test_label_smoothing_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"0\.5"):
        dpo_loss(torch.zeros(1), label_smoothing=0.5)
