"""Feynman-Kac steering: particles that are weighted by their rewards and drawn anew on the way.

Singhal et al. 2025, arXiv 2501.06848; the weights, potentials and resampling are those of `smc.py`. At a look, the
picture that the network sees in each of K particles is judged; the network is called for the step anyway, so a look
costs a decoding and a reward. Particles that are drawn twice go apart by the noise of their next steps.

The weighted particles at the end are a sample of `p(x_0) exp(strength r(x_0))`; the picture that is kept is the best
of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.inference.generation import Generation
from diffalign.inference.objective import Objective
from diffalign.inference.problem import Problem
from diffalign.inference.smc import (
    Particles,
    PotentialName,
    Resampling,
    adaptive_strength,
    effective_size,
    geometric_strength,
    normalised,
    polynomial_strength,
    resample,
    start_particles,
    weigh,
)
from diffalign.inference.steering.walk import Look, Walk, Window, acting, check_noise, pick
from diffalign.inference.trace import Trace
from diffalign.strict import StrictModel

ALWAYS = 2.0
"""A threshold that every effective number is below."""


class FKConfig(StrictModel):
    """Options of Feynman-Kac steering; defaults are those of the release but for the potential and the looks."""

    method: Literal["fk"] = "fk"
    """Particles that are weighted and drawn anew on the way."""
    particles: int = Field(default=4, ge=1)
    """K per prompt; a run costs as much as K pictures. 1 is plain sampling."""
    potential: PotentialName = "diff"
    """What a look multiplies into the weights: `diff` the gain since the last look, `max` the best so far, `add` the
    sum, `rt` the reward itself. `diff` spends no more than the final weight; the others push harder on the way."""
    strength: float = Field(default=10.0, ge=0)
    """lambda, in units of 1 / reward: at 10 a reward higher by 0.1 weighs e times as much. 0: K plain samples."""
    every: int = Field(default=5, ge=1)
    """Steps from one look to the next; more looks choose more often, and more particles come of one."""
    window: Window = (0.2, 0.8)
    """Looks lie between these shares of the steps: before, the network sees too little; after, little can change."""
    threshold: float = Field(default=0.5, ge=0)
    """Particles are drawn anew where their effective number is below this share of K; 0: never, above 1: always."""
    resampling: Resampling = "systematic"
    """`systematic` draws every particle as often as it deserves, up to rounding; `multinomial` at random."""
    tempering: Literal["none", "polynomial", "geometric", "adaptive"] = "none"
    """How the strength rises to its full size at the end: not at all; `polynomial`, (look / looks)^power; `geometric`,
    as in DAS; `adaptive`, as much as keeps the effective number at `threshold` (0.5 if that is not in (0, 1))."""
    power: float = Field(default=1.0, gt=0)
    """Of the polynomial."""

    @model_validator(mode="after")
    def _fitting(self) -> FKConfig:
        if self.tempering == "adaptive" and self.potential != "diff":
            raise ValueError(
                f"tempering is adaptive and potential {self.potential}; expected potential=diff with it"
            )
        return self

    @property
    def iterations(self) -> int:
        """What a run costs, in pictures."""
        return self.particles


@dataclass(frozen=True)
class Cloud:
    """K particles of B prompts on their way.

    Fields:
        x: states `[B, K, C, h, w]`. paths: all their noises `[B, K, S, C, h, w]`, those of steps to come included.
        particles: their weights. strength: `[B]`, that of the last look. resampled: `[B]`, how often.
    """

    x: Tensor
    paths: Tensor
    particles: Particles
    strength: Tensor
    resampled: Tensor


class FK:
    """Steers K particles for all prompts of a problem at once."""

    def __init__(self, config: FKConfig | None = None) -> None:
        self.config = config or FKConfig()

    def check(self, generation: Generation, objective: Objective) -> None:
        """Refuse a sampler without noise."""
        check_noise(generation, "fk")

    def run(self, problem: Problem, trace: Trace) -> None:
        """Steer; the trace gets the best particle with its noises, and at the looks what the network sees."""
        walk = Walk(problem)
        self.check(walk.generation, problem.objective)
        for number, count in walk.runs(lambda many: many * walk.steps, self.config.particles):
            self._steer(walk, trace, number, count)

    def _steer(self, walk: Walk, trace: Trace, number: int, count: int) -> None:
        cloud, looks = _begun(walk, number, count), self.looks(walk)
        for step in range(walk.steps):
            if walk.late:
                cloud = _heaviest(cloud)
            seen = walk.see(cloud.x, step)
            if step in looks:
                look = walk.judge(seen.clean)
                trace.passed(look.best, look.media)
                cloud = self._weighed(cloud, look, looks, step, walk.steps)
                cloud, index = self._resampled(walk, cloud, number, step)
                seen = seen.take(index)
            cloud = replace(cloud, x=seen.next(walk.noise(cloud.paths, step)))
        look = walk.judge(cloud.x)
        last = weigh(cloud.particles, look.rewards, self.config.strength, self.config.potential, final=True)
        trace.saw(look.best, look.media, pick(cloud.paths, look.index[:, None])[:, 0])
        _tell(trace, last, look.rewards, cloud.resampled)

    def looks(self, walk: Walk) -> list[int]:
        """Steps at which particles are weighted: some noise must be left to tell copies apart."""
        return [step for step in acting(self.config.window, walk.steps)[:: self.config.every]
                if step <= walk.generation.random[-1]]  # fmt: skip

    def _weighed(self, cloud: Cloud, look: Look, looks: list[int], step: int, steps: int) -> Cloud:
        options, rewards = self.config, look.rewards.double()
        if options.tempering == "adaptive":
            target = options.threshold if 0 < options.threshold < 1 else 0.5
            logs = cloud.particles.log_weights
            strength = adaptive_strength(logs, rewards, cloud.strength, options.strength, target)
        else:
            share = {
                "none": 1.0,
                "polynomial": polynomial_strength(looks.index(step), len(looks) + 1, options.power),
                # DAS's rate, 0.008 for 100 steps, is about the one that reaches the full strength at the last step.
                "geometric": geometric_strength(step, 2 ** (1 / steps) - 1),
            }[options.tempering]
            strength = torch.full_like(cloud.strength, share * options.strength)
        particles = weigh(cloud.particles, rewards, strength, options.potential)
        return replace(cloud, particles=particles, strength=strength)

    def _resampled(self, walk: Walk, cloud: Cloud, number: int, step: int) -> tuple[Cloud, Tensor]:
        """The particles drawn anew where needed, and which old one each is `[B, K]`."""
        options = self.config
        uniform = walk.uniform(cloud.x.shape[1], number, step)
        # Adaptive strengths rise until the effective number is at the threshold; without new particles they would stay.
        threshold = ALWAYS if options.tempering == "adaptive" else options.threshold
        particles, index, done = resample(
            cloud.particles, uniform, scheme=options.resampling, threshold=threshold
        )
        paths, used = cloud.paths.clone(), walk.column(step)
        paths[:, :, :used] = pick(cloud.paths[:, :, :used], index)
        return replace(
            cloud, particles=particles, paths=paths, resampled=cloud.resampled + done.long()
        ), index


def _begun(walk: Walk, number: int, count: int) -> Cloud:
    paths = walk.paths(number, count)
    zeros = torch.zeros(len(paths), dtype=torch.float64)
    return Cloud(walk.begin(paths), paths, start_particles(len(paths), count), zeros, zeros.long())


def _tell(trace: Trace, particles: Particles, rewards: Tensor, resampled: Tensor) -> None:
    """The particles at the end: with `weights`, `rewards` are a sample of the tilted distribution's."""
    trace.note("rewards", rewards)
    trace.note("weights", normalised(particles.log_weights))
    trace.note("ancestors", particles.ancestors)
    trace.note("roots", particles.roots)
    trace.note("effective_particles", effective_size(particles.log_weights))
    trace.note("resamplings", resampled)


def _heaviest(cloud: Cloud) -> Cloud:
    """The particle with the greatest weight alone."""
    index = cloud.particles.log_weights.argmax(1, keepdim=True)
    return replace(
        cloud, x=pick(cloud.x, index), paths=pick(cloud.paths, index), particles=cloud.particles.take(index)
    )
