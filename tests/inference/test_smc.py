"""Feynman-Kac maths: weights, resampling, potentials, and a mixture of two Gaussians with a known posterior."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from diffalign.inference.smc import (
    Particles,
    adaptive_strength,
    effective_size,
    geometric_strength,
    log_mean_weight,
    multinomial,
    normalised,
    polynomial_strength,
    resample,
    start_particles,
    systematic,
    weigh,
)

INF = math.inf


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_weights_by_hand():
    """Weights 1, 1, 2: normalised 1/4, 1/4, 1/2, effective number 1 / (1/16 + 1/16 + 1/4) = 8/3, log mean log(4/3)."""
    logs = row(0, 0, math.log(2))
    torch.testing.assert_close(normalised(logs), row(0.25, 0.25, 0.5))
    assert effective_size(logs).item() == pytest.approx(8 / 3)
    assert log_mean_weight(logs).item() == pytest.approx(math.log(4 / 3))


def test_no_trap_at_1e10():
    """At strength 10 rewards of 2.5, 3 and 3.5 all hit the release's clamp of 1e10 and tie; here they do not."""
    particles = weigh(start_particles(1, 3), row(2.5, 3.0, 3.5), 10.0, "max")
    weights = normalised(particles.log_weights)
    assert (weights[0, 2] / weights[0, 1]).item() == pytest.approx(math.exp(5))
    assert (weights[0, 1] / weights[0, 0]).item() == pytest.approx(math.exp(5))
    far = normalised(weigh(start_particles(1, 3), row(2502.5, 2503.0, 2503.5), 10.0, "max").log_weights)
    torch.testing.assert_close(far, weights)


@pytest.mark.parametrize("dead", [-INF, math.nan])
def test_particles_without_weight(dead):
    torch.testing.assert_close(normalised(row(0.0, dead, 0.0)), row(0.5, 0, 0.5))
    torch.testing.assert_close(normalised(row(dead, dead)), row(0.5, 0.5))
    assert log_mean_weight(row(0.0, dead)).item() == pytest.approx(math.log(0.5))


def test_potentials_by_hand():
    """Rewards 1, 3, 2 along a path at strength 2; the last of max, add and rt is what is missing to 2 * 2."""
    expected = {"diff": (2, 4, -2), "max": (2, 6, -4), "add": (2, 8, -6), "rt": (2, 6, -4)}
    for name, gains in expected.items():
        particles, before = start_particles(1, 1), 0.0
        for step, (reward, gain) in enumerate(zip((1.0, 3.0, 2.0), gains, strict=True)):
            particles = weigh(particles, row(reward), 2.0, name, final=step == 2)
            assert particles.log_weights.item() - before == pytest.approx(gain), name
            before = particles.log_weights.item()
        # Weights of steps without resampling are kept: the product is exp(2 * 2) for every potential.
        assert particles.log_weights.item() == pytest.approx(4.0)


def test_maximum_takes_negative_rewards_seriously():
    """A start of 0 would make max(0, -5) and max(0, -1) equal."""
    particles = weigh(start_particles(1, 2), row(-5.0, -1.0), 1.0, "max")
    assert particles.log_weights.tolist() == [[-5.0, -1.0]]


def test_strengths_that_rise_still_end_at_the_posterior():
    particles = start_particles(2, 3)
    rewards = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step, found in enumerate(rewards):
        strength = 3.0 * polynomial_strength(step, 4, 2)
        particles = weigh(particles, found, torch.tensor([strength, strength]), final=step == 3)
    torch.testing.assert_close(particles.log_weights, 3 * rewards[-1])


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("name", ["diff", "max", "add", "rt"])
def test_a_failed_reward_ends_its_particle(name, bad):
    particles = weigh(start_particles(1, 2), row(1.0, bad), 1.0, name)
    particles = weigh(particles, row(1.0, 9.0), 1.0, name)
    particles = weigh(particles, row(1.0, 9.0), 1.0, name, final=True)
    assert normalised(particles.log_weights).tolist() == [[1.0, 0.0]]
    taken, index, _ = resample(particles, row(0.5, 0.5), threshold=2.0)
    assert index.tolist() == [[0, 0]]
    assert taken.log_weights.tolist() == [[0.0, 0.0]]


def test_systematic_by_hand():
    """Weights .5, .25, .25 of four teeth at u = 0.4: .1, .35, .6, .85 over .5, .75, 1."""
    assert systematic(row(0.5, 0.25, 0.25, 0.0), torch.tensor([0.4], dtype=torch.float64)).tolist() == [
        [0, 0, 1, 2]
    ]
    assert systematic(row(0.0, 1.0), torch.tensor([0.0], dtype=torch.float64)).tolist() == [[1, 1]]


def test_systematic_counts_are_floor_or_ceiling():
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(200, 8, generator=generator, dtype=torch.float64)
    weights /= weights.sum(1, keepdim=True)
    index = systematic(weights, torch.rand(200, generator=generator, dtype=torch.float64))
    counts = torch.nn.functional.one_hot(index, 8).sum(1)
    assert ((counts - 8 * weights).abs() < 1 + 1e-9).all()


def test_multinomial_by_hand_and_on_average():
    assert multinomial(row(0.5, 0.0, 0.5), row(0.9, 0.1, 0.5)).tolist() == [[0, 2, 2]]
    uniform = torch.rand(1, 40000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.zeros(1, 40000, dtype=torch.float64)
    weights[0, [3, 7]] = torch.tensor([0.2, 0.8], dtype=torch.float64)
    index = multinomial(weights, uniform)
    assert set(index.unique().tolist()) == {3, 7}
    assert (index == 7).double().mean().item() == pytest.approx(0.8, abs=4 * 0.4 / 200)


def test_the_last_particle_of_weight_zero_is_never_drawn():
    weights = torch.tensor([[0.3, 0.7, 0.0]])
    assert multinomial(weights, torch.tensor([[0.99999999] * 3], dtype=torch.float64)).max() == 1


def test_resampling_only_where_the_effective_number_is_low():
    """1.47 of 4 and 4 of 4: the first prompt is resampled, the second keeps its weights."""
    logs = torch.tensor([[0.0, 0.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    logs[0, 2] = math.log(12)
    particles = Particles(logs, logs * 10, logs * 100, torch.arange(4).repeat(2, 1))
    taken, index, done = resample(particles, torch.full((2, 4), 0.5, dtype=torch.float64))
    assert done.tolist() == [True, False]
    # Teeth at .125, .375, .625, .875 over 1/15, 2/15, 14/15, 1.
    assert index.tolist() == [[1, 2, 2, 2], [0, 1, 2, 3]]
    assert taken.log_weights.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert taken.ancestors.tolist() == [[1, 2, 2, 2], [0, 1, 2, 3]]
    assert taken.roots.tolist() == [2, 4]
    # All that belongs to a particle goes with it.
    assert taken.carried[0].tolist() == [0, *[math.log(12) * 10] * 3]
    assert taken.spent[0].tolist() == [0, *[math.log(12) * 100] * 3]


def test_ancestry_over_two_resamplings():
    particles = start_particles(1, 3)
    for logs in (row(-INF, 0, 0), row(0, 0, -INF)):
        particles = Particles(logs, particles.carried, particles.spent, particles.ancestors)
        particles, _, _ = resample(particles, row(0.5, 0.5, 0.5), threshold=2.0)
    # Teeth at 1/6, 1/2, 5/6 over weights 0, 1/2, 1/2: 1, 2, 2 (1/2 belongs to the next); then 0, 1, 1 of those.
    assert particles.ancestors.tolist() == [[1, 2, 2]]
    assert particles.roots.tolist() == [2]


def test_schedules():
    assert [polynomial_strength(i, 4) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert polynomial_strength(1, 4, 2) == 0.25
    assert geometric_strength(0, 0.1) == 0
    assert geometric_strength(2, 0.1) == pytest.approx(0.21)
    assert geometric_strength(100, 0.1) == 1


def test_adaptive_strength_keeps_the_effective_number():
    """Two particles with rewards 0 and 1: weights (1, e^s); 1 / sum w^2 = 1.6 at e^s = 3 (1/4, 3/4 -> 16/10)."""
    found = adaptive_strength(row(0, 0), row(0, 1), torch.zeros(1), 5.0, 0.8)
    assert found.item() == pytest.approx(math.log(3), abs=1e-9)
    assert adaptive_strength(row(0, 0), row(0, 1), torch.zeros(1), 0.5, 0.8).item() == 0.5
    later = adaptive_strength(row(0, 0), row(0, 1), torch.tensor([2.0]), 5.0, 0.8)
    assert later.item() == pytest.approx(2 + math.log(3), abs=1e-9)


MEANS = torch.tensor([-2.0, 2.0], dtype=torch.float64)
SHARES = torch.tensor([0.7, 0.3], dtype=torch.float64)
DEVIATION = 0.5
# x_t = alpha x_0 + sigma eps from almost pure noise to none.
ANGLES = torch.linspace(0.98, 0.0, 9, dtype=torch.float64) * math.pi / 2


def posterior(x, alpha, sigma):
    """p(x_0 | x_t) of the mixture: probabilities `[B, K, 2]`, means `[B, K, 2]` and variance of the two Gaussians."""
    total = alpha**2 * DEVIATION**2 + sigma**2
    apart = x[..., None] - alpha * MEANS
    mean = MEANS + alpha * DEVIATION**2 / total * apart
    return torch.softmax(SHARES.log() - apart**2 / (2 * total), -1), mean, DEVIATION**2 * sigma**2 / total


def exact_step(x, now, then, generator):
    """A draw of x_s given x_t, s < t, through an exact draw of x_0: no error of discretisation at any step size."""
    chances, means, variance = posterior(x, torch.cos(now), torch.sin(now))
    mode = (torch.rand(x.shape, generator=generator, dtype=x.dtype) > chances[..., 0]).long()
    clean = means.gather(-1, mode[..., None])[..., 0] + variance.sqrt() * torch.randn(
        x.shape, generator=generator, dtype=x.dtype
    )
    # q(x_s | x_t, x_0) of a variance-preserving process.
    ratio = torch.cos(now) / torch.cos(then)
    kept = (torch.sin(now) ** 2 - ratio**2 * torch.sin(then) ** 2) / torch.sin(now) ** 2
    mean = ratio * torch.sin(then) ** 2 / torch.sin(now) ** 2 * x + torch.cos(then) * kept * clean
    deviation = torch.sin(then) * kept.sqrt()
    return mean + deviation * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def steered(
    strength, potential="diff", threshold=0.5, prompts=8, count=4000, scheme="systematic", looks=range(9)
):
    """Final samples `[B, K]` and weights; the reward is x itself, at first that of the denoiser's E[x_0 | x_t]."""
    generator = torch.Generator().manual_seed(0)
    particles = start_particles(prompts, count)
    chance = torch.rand(prompts, count, generator=generator, dtype=torch.float64)
    clean = MEANS[(chance > SHARES[0]).long()]
    clean = clean + DEVIATION * torch.randn(prompts, count, generator=generator, dtype=torch.float64)
    noise = torch.randn(prompts, count, generator=generator, dtype=torch.float64)
    x = torch.cos(ANGLES[0]) * clean + torch.sin(ANGLES[0]) * noise
    resampled = 0
    for step, (now, then) in enumerate(pairwise(ANGLES)):
        x = exact_step(x, now, then, generator)
        final = bool(then == 0)
        if not final and step not in looks:
            continue
        chances, means, _ = posterior(x, torch.cos(then), torch.sin(then))
        seen = x if final else (chances * means).sum(-1)
        particles = weigh(particles, seen, strength, potential, final=final)
        uniform = torch.rand(prompts, count, generator=generator, dtype=torch.float64)
        if not final:
            particles, index, done = resample(particles, uniform, threshold=threshold, scheme=scheme)
            x, resampled = x.gather(1, index), resampled + int(done.sum())
    return x, normalised(particles.log_weights), resampled


def tilted(strength):
    """p(x) exp(s x): mode k has weight share_k exp(s mu_k + s^2 d^2 / 2) and mean mu_k + s d^2."""
    chances = torch.softmax(SHARES.log() + strength * MEANS, 0)
    means = MEANS + strength * DEVIATION**2
    return chances[1].item(), (chances * means).sum().item()


@pytest.mark.parametrize(
    ("potential", "looks"), [("diff", range(9)), ("max", [1, 4]), ("add", [1, 4]), ("rt", [1, 4])]
)
def test_two_modes_reach_the_tilted_posterior(potential, looks):
    """Strength 0.5: the right mode holds .3 e / (.3 e + .7 / e) = 76 % instead of 30 %.

    All but diff overshoot on the way and are set right at the end, which takes particles that are still there: they are
    looked at twice on the way.
    """
    x, weights, resampled = steered(0.5, potential, threshold=2.0, looks=looks)
    share, mean = tilted(0.5)
    assert share == pytest.approx(0.7600, abs=1e-4)
    assert resampled == 8 * (7 if potential == "diff" else 2)
    assert (weights * (x > 0)).sum(1).mean().item() == pytest.approx(share, abs=0.02)
    assert (weights * x).sum(1).mean().item() == pytest.approx(mean, abs=0.06)
    right = weights * (x > 0)
    within = (right * x).sum() / right.sum()
    assert within.item() == pytest.approx(2 + 0.5 * 0.25, abs=0.03)


def test_without_resampling_it_is_importance_sampling():
    x, weights, resampled = steered(0.5, threshold=0.0)
    assert resampled == 0
    torch.testing.assert_close(weights, torch.softmax(0.5 * x, 1))
    assert (weights * (x > 0)).sum(1).mean().item() == pytest.approx(0.76, abs=0.02)


def test_resampling_by_either_scheme_at_every_step():
    for scheme in ("systematic", "multinomial"):
        x, weights, resampled = steered(1.0, threshold=2.0, scheme=scheme)
        assert resampled == 8 * (len(ANGLES) - 2)
        share, mean = tilted(1.0)
        assert (weights * (x > 0)).sum(1).mean().item() == pytest.approx(share, abs=0.02)
        assert (weights * x).sum(1).mean().item() == pytest.approx(mean, abs=0.06)


def test_strong_tilts_beyond_the_clamp_of_the_release():
    """Strength 15: weights reach e^45 or 3e19, where the release's are all 1e10. The mode's mean is 2 + 15 / 4 = 5.75,
    which few samples come near, so only the direction is checked: far above what ties could give."""
    x, weights, _ = steered(15.0, prompts=4, count=8000)
    assert (weights * (x > 0)).sum(1).mean().item() > 0.999
    tie = torch.where(x > 23 / 15, 1.0, 0.0)
    assert ((weights * x).sum(1) > (tie * x).sum(1) / tie.sum(1) + 0.3).all()
