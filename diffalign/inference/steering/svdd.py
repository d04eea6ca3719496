"""Soft value-based decoding: at each step several candidates are drawn, and one goes on in proportion to its value.

Li et al. 2024, arXiv 2408.08252, algorithm 1 with posterior-mean values (SVDD-PM): of M candidates `x_m` of the next
state, drawn from the model's own step, one is chosen by `softmax(v(x_m) / alpha)`, where `v(x) = r(D(x0(x)))` is the
reward of the picture that the network sees in it. The steps approximate those of `p(x_0) exp(r(x_0) / alpha)`. What the
network said of the chosen candidate serves its next step, so M = 1 costs what plain sampling does.
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
from diffalign.inference.smc import multinomial, normalised
from diffalign.inference.steering.walk import (
    Look,
    Seen,
    Walk,
    Window,
    acting,
    check_noise,
    pick,
)
from diffalign.inference.trace import Trace
from diffalign.strict import StrictModel


class SVDDConfig(StrictModel):
    """Options of soft value-based decoding."""

    method: Literal["svdd"] = "svdd"
    """Several candidates at each step, one of which goes on."""
    candidates: int = Field(default=8, ge=1)
    """M per step; a run costs nearly as much as M pictures. The paper: 20 for pictures. 1 is plain sampling."""
    temperature: float = Field(default=0.0, ge=0)
    """alpha, in units of the reward: 0 takes the best, as the release does; large ones take any."""
    window: Window = (0.0, 1.0)
    """Candidates are drawn between these shares of the steps; the others are plain."""

    @property
    def iterations(self) -> int:
        """What a run costs, in pictures, rounded up."""
        return self.candidates


class SVDD:
    """Decodes one picture for each prompt of a problem."""

    def __init__(self, config: SVDDConfig | None = None) -> None:
        self.config = config or SVDDConfig()

    def check(self, generation: Generation, objective: Objective) -> None:
        """Refuse a sampler without noise."""
        check_noise(generation, "svdd")

    def run(self, problem: Problem, trace: Trace) -> None:
        """Decode; the trace gets the picture with its noises, and at every choice what the network sees."""
        walk = Walk(problem)
        self.check(walk.generation, problem.objective)
        choices = [s for s in acting(self.config.window, walk.steps) if s in walk.generation.random]
        # The candidates of a choice are seen at the start of the next step; after the last there is none.
        seen = sum(step < walk.steps - 1 for step in choices)
        for number, count in walk.runs(lambda m: walk.steps + (m - 1) * seen, self.config.candidates):
            self._decode(walk, trace, choices, number, count)

    def _decode(self, walk: Walk, trace: Trace, choices: list[int], number: int, count: int) -> None:
        path = walk.paths(number, 1)
        x = walk.begin(path)
        seen = walk.see(x, 0)
        for step in range(walk.steps):
            if step in choices and count > 1 and not walk.late:
                x, seen = self._chosen(walk, trace, seen, path, step, number, count)
            else:
                x = seen.next(walk.noise(path, step))
                seen = walk.see(x, step + 1) if step + 1 < walk.steps else seen
        look = walk.judge(x)
        trace.saw(look.best, look.media, path[:, 0])

    def _chosen(
        self, walk: Walk, trace: Trace, seen: Seen, path: Tensor, step: int, number: int, count: int
    ) -> tuple[Tensor, Seen]:
        """The next state, and what the network sees in it; its noise takes its place in the path."""
        noises = walk.candidates(path, step, count, number)
        x = seen.next(noises.to(seen.mean.device))
        last = step + 1 == walk.steps
        after = seen if last else walk.see(x, step + 1)
        look = walk.judge(x if last else after.clean)
        trace.passed(look.best, look.media)
        index = self._index(look, walk.uniform(1, number, step))
        path[:, :, walk.column(step)] = pick(noises, index)
        return pick(x, index), after if last else after.take(index)

    def _index(self, look: Look, uniform: Tensor) -> Tensor:
        """Which candidate goes on `[B, 1]`; one without a reward never does while there is another."""
        if self.config.temperature == 0:
            return look.index[:, None]
        known = torch.where(look.rewards.isnan(), -math.inf, look.rewards.double())
        return multinomial(normalised(known / self.config.temperature), uniform)
