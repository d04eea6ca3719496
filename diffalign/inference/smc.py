"""Sequential Monte Carlo along a sampling run: weights, resampling, potentials, tempering. Tensors in, tensors out.

Feynman-Kac steering (Singhal et al. 2025, arXiv 2501.06848): K particles per prompt go through the same steps; at
some of them each is weighted by a potential G of its reward so far, and particles are drawn anew in proportion. If
the potentials of a path multiply to `exp(strength r(x_0))`, the weighted particles are a sample of `p(x_0)
exp(strength r(x_0))`. Tempering: Kim et al. 2025 (DAS), arXiv 2501.05803.

Weights are logarithms all the way, and the greatest is subtracted before an exponential is taken: the release's
`clamp(exp(strength r), 0, 1e10)` makes all particles equal whose `strength r` is above 23. Weights of steps without
resampling are kept and multiplied, where the release forgets them, and with them the posterior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

PotentialName = Literal["diff", "max", "add", "rt"]
Resampling = Literal["systematic", "multinomial"]


@dataclass(frozen=True)
class Particles:
    """What is known of K particles of each of B prompts beside their latents; everything is resampled together.

    Fields:
        log_weights: `[B, K]`, since the last resampling; not normalised. carried: `[B, K]`, what the potential
            remembers of rewards. spent: `[B, K]`, log-potentials of the path so far. ancestors: `[B, K]`, the
            particle of the start from which each descends.
    """

    log_weights: Tensor
    carried: Tensor
    spent: Tensor
    ancestors: Tensor

    @property
    def roots(self) -> Tensor:
        """How many particles of the start have descendants, `[B]`; 1: all pictures are of one lineage."""
        count = self.ancestors.shape[1]
        return (self.ancestors[:, :, None] == torch.arange(count, device=self.ancestors.device)).any(1).sum(1)

    def take(self, index: Tensor) -> Particles:
        """Particles `index` `[B, K]` of each prompt, with all they carry."""
        return Particles(*(getattr(self, field.name).gather(1, index) for field in fields(self)))


def start_particles(prompts: int, count: int, dtype: torch.dtype = torch.float64) -> Particles:
    """K = `count` equal particles for each of B = `prompts`."""
    zeros = torch.zeros(prompts, count, dtype=dtype)
    return Particles(zeros, torch.full_like(zeros, torch.nan), zeros, torch.arange(count).repeat(prompts, 1))


def weigh(
    particles: Particles,
    rewards: Tensor,
    strength: float | Tensor,
    potential: PotentialName = "diff",
    *,
    final: bool = False,
) -> Particles:
    """Multiply the potentials of a step into the weights.

    `diff`: `exp(s r - s' r')` of this weighting and the one before, so that what is spent is always `s r`. `max`:
    `exp(s max r)` over the path. `add`: `exp(s sum r)`. `rt`: `exp(s r)`. The last potential is what makes the
    product `exp(s r(x_0))`, whatever was spent on the way.

    Args:
        rewards: `[B, K]`, of what the network sees in the latents, or of the samples where `final`. Not finite: the
            particle has weight 0 from here on. strength: lambda of this step, a number or `[B]`; a schedule rises to
            the last one's.
    """
    rewards = rewards.to(particles.log_weights)
    known = torch.where(particles.carried.isnan(), _neutral(rewards, potential), particles.carried)
    carried = {"max": torch.maximum(known, rewards), "add": known + rewards}.get(potential, rewards)
    scale = strength[:, None].to(rewards) if isinstance(strength, Tensor) and strength.dim() else strength
    gain = scale * rewards - particles.spent if final or potential == "diff" else scale * carried
    fine = gain.isfinite()
    return replace(
        particles,
        log_weights=torch.where(fine, particles.log_weights + gain, -math.inf),
        spent=torch.where(fine, particles.spent + gain, particles.spent),
        carried=torch.where(fine, carried, known),
    )


def _neutral(rewards: Tensor, potential: PotentialName) -> Tensor:
    """What changes nothing: 0 in a sum, -inf in a maximum (a start of 0 would ignore negative rewards)."""
    return torch.full_like(rewards, -math.inf if potential == "max" else 0.0)


def normalised(log_weights: Tensor) -> Tensor:
    """Weights `[B, K]` that sum to 1; equal ones where all are 0. NaN counts as weight 0."""
    clean = torch.where(log_weights.isnan(), -math.inf, log_weights)
    dead = (clean == -math.inf).all(1, keepdim=True)
    return torch.softmax(torch.where(dead, 0.0, clean), 1)


def effective_size(log_weights: Tensor) -> Tensor:
    """Effective number of particles `1 / sum w^2` of normalised weights, `[B]`, from 1 to K."""
    return 1 / normalised(log_weights).square().sum(1)


def log_mean_weight(log_weights: Tensor) -> Tensor:
    """Log of the mean weight `[B]`: its sum over resamplings estimates `log E[exp(strength r)]`."""
    clean = torch.where(log_weights.isnan(), -math.inf, log_weights)
    return clean.logsumexp(1) - math.log(log_weights.shape[1])


def systematic(weights: Tensor, uniform: Tensor) -> Tensor:
    """Particle numbers `[B, K]`, each taken floor or ceil of K w times.

    One uniform number u `[B]` in [0, 1) places a comb of K teeth at `(i + u) / K` over the cumulated weights
    (Kitagawa 1996). Never worse than `multinomial` in the variance of the counts here.
    """
    count = weights.shape[1]
    teeth = (torch.arange(count, dtype=weights.dtype, device=weights.device) + uniform[:, None]) / count
    return _inverse(weights, teeth)


def multinomial(weights: Tensor, uniform: Tensor) -> Tensor:
    """Particle numbers `[B, K]` drawn independently, from uniform numbers `[B, K]` in [0, 1), in rising order."""
    return _inverse(weights, uniform.sort(1).values)


def _inverse(weights: Tensor, points: Tensor) -> Tensor:
    """The particle whose share of the cumulated weights holds each point; never one of weight 0."""
    edges = weights.cumsum(1)
    edges = edges / edges[:, -1:]
    last = weights.shape[1] - 1 - (weights.flip(1) > 0).long().argmax(1, keepdim=True)
    return torch.minimum(torch.searchsorted(edges, points.to(edges), right=True), last)


def resample(
    particles: Particles,
    uniform: Tensor,
    *,
    scheme: Resampling = "systematic",
    threshold: float = 0.5,
) -> tuple[Particles, Tensor, Tensor]:
    """Draw particles anew in the prompts whose effective number is below `threshold` K; the others keep their
    weights.

    Args:
        uniform: `[B, K]` in [0, 1); systematic resampling uses the first column. threshold: 0 never, more than 1
            always.

    Returns:
        The particles, the number of the old particle that each one is `[B, K]` (for latents and all else that belongs
        to a particle, predictions and gradients too), and which prompts were resampled `[B]`.
    """
    weights = normalised(particles.log_weights)
    count = weights.shape[1]
    wanted = effective_size(particles.log_weights) < threshold * count
    drawn = systematic(weights, uniform[:, 0]) if scheme == "systematic" else multinomial(weights, uniform)
    same = torch.arange(count, device=weights.device).expand_as(drawn)
    index = torch.where(wanted[:, None], drawn, same)
    taken = particles.take(index)
    fresh = torch.where(wanted[:, None], 0.0, taken.log_weights)
    return replace(taken, log_weights=fresh), index, wanted


def polynomial_strength(step: int, steps: int, power: float = 1.0) -> float:
    """Share of the final strength at a weighting, `((step + 1) / steps)^power`, 1 at the last (step = steps - 1)."""
    return ((step + 1) / steps) ** power


def geometric_strength(step: int, rate: float) -> float:
    """DAS: `min((1 + rate)^step - 1, 1)`; 0 at step 0. The paper: rate 0.008 for 100 steps, 0.1 for 8."""
    return min((1 + rate) ** step - 1, 1.0)


def adaptive_strength(
    log_weights: Tensor, rewards: Tensor, current: Tensor, last: float, target: float, rounds: int = 50
) -> Tensor:
    """The greatest strength in [current, last] that keeps an effective number of `target` K, by bisection, `[B]`.

    Jasra et al. 2011; one of DAS's schedules. For potential `diff`: the weights at strength s are those at hand times
    `exp((s - current) r)`.

    Args:
        log_weights, rewards: `[B, K]`. current: strengths so far `[B]`. target: share of K in (0, 1).
    """
    values = rewards.to(log_weights)
    low, high = current.to(log_weights), torch.full_like(log_weights[:, 0], last)
    goal = target * rewards.shape[1]

    def enough(strength: Tensor) -> Tensor:
        return effective_size(log_weights + (strength - current.to(log_weights))[:, None] * values) >= goal

    done = enough(high)
    for _ in range(rounds):
        middle = (low + high) / 2
        fine = enough(middle)
        low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
    return torch.where(done, last, low)
