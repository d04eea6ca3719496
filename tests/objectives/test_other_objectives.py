"""Reference-free, unpaired, listwise, transition and reward-aware objectives, by hand and against official formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from diffalign.objectives import dspo, listwise, reference_free, rewarded, transitions, unpaired
from diffalign.objectives.pairwise import dpo_loss, error_delta

ONE = torch.ones(1)


def official_mapo(w, l, beta, s=0.5, steps=1000):  # noqa: E741
    """The released computation, in float64."""
    w, l = w.double(), l.double()  # noqa: E741
    odds = s * w / (torch.exp(s * w) - 1) - s * l / (torch.exp(s * l) - 1)
    return w - beta * F.logsigmoid(odds * steps)


@given(w=st.floats(1e-3, 2), l=st.floats(1e-3, 2))
@settings(deadline=None, max_examples=40)
def test_mapo_equals_its_release(w, l):  # noqa: E741
    w, l = torch.tensor([w]), torch.tensor([l])  # noqa: E741
    ours = reference_free.mapo_loss(w, l, ONE, beta=0.1).double()
    torch.testing.assert_close(ours, official_mapo(w, l, 0.1), rtol=1e-4, atol=1e-4)


def test_mapo_margin_has_slope_minus_250_and_is_finite_at_zero():
    error = torch.zeros(1, requires_grad=True)
    margin = reference_free.mapo_margin(error, torch.zeros(1))
    (slope,) = torch.autograd.grad(margin.sum(), error)
    assert margin.item() == 0
    assert slope.item() == pytest.approx(-250.0)
    error = torch.tensor([0.02], requires_grad=True)
    (slope,) = torch.autograd.grad(reference_free.mapo_margin(error, torch.zeros(1)).sum(), error)
    assert slope.item() == pytest.approx(-249.2, abs=0.1)


def test_mapo_of_the_paper_by_hand():
    # l_w = log 2: phi = log 2; l_l = log 4: phi = log 4 / 3; beta 2.
    w, l = torch.tensor([math.log(2)]), torch.tensor([math.log(4)])  # noqa: E741
    margin = math.log(2) ** 2 - (math.log(4) / 3) ** 2
    expected = math.log(2) + math.log1p(math.exp(-margin)) / 2
    assert reference_free.mapo_paper_loss(w, l, ONE, beta=2.0).item() == pytest.approx(expected)


def test_simpo_and_cpo_by_hand():
    # -(beta / 2) (l_w - l_l) = -5 (0.1 - 0.3) = 1; minus gamma 0.4; plus 0.5 * 5 * 0.1.
    w, l = torch.tensor([0.1]), torch.tensor([0.3])  # noqa: E741
    simpo = reference_free.simpo_loss(w, l, ONE, beta=10.0, gamma=0.4)
    assert simpo.item() == pytest.approx(math.log1p(math.exp(-0.6)))
    cpo = reference_free.simpo_loss(w, l, ONE, beta=10.0, sft_weight=0.5)
    assert cpo.item() == pytest.approx(math.log1p(math.exp(-1)) + 0.25)
    half = reference_free.simpo_loss(w, l, 0.5 * ONE, beta=10.0, gamma=0.4)
    assert half.item() == pytest.approx((math.log1p(math.exp(-0.6)) + math.log1p(math.exp(1.4))) / 2)


def test_imitation_weights_are_exponential_rewards_over_the_pair():
    # Rewards 1 and 0 at temperature 0.5: weights e^2 and 1.
    p, w, l = torch.sigmoid(ONE), torch.tensor([0.3]), torch.tensor([0.7])  # noqa: E741
    expected = (math.e**2 * 0.3 + 0.7) / (math.e**2 + 1)
    assert reference_free.imitation_error(w, l, p, 0.5).item() == pytest.approx(expected, rel=1e-5)
    assert reference_free.imitation_error(w, l, ONE).item() == pytest.approx(0.3)


def official_kto(g, sign, kl, beta, utility):
    """The release's loss of one picture."""
    a = sign * beta * (g - kl)
    h = {
        "kahneman_tversky": 1 / (1 + math.exp(-a)),
        "loss_averse": -math.log1p(math.exp(-a)),
        "risk_seeking": math.log1p(math.exp(a)),
    }[utility]
    return 1 - h


@pytest.mark.parametrize("utility", unpaired.UTILITIES)
@pytest.mark.parametrize("sign", [1, -1])
def test_kto_equals_its_release(utility, sign):
    advantage = torch.tensor([100.0 * (0.01 - 0.004)])
    ours = unpaired.kto_loss(advantage, torch.tensor([(1 + sign) / 2]), utility).item()
    assert ours == pytest.approx(official_kto(0.01, sign, 0.004, 100.0, utility), rel=1e-5)


def test_kto_weights_classes_and_bce_is_its_loss_averse_form():
    a, label = torch.tensor([0.3, 0.3]), torch.tensor([1.0, 0.0])
    plain = unpaired.kto_loss(a, label)
    heavy = unpaired.kto_loss(a, label, desirable_weight=2.0, undesirable_weight=0.5)
    torch.testing.assert_close(heavy, plain * torch.tensor([2.0, 0.5]))
    bce = F.binary_cross_entropy_with_logits(a, label, reduction="none")
    torch.testing.assert_close(unpaired.kto_loss(a, label, "loss_averse"), bce + 1)


def test_kto_baseline_is_clamped_and_detached():
    gains = torch.tensor([0.02, 0.04], requires_grad=True)
    assert unpaired.kto_baseline(gains.sum(), 2).item() == pytest.approx(0.03)
    assert not unpaired.kto_baseline(gains.sum(), 2).requires_grad
    assert unpaired.kto_baseline(-gains.sum(), 2).item() == 0


def official_dspo(policy, reference, target, beta, sdxl):
    """The release, in float64, for chosen rows then rejected rows."""
    losses = (policy - target).square().flatten(1).mean(1)
    frozen = (reference - target).square().flatten(1).mean(1)
    inside = -0.5 * beta * ((losses[:2] - losses[2:]) - (frozen[:2] - frozen[2:]))
    change = (policy - reference)[:2]
    weight = (1 - torch.sigmoid(inside))[:, None]
    if not sdxl:
        return ((policy - target)[:2] - beta * weight * change).square().mean(1).mean(), inside
    if change.square().mean(1).mean() >= 0.1:
        return (weight * change).square().mean(1).mean(), inside
    return weight.square().mean(), inside


@pytest.mark.parametrize(("scale", "sdxl"), [(0.1, True), (1.0, True), (0.1, False)])
def test_dspo_equals_its_release(scale, sdxl):
    generator = torch.Generator().manual_seed(0)
    target, reference, step = torch.randn(3, 4, 6, generator=generator)
    policy, beta = reference + scale * step, 2.0 if sdxl else 0.3
    expected, inside = official_dspo(policy.double(), reference.double(), target.double(), beta, sdxl)
    margin = (
        -0.5
        * beta
        * (error_delta(policy, reference, target)[:2] - error_delta(policy, reference, target)[2:])
    )
    torch.testing.assert_close(margin.double(), inside, rtol=1e-4, atol=1e-5)
    p, r, y = policy[:2], reference[:2], target[:2]
    ours = dspo.dspo_squared_loss(p, r, margin) if sdxl else dspo.dspo_score_loss(p, r, y, margin, beta)
    assert ours.mean().item() == pytest.approx(expected.item(), rel=1e-4)


def test_dspo_at_its_published_beta_is_fine_tuning():
    generator = torch.Generator().manual_seed(0)
    target, reference, step = torch.randn(3, 2, 64, generator=generator)
    policy = (reference + 0.05 * step).requires_grad_()
    score = dspo.dspo_score_loss(policy, reference, target, torch.zeros(2), 0.001).sum()
    plain = (policy - target).square().mean(1).sum()
    gradients = [torch.autograd.grad(loss, policy)[0].flatten() for loss in (score, plain)]
    assert F.cosine_similarity(*gradients, dim=0).item() > 0.999


def test_plackett_luce_is_the_probability_of_the_order():
    scores = torch.tensor([[0.3, -1.0, 1.2]])
    total = 0.0
    for order in itertools.permutations(range(3)):
        values = torch.zeros(1, 3)
        values[0, list(order)] = torch.tensor([3.0, 2.0, 1.0])
        total += math.exp(-listwise.plackett_luce_loss(scores, values).item())
    assert total == pytest.approx(1.0, rel=1e-5)
    pair = listwise.plackett_luce_loss(scores[:, :2], torch.tensor([[1.0, 0.0]]))
    assert pair.item() == pytest.approx(dpo_loss(torch.tensor([1.3])).item())


def test_lipo_lambda_by_hand():
    # Scores (1, 0): ranks 1, 2. Values (0, 1): gain difference 1, discount 1/log 2 - 1/log 3.
    scores, values = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    weight = abs(1 / math.log(2) - 1 / math.log(3))
    expected = weight * math.log1p(math.exp(1.0))
    assert listwise.lipo_lambda_loss(scores, values).item() == pytest.approx(expected)
    assert listwise.lipo_lambda_loss(scores, torch.ones(1, 2)).item() == 0
    graded = torch.tensor([[0.5, 1.0]])
    assert listwise.lambda_weights(scores, graded)[0, 1, 0].item() == pytest.approx(weight * (2 - 2**0.5))


def test_softmax_matching_is_stationary_at_tilted_scores():
    values = torch.tensor([[0.2, 0.9, -0.4]])
    scores = (values / 0.3 + 5.0).requires_grad_()
    listwise.softmax_matching_loss(scores, values, 0.3).sum().backward()
    assert scores.grad.abs().max().item() < 1e-6


def test_all_pairs_of_a_group_by_gap():
    better = listwise.all_pairs(torch.tensor([[1.0, 0.4, 0.0]]), 0.5)[0]
    assert better.nonzero().tolist() == [[0, 1], [0, 2]]


def test_modpo_equals_its_release():
    # w = (0.6, 0.4), chosen: (1 / 0.6)(0.9 - 0.4 * 2), rejected: (1 / 0.6)(0.1 - 0.4 * 0.5).
    margin = rewarded.modpo_margin(
        torch.tensor([0.9 - 0.1]), torch.tensor([[2 - 0.5]]), torch.tensor([0.6, 0.4])
    )
    assert margin.item() == pytest.approx((0.9 - 0.8) / 0.6 - (0.1 - 0.2) / 0.6)
    with pytest.raises(ValueError, match="one more weight"):
        rewarded.modpo_margin(torch.zeros(1), torch.zeros(1, 2), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="above 0"):
        rewarded.modpo_margin(torch.zeros(1), torch.zeros(1, 1), torch.tensor([0.0, 1.0]))


def test_reward_gap_regression_contains_ipo():
    assert rewarded.reward_gap_loss(torch.tensor([1.5]), torch.tensor([0.5])).item() == pytest.approx(1.0)


def test_calibrated_rewards_are_win_rates_in_the_group():
    wins = rewarded.calibrated_rewards(torch.tensor([[0.0, math.log(3), 0.0]]))
    assert wins[0].tolist() == pytest.approx([(0.25 + 0.5) / 2, 0.75, (0.25 + 0.5) / 2])
    assert wins.mean().item() == pytest.approx(0.5)


def test_harmonic_reward_and_exponential_weights_by_hand():
    assert rewarded.harmonic_reward(torch.tensor(0.5), torch.tensor(0.8), 0.3).item() == pytest.approx(
        1 / (0.3 / 0.5 + 0.7 / 0.8)
    )
    weights = rewarded.exponential_weights(torch.tensor([0.0, math.log(3)]))
    assert weights.tolist() == pytest.approx([0.5, 1.5])


def test_lambda_harmonic_rpo_is_dpo_with_beta_two_and_fine_tuning():
    # kappa = (2.0 - 1.5) - (1.0 - 1.2) = 0.7 and l_R = 1.5, as the release states them.
    from diffalign.objectives.pair_losses import PAIR_LOSSES, PairRewards, imitation_loss

    delta_w, delta_l = torch.tensor([-0.5], requires_grad=True), torch.tensor([0.2])
    rewards = PairRewards(-delta_w, -delta_l, -(delta_w - delta_l))
    loss = PAIR_LOSSES["sigmoid"](rewards, ONE) + imitation_loss(rewards, ONE)
    loss.sum().backward()
    kappa = 0.7
    # d/dl_R of l_R - log sigmoid(kappa) is 1 + sigmoid(-kappa).
    assert delta_w.grad.item() == pytest.approx(1 + 1 / (1 + math.exp(kappa)))


def gaussian_step(seed=0, batch=3):
    generator = torch.Generator().manual_seed(seed)
    mean, change, z_w, z_l = torch.randn(4, batch, 5, generator=generator)
    std = torch.tensor([0.3, 0.5, 0.9])[:batch]
    reference = mean + 0.1 * change
    x_w, x_l = (reference + std[:, None] * z for z in (z_w, z_l))
    return x_w, x_l, mean, reference, std


def test_step_log_ratio_is_the_gaussian_one():
    x, _, mean, reference, std = gaussian_step()
    ours = transitions.step_log_ratio(x, mean, reference, std)
    exact = Normal(mean.double(), std[:, None].double()).log_prob(x.double())
    exact = exact - Normal(reference.double(), std[:, None].double()).log_prob(x.double())
    torch.testing.assert_close(ours.double(), exact.mean(1), rtol=1e-4, atol=1e-6)


def test_the_shared_start_margin_equals_the_difference_of_two_log_ratios():
    x_w, x_l, mean, reference, std = gaussian_step()
    both = transitions.step_log_ratio(x_w, mean, reference, std) - transitions.step_log_ratio(
        x_l, mean, reference, std
    )
    torch.testing.assert_close(transitions.shared_start_margin(x_w, x_l, mean, reference, std), both)


def test_a_step_loss_is_the_dpo_form_with_another_beta():
    """`eps* = eps_sampler + (std / c) z` is the target; means are linear in the predicted noise."""
    generator = torch.Generator().manual_seed(3)
    eps, frozen, sampler, z = torch.randn(4, 2, 7, generator=generator).double()
    c, std, beta = -0.4, torch.tensor([0.2, 0.6]).double(), 0.1
    x_prev = c * sampler + std[:, None] * z
    ratio = transitions.step_log_ratio(x_prev, c * eps, c * frozen, std)
    target = sampler + std[:, None] / c * z
    delta = (eps - target).square().mean(1) - (frozen - target).square().mean(1)
    scale = transitions.elbo_beta(beta, torch.tensor(c), std)
    torch.testing.assert_close(beta * ratio.double(), -0.5 * scale.double() * delta, rtol=1e-4, atol=1e-6)


def test_d3po_loss_is_confined_and_has_no_gradient_outside_the_band():
    far = torch.tensor([5.0, -5.0, 0.02], requires_grad=True)
    losses = transitions.clipped_ratio_loss(far, -far.detach(), torch.ones(3), beta=0.1)
    limit = 0.1 * (math.log(1.1) - math.log(0.9))
    assert losses[0].item() == pytest.approx(math.log1p(math.exp(-limit)))
    assert losses[1].item() == pytest.approx(math.log1p(math.exp(limit)))
    losses.sum().backward()
    assert far.grad[:2].tolist() == [0.0, 0.0]
    assert far.grad[2].item() < 0
    assert round(losses[0].item(), 4) == 0.6832
    assert round(losses[1].item(), 4) == 0.7032


def test_candidates_are_paired_when_their_softmax_scores_differ_enough():
    # softmax of (ln 3, 0) differs by 0.75 - 0.25.
    scores = torch.tensor([[0.0, math.log(3)], [0.1, 0.0]])
    best, worst, kept = transitions.scored_pairs(scores, 0.45)
    assert (best.tolist(), worst.tolist(), kept.tolist()) == ([1, 0], [0, 1], [True, False])
