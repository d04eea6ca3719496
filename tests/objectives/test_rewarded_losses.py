"""MODPO and lambda-harmonic RPO against their releases in float64, by hand; Flow-DPO's two betas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.objectives.pairwise import dpo_loss, dpo_margin
from diffalign.objectives.rewarded import harmonic_reward, harmonic_rpo_loss, modpo_margin
from diffalign.process import Process
from diffalign.trainers.dpo import beta_weight

error = st.floats(0.01, 0.5)


def one(x: float) -> torch.Tensor:
    return torch.tensor([x], dtype=torch.float64)


def test_modpo_equals_its_release():
    """Per picture, (beta log-ratio - rewards . w_rest) / w_0, then the difference; sigmoid loss."""
    generator = torch.Generator().manual_seed(0)
    ratio_w, ratio_l = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    reward_w, reward_l = torch.randn(2, 5, 2, generator=generator, dtype=torch.float64)
    w, beta = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.1
    chosen = (beta * ratio_w - reward_w @ w[1:]) / w[0]
    rejected = (beta * ratio_l - reward_l @ w[1:]) / w[0]
    ours = dpo_loss(modpo_margin(beta * (ratio_w - ratio_l), reward_w - reward_l, w))
    torch.testing.assert_close(ours, -F.logsigmoid(chosen - rejected))


def test_modpo_by_hand():
    # (0.4 - 0.25 * 2) / 0.75 = -0.1333: the other reward already wants more than the policy gives.
    margin = modpo_margin(
        one(0.4), torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([0.75, 0.25]).double()
    )
    assert margin.item() == pytest.approx(-0.1 / 0.75)
    alone = modpo_margin(one(0.4), torch.zeros(1, 0, dtype=torch.float64), torch.ones(1).double())
    assert alone.item() == pytest.approx(0.4)


def official_rpo(policy, reference, label, beta):
    """The SDXL script of the release; rows are photograph and sample."""
    kl_diff = (reference[0] - policy[0]) - (reference[1] - policy[1])
    preference = -(label * F.logsigmoid(beta * kl_diff) + (1 - label) * F.logsigmoid(-beta * kl_diff))
    return policy[0] + preference


@given(p=st.tuples(error, error), r=st.tuples(error, error), label=st.floats(0, 1), beta=st.floats(0.1, 100))
@settings(deadline=None, max_examples=40)
def test_harmonic_rpo_equals_its_release(p, r, label, beta):
    policy, reference = ([one(x) for x in values] for values in (p, r))
    deltas = [a - b for a, b in zip(policy, reference, strict=True)]
    ours = harmonic_rpo_loss(policy[0], *deltas, one(label), beta)
    torch.testing.assert_close(ours, official_rpo(policy, reference, one(label), beta))


def test_harmonic_rpo_by_hand_and_as_a_dpo_margin():
    # k = 0.03 - (-0.01) = 0.04, beta 25: margin 1; y = 0.75; the photograph's error counts twice.
    ours = harmonic_rpo_loss(one(0.2), one(-0.01), one(0.03), one(0.75), 25.0, 2.0)
    expected = 0.4 + 0.75 * math.log1p(math.exp(-1)) + 0.25 * math.log1p(math.exp(1))
    assert ours.item() == pytest.approx(expected)
    as_dpo = dpo_loss(dpo_margin(one(-0.01), one(0.03), 50.0), one(0.75))
    assert ours.item() - 0.4 == pytest.approx(as_dpo.item())


def test_the_photograph_is_imitated_even_where_the_sample_is_preferred():
    photo = one(0.2).requires_grad_()
    harmonic_rpo_loss(photo, photo - 0.2, one(0.0), one(0.0), 1e-6).sum().backward()
    assert photo.grad.item() == pytest.approx(1.0, abs=1e-5)


def test_the_harmonic_reward_is_ruled_by_the_worse_similarity():
    # 1 / (0.3 / 0.9 + 0.7 / 0.5) = 0.5769; at share 0 alignment alone.
    assert harmonic_reward(one(0.9), one(0.5), 0.3).item() == pytest.approx(1 / (0.3 / 0.9 + 1.4))
    assert harmonic_reward(one(0.9), one(0.5), 0.0).item() == pytest.approx(0.5)
    assert harmonic_reward(one(0.9), one(0.01), 0.5).item() < 0.02


def test_flow_dpo_in_theory_and_as_used():
    """Errors of the velocity 0.4, 0.1 against reference 0.3, 0.2 at t = 0.25: constant beta, and beta (1 - t)^2."""
    t, flow = torch.tensor([0.25]), Process("flow")
    for weighting, factor in (("constant", 1.0), ("noise_space", 0.75**2)):
        weight = beta_weight(flow, t, weighting)
        margin = dpo_margin((one(0.1) - one(0.2)) * weight, (one(0.4) - one(0.3)) * weight, 100.0)
        assert margin.item() == pytest.approx(50 * 0.2 * factor)


def test_the_theoretical_beta_is_the_error_of_the_noise():
    """x_t and a velocity v give the noise x_t + (1 - t) v, so its squared error is (1 - t)^2 that of v."""
    flow, t = Process("flow"), torch.tensor([0.6])
    x0, eps, wrong = torch.randn(3, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    x_t, v = flow.noise(x0, eps, t), flow.target(x0, eps, t)
    noise_error = (flow.to_eps(v + wrong, x_t, t) - eps).square().mean()
    assert noise_error.item() == pytest.approx(0.4**2 * wrong.square().mean().item(), rel=1e-4)
