"""Sampling Demon: the noises of a step are mixed into one that leads to higher rewards.

Yeh et al. 2024, arXiv 2410.05760 (Tanh Demon, Boltzmann Demon). Of K noises z_k of a step, each is followed to the
picture that it leads to, with reward r_k. The step is taken with

    z* = sqrt(d) z / |z|,   z = sum_k w_k z_k,   w_k = tanh((r_k - mean r) / tau)

so that noises which lead below the mean count with the opposite sign, and z* has the norm of noise. Only differences
of rewards against their own deviation count, so no scale has to be set, and no gradient is needed.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.inference.generation import Generation
from diffalign.inference.objective import Objective
from diffalign.inference.problem import Problem
from diffalign.inference.search import norms, where_rows
from diffalign.inference.steering.walk import (
    Walk,
    Window,
    acting,
    check_noise,
    stops,
)
from diffalign.inference.trace import Trace
from diffalign.strict import StrictModel

Weighting = Literal["tanh", "boltzmann"]
EQUAL = 1e-8
"""Rewards whose deviation is below this tell nothing, as in the release."""


class DemonConfig(StrictModel):
    """Options of Demon; defaults are those of the release but for the look ahead."""

    method: Literal["demon"] = "demon"
    """Noises of a step are mixed by their rewards."""
    candidates: int = Field(default=16, ge=1)
    """K per step; a run costs nearly K `look_ahead` + 1 pictures. 1 is plain sampling."""
    weighting: Weighting = "tanh"
    """`tanh` of centred rewards also learns from bad noises; `boltzmann` weighs by exp(r / tau)."""
    temperature: float | None = Field(default=None, gt=0)
    """tau, in units of the reward; null: the deviation of the step's rewards."""
    look_ahead: int = Field(default=1, ge=1)
    """Network calls that follow a candidate to its picture: 1 takes what the network sees at once, which is vague in
    early steps; the release takes up to 20."""
    window: Window = (0.0, 1.0)
    """Noises are mixed between these shares of the steps; the others are plain."""

    @property
    def iterations(self) -> int:
        """What a run costs, in pictures, rounded up."""
        return 1 + self.candidates * self.look_ahead


class Demon:
    """Samples one picture for each prompt of a problem."""

    def __init__(self, config: DemonConfig | None = None) -> None:
        self.config = config or DemonConfig()

    def check(self, generation: Generation, objective: Objective) -> None:
        """Refuse a sampler without noise."""
        check_noise(generation, "demon")

    def run(self, problem: Problem, trace: Trace) -> None:
        """Sample; the trace gets the picture with its noises, and at every step the best look ahead."""
        walk = Walk(problem)
        self.check(walk.generation, problem.objective)
        mixed = [s for s in acting(self.config.window, walk.steps) if s in walk.generation.random]
        looked = sum(self._calls(step + 1, walk.steps) for step in mixed)
        calls = lambda many: walk.steps + (many * looked if many > 1 else 0)  # noqa: E731
        for number, count in walk.runs(calls, self.config.candidates):
            self._sample(walk, trace, mixed, number, count)

    def _sample(self, walk: Walk, trace: Trace, mixed: list[int], number: int, count: int) -> None:
        path = walk.paths(number, 1)
        x = walk.begin(path)
        for step in range(walk.steps):
            seen = walk.see(x, step)
            if step in mixed and count > 1 and not walk.late:
                noises = walk.candidates(path, step, count, number)
                states = seen.next(noises.to(x.device))
                look = walk.judge(walk.ahead(states, step + 1, self.config.look_ahead))
                trace.passed(look.best, look.media)
                path[:, 0, walk.column(step)] = mixture(
                    noises, look.rewards, self.config.weighting, self.config.temperature
                )
            x = seen.next(walk.noise(path, step))
        look = walk.judge(x)
        trace.saw(look.best, look.media, path[:, 0])

    def _calls(self, step: int, steps: int) -> int:
        """Network calls of a look ahead from a step; none after the last."""
        return len(stops(step, steps, self.config.look_ahead)) - 1


def mixture(noises: Tensor, rewards: Tensor, weighting: Weighting, temperature: float | None) -> Tensor:
    """One noise `[B, *shape]` of norm sqrt(d) out of candidates `[B, K, *shape]` and their rewards `[B, K]`.

    Candidates with NaN count for nothing. Where rewards do not differ, or fewer than two are known, it is candidate 0
    as it is.
    """
    values, known = rewards.double(), ~rewards.isnan()
    count = known.sum(1, keepdim=True)
    centred = torch.where(known, values, 0.0)
    centred = torch.where(known, values - centred.sum(1, keepdim=True) / count, 0.0)
    deviation = (centred.square().sum(1, keepdim=True) / (count - 1)).sqrt()
    telling = (count > 1) & (deviation > EQUAL)
    tau = torch.where(telling, deviation, 1.0) if temperature is None else temperature
    if weighting == "tanh":
        weights = torch.tanh(centred / tau)
    else:
        weights = torch.softmax(torch.where(known, centred / tau, -math.inf), 1)
    weights = torch.where(telling, weights, 0.0).to(noises)
    mixed = torch.einsum("bk,bk...->b...", weights, noises)
    length = norms(mixed)
    size = math.sqrt(mixed[0].numel())
    scaled = mixed * (size / torch.where(length > 0, length, 1.0))
    return where_rows(telling[:, 0] & (length.flatten() > 0), scaled, noises[:, 0])
