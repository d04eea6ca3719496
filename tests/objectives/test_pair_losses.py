"""Every loss on the margin against its official formula, and what label noise, divergences and the safeguard do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.objectives.pair_losses import (
    PAIR_LOSSES,
    PairRewards,
    debiased_preference,
    divergence_reward,
    dynamic_beta_factor,
    imitation_loss,
    safeguarded_delta,
    smoothed_margin,
)
from diffalign.objectives.pairwise import error_delta, error_overlap, smoothed_preference, squared_error

reward = st.floats(-6, 6)


def pair(chosen, rejected, grad=False):
    w, l = (torch.tensor([float(x)], dtype=torch.float64, requires_grad=grad) for x in (chosen, rejected))  # noqa: E741
    return PairRewards(w, l, w - l)


def value(name, chosen, rejected, p=1.0):
    return PAIR_LOSSES[name](pair(chosen, rejected), torch.tensor([p], dtype=torch.float64)).item()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # r_w = 2, r_l = 0.5, h = 1.5
        ("sigmoid", math.log(1 + math.exp(-1.5))),
        ("hinge", 0.0),
        ("ipo", 1.0),
        ("sppo", 1.5**2 + 1.0**2),
        ("nca", math.log1p(math.exp(-2)) + 0.5 * math.log1p(math.exp(2)) + 0.5 * math.log1p(math.exp(0.5))),
        ("bce", math.log1p(math.exp(-2)) + math.log1p(math.exp(0.5))),
        ("apo_zero", 1 - sigmoid(2) + sigmoid(0.5)),
        ("apo_down", sigmoid(2) + 1 - sigmoid(1.5)),
    ],
)
def test_hand_worked_values(name, expected):
    assert value(name, 2, 0.5) == pytest.approx(expected)


def test_hinge_below_its_corner():
    assert value("hinge", 0, 0.5) == pytest.approx(1.5)


def test_exo_is_the_kl_divergence_to_the_smoothed_label_and_zero_at_its_log_odds():
    # h = 0 against 1 - e = 0.9: 0.5 log(0.5 / 0.9) + 0.5 log(0.5 / 0.1).
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert value("exo", 0, 0, 0.9) == pytest.approx(expected)
    assert value("exo", math.log(9), 0, 0.9) == pytest.approx(0.0, abs=1e-12)
    assert value("exo", math.log(9) + 1, 0, 0.9) > 0


@given(chosen=reward, rejected=reward, p=st.floats(0.02, 0.98), name=st.sampled_from(sorted(PAIR_LOSSES)))
@settings(deadline=None, max_examples=60)
def test_swapping_pictures_and_labels_changes_nothing(chosen, rejected, p, name):
    assert value(name, chosen, rejected, p) == pytest.approx(value(name, rejected, chosen, 1 - p))


@given(chosen=reward, rejected=reward, p=st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_soft_labels_are_expectations_over_the_label(chosen, rejected, p):
    for name in ("sigmoid", "hinge", "ipo", "nca", "bce", "apo_zero", "apo_down"):
        both = p * value(name, chosen, rejected) + (1 - p) * value(name, rejected, chosen)
        assert value(name, chosen, rejected, p) == pytest.approx(both)


def test_a_tie_pulls_to_no_side_at_the_start():
    for name, loss in PAIR_LOSSES.items():
        rewards = pair(0, 0, grad=True)
        loss(rewards, torch.tensor([0.5], dtype=torch.float64)).sum().backward()
        assert rewards.chosen.grad.item() == pytest.approx(rewards.rejected.grad.item(), abs=1e-12), name


def test_the_starting_gradient_raises_the_chosen_reward_except_where_both_must_fall():
    for name, loss in PAIR_LOSSES.items():
        rewards = pair(0, 0, grad=True)
        loss(rewards, torch.tensor([0.99], dtype=torch.float64)).sum().backward()
        assert rewards.rejected.grad.item() > 0, name
        assert (rewards.chosen.grad.item() < 0) is (name != "apo_down"), name


def test_ipo_is_the_length_normalised_official_form_times_beta_squared():
    # Log-ratios 3.2 and 1.7 at beta 0.4: (1.5 - 1 / 0.8)^2 = 0.0625.
    beta, log_w, log_l = 0.4, 3.2, 1.7
    official = (log_w - log_l - 1 / (2 * beta)) ** 2
    assert value("ipo", beta * log_w, beta * log_l) == pytest.approx(beta**2 * official)


def test_soft_sppo_regresses_each_side_to_its_win_probability():
    # p = 0.8 at r_w = 0.3, r_l = -0.3: both sides are there.
    assert value("sppo", 0.3, -0.3, 0.8) == pytest.approx(0.0, abs=1e-15)
    assert value("sppo", 0.5, -0.3, 0.8) == pytest.approx(0.04)


@given(h=st.floats(-8, 8), e=st.floats(0.01, 0.45))
@settings(deadline=None, max_examples=50)
def test_robust_labels_are_the_published_loss_and_unbiased_over_flips(h, e):
    rewards, one = pair(h, 0), torch.ones(1, dtype=torch.float64)
    ours = PAIR_LOSSES["sigmoid"](rewards, debiased_preference(one, e)).item()
    right, wrong = math.log1p(math.exp(-h)), math.log1p(math.exp(h))
    assert ours == pytest.approx(((1 - e) * right - e * wrong) / (1 - 2 * e), abs=1e-9)
    flipped = PAIR_LOSSES["sigmoid"](rewards, debiased_preference(1 - one, e)).item()
    assert (1 - e) * ours + e * flipped == pytest.approx(right, abs=1e-9)


def test_conservative_labels_stop_at_their_log_odds_and_ties_stay_ties():
    rewards = pair(math.log(9), 0, grad=True)
    PAIR_LOSSES["sigmoid"](rewards, smoothed_preference(torch.ones(1), 0.1)).sum().backward()
    assert rewards.chosen.grad.item() == pytest.approx(0.0, abs=1e-7)
    assert smoothed_preference(torch.tensor(0.5), 0.2).item() == pytest.approx(0.5)
    assert debiased_preference(torch.tensor(0.5), 0.2).item() == pytest.approx(0.5)


@pytest.mark.parametrize("function", [smoothed_preference, debiased_preference])
@pytest.mark.parametrize("share", [-0.1, 0.5])
def test_shares_of_wrong_labels_outside_their_range_are_refused(function, share):
    with pytest.raises(ValueError, match=r"\[0, 0\.5\)"):
        function(torch.ones(1), share)


def test_divergences_by_hand_and_at_their_limits():
    r = torch.tensor([math.log(2)], dtype=torch.float64)  # u = 2
    assert divergence_reward(r, "reverse_kl").item() == pytest.approx(math.log(2))
    assert divergence_reward(r, "forward_kl").item() == pytest.approx(0.5)  # 1 - 1/u
    assert divergence_reward(r, "js").item() == pytest.approx(
        math.log(2 / 3) + math.log(2)
    )  # log(2u / (1 + u))
    assert divergence_reward(r, "alpha", 0.5).item() == pytest.approx((1 - 2**-0.5) / 0.5)
    assert divergence_reward(r, "alpha", 1.0).item() == pytest.approx(
        divergence_reward(r, "forward_kl").item()
    )
    assert divergence_reward(r, "alpha", 1e-6).item() == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    ("divergence", "slope"), [("reverse_kl", 1), ("forward_kl", 1), ("alpha", 1), ("js", 0.5)]
)
def test_divergences_agree_at_small_rewards_and_never_overflow(divergence, slope):
    r = torch.zeros(1, requires_grad=True)
    out = divergence_reward(r, divergence)
    out.sum().backward()
    assert out.item() == 0
    assert r.grad.item() == pytest.approx(slope)
    assert torch.isfinite(divergence_reward(torch.tensor([-1e4, 1e4]), divergence)).all()


def test_an_unknown_divergence_is_named():
    with pytest.raises(ValueError, match="'kl'"):
        divergence_reward(torch.zeros(1), "kl")


def test_dynamic_beta_follows_the_gap_that_the_label_states():
    # p = sigmoid(2): gap 2, factor 1 + 0.5 (1 - exp(-1)).
    p = torch.tensor([0.5, sigmoid(2.0), 1.0])
    factor = dynamic_beta_factor(p, 0.5)
    assert factor.tolist() == pytest.approx([1.0, 1 + 0.5 * (1 - math.exp(-1)), 1.5])


def test_smoothed_margin_by_hand():
    assert smoothed_margin(torch.tensor([0.3, 0.3]), torch.tensor([0.75, 0.5])).tolist() == pytest.approx(
        [1.5, 0.0]
    )


def test_imitation_pulls_the_chosen_error_down_with_half_of_beta():
    rewards = pair(0.4, -0.2, grad=True)
    loss = imitation_loss(rewards, torch.ones(1))
    loss.sum().backward()
    assert loss.item() == pytest.approx(-0.4)
    assert (rewards.chosen.grad.item(), rewards.rejected.grad.item()) == (-1.0, 0.0)


def official_safeguard(pred, target, mu):
    """The release's lambda of one pair, by automatic differentiation in float64."""
    w, l = (x.detach().double().requires_grad_() for x in pred)  # noqa: E741
    a, b = (w - target[0].double()).square().mean(), (l - target[1].double()).square().mean()
    g_a, g_b = torch.autograd.grad(a, w)[0], torch.autograd.grad(b, l)[0]
    overlap = (g_a * g_b).sum()
    return min(1.0, max(0.0, ((1 - mu) * (g_a * g_a).sum() / overlap).item())) if overlap > 0 else 1.0


@given(seed=st.integers(0, 999), mu=st.sampled_from([0.0, 0.2, 0.9, 1.0]))
@settings(deadline=None, max_examples=25)
def test_the_safeguard_keeps_the_value_and_scales_the_gradient_by_the_official_lambda(seed, mu):
    generator = torch.Generator().manual_seed(seed)
    pred, target = torch.randn(2, 2, 4, 3, 3, generator=generator)
    pred.requires_grad_()
    reference = torch.randn(2, 4, 3, 3, generator=generator)
    delta = error_delta(pred, reference, target)[1:]
    plain = torch.autograd.grad(delta.sum(), pred, retain_graph=True)[0]
    chosen_error, overlap = squared_error(pred.detach(), target)[:1], error_overlap(pred, target)
    guarded = safeguarded_delta(delta, chosen_error, overlap, mu)
    assert guarded.item() == pytest.approx(delta.item())
    scaled = torch.autograd.grad(guarded.sum(), pred)[0]
    torch.testing.assert_close(scaled, official_safeguard(pred, target, mu) * plain, rtol=1e-4, atol=1e-6)


def test_the_safeguard_by_hand():
    # e_w = (1, 0), e_l = (2, 1): |e_w|^2 = 1, overlap 2, lambda at mu 0.5 a quarter; errors apart: 1.
    delta = torch.tensor([0.7], requires_grad=True)
    for overlap, factor in ((1.0, 0.25), (-1.0, 1.0), (0.0, 1.0)):
        (gradient,) = torch.autograd.grad(
            safeguarded_delta(delta, torch.tensor([0.5]), torch.tensor([overlap]), 0.5).sum(), delta
        )
        assert gradient.item() == pytest.approx(factor)


def test_error_overlap_by_hand():
    pred = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    assert error_overlap(pred, torch.zeros(2, 2)).tolist() == [1.0]


def test_historic_bug_log_sigmoid_of_a_mean():
    margins = PairRewards(torch.tensor([4.0, -4.0]), torch.zeros(2), torch.tensor([4.0, -4.0]))
    ours = PAIR_LOSSES["sigmoid"](margins, torch.ones(2)).mean()
    assert ours.item() == pytest.approx(-F.logsigmoid(torch.tensor([4.0, -4.0])).mean().item())
    assert ours.item() > math.log(2) + 1
