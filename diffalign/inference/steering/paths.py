"""Search over paths: nearly finished states are noised again and finished anew, and the best of these go on.

Ma et al. 2025, arXiv 2501.09732, section 3.2. N states are taken to a low noise level; each round draws M states a good
way back for each of them by the forward process, takes these a little farther than the round before began, judges the
picture that the network sees there, and keeps the N best of N M. Each round ends nearer to the finished picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.inference.generation import Generation
from diffalign.inference.objective import Objective
from diffalign.inference.problem import Problem
from diffalign.inference.search import draw
from diffalign.inference.steering.walk import Walk, pick, renoised
from diffalign.inference.trace import Trace
from diffalign.strict import StrictModel


class PathsConfig(StrictModel):
    """Options of the search over paths."""

    method: Literal["paths"] = "paths"
    """Nearly finished states are noised again and finished anew; the best go on."""
    survivors: int = Field(default=2, ge=1)
    """N: states that go on to the next round."""
    candidates: int = Field(default=4, ge=1)
    """M: states that each survivor is noised to in a round."""
    start: float = Field(default=0.85, gt=0, le=1)
    """Share of the steps that are done before the first round; 0.89 of the noise in the paper."""
    back: float = Field(default=0.6, gt=0, le=1)
    """Share of the steps that a round takes back. The paper: 0.78 of the noise; small values only retouch."""
    advance: float = Field(default=0.05, gt=0, le=1)
    """Share of the steps by which each round ends later than the one before, at least one step. The paper: 0.03."""

    @property
    def iterations(self) -> int:
        """What a run costs, in pictures, rounded up."""
        return -(-plan(self, FINE).calls(self.survivors, self.candidates) // FINE)


FINE = 100
"""Steps for which the cost of a run is told in pictures."""


@dataclass(frozen=True)
class Round:
    """Steps that a round begins at, goes back to and ends at; `looks` tells whether the end is not the finished one."""

    begin: int
    back: int
    end: int
    looks: bool

    @property
    def calls(self) -> int:
        """Network evaluations of a state, with that of the look."""
        return self.end - self.back + self.looks


@dataclass(frozen=True)
class Plan:
    """The steps before the first round, and the rounds."""

    first: int
    rounds: list[Round]

    def calls(self, survivors: int, candidates: int) -> int:
        """States of a prompt that the network sees in a run."""
        return survivors * (self.first + candidates * sum(one.calls for one in self.rounds))


class Paths:
    """Searches for one picture for each prompt of a problem; every step between the looks is deterministic."""

    def __init__(self, config: PathsConfig | None = None) -> None:
        self.config = config or PathsConfig()

    def check(self, generation: Generation, objective: Objective) -> None:
        """Refuse a sampler that has no way back."""
        steps = len(generation.sampler.schedule)
        if steps < 2:
            raise DiffalignError(
                f"method paths goes back some steps of a sampler, but this one has {steps}. Set generation.steps to 2 "
                "or more, or take method=random_search, which turns the first noise."
            )

    def run(self, problem: Problem, trace: Trace) -> None:
        """Search; the trace gets the pictures. No noise gives these again."""
        walk = Walk(problem)
        self.check(walk.generation, problem.objective)
        steps = plan(self.config, walk.steps)
        for number, many in walk.runs(
            lambda m: steps.calls(self.config.survivors, m), self.config.candidates
        ):
            self._search(walk, trace, steps, number, many)

    def _search(self, walk: Walk, trace: Trace, steps: Plan, number: int, many: int) -> None:
        kept = self.config.survivors
        x = walk.along(walk.begin(walk.paths(number, kept)), 0, steps.first)
        for one in steps.rounds:
            x = walk.along(self._noised(walk, x, one, number, 1 if walk.late else many), one.back, one.end)
            look = walk.judge(walk.see(x, one.end).clean if one.looks else x)
            known = look.rewards.nan_to_num(nan=-torch.inf)
            x = pick(x, known.topk(kept, dim=1).indices)
            if one.looks:
                trace.passed(look.best, look.media)
            else:
                trace.saw(look.best, look.media, None)

    def _noised(self, walk: Walk, x: Tensor, one: Round, number: int, many: int) -> Tensor:
        """Survivors `[B, N, C, h, w]` at the start of a step, noised `many` times each `[B, N M, C, h, w]`."""
        wide = x.repeat_interleave(many, dim=1)
        shape = walk.generation.noise_shape[1:]
        noise = draw(walk.problem.seeds, wide.shape[1], shape, "paths", number, one.begin).to(wide)
        times = walk.generation.sampler.schedule.times.to(wide.device)
        process, begin, back = (
            walk.generation.backbone.process,
            times[one.begin : one.begin + 1],
            times[one.back : one.back + 1],
        )
        return renoised(process, wide.flatten(0, 1), back, begin, noise.flatten(0, 1)).view_as(wide)


def plan(config: PathsConfig, steps: int) -> Plan:
    """The rounds in a sampler of so many steps: the last one ends at its end."""
    first = min(steps - 1, max(1, round(config.start * steps)))
    return Plan(first, list(_rounds(config, steps, first)))


def _rounds(config: PathsConfig, steps: int, begin: int) -> Iterator[Round]:
    back, advance = (max(1, round(share * steps)) for share in (config.back, config.advance))
    while begin < steps:
        end = min(steps, begin + advance)
        yield Round(begin, max(0, begin - back), end, end < steps)
        begin = end
