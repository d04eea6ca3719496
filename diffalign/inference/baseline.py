"""Best-of-N for the same money: what independent noises reach at equal network evaluations, and at equal seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from diffalign.inference.best_of_n import BestOfN, BestOfNConfig
from diffalign.inference.budget import Budget, Meter
from diffalign.inference.methods import drive
from diffalign.inference.problem import Problem
from diffalign.inference.trace import Trace, begun
from diffalign.randomness import derive_seed

EVALUATIONS, SECONDS = "best of N, equal evaluations", "best of N, equal seconds"
NEARLY = 0.95
"""A baseline that took this share of the method's seconds needs no second one."""


@dataclass(frozen=True)
class Baseline:
    """What best-of-N found: rewards `[B]`, media `[B, 3, H, W]`, evaluations per picture and seconds of the group."""

    rewards: Tensor
    media: Tensor
    evaluations: int
    seconds: float


def best_of_n(problem: Problem, before: Trace, seconds: bool) -> dict[str, Baseline]:
    """Best-of-N by the same reward from the same first noises, by name of the comparison.

    A backward pass costs time but no evaluation here, so that a gradient method has more of it per evaluation: at equal
    seconds best-of-N draws more. Where it is nearly as slow as the method, the two are one.

    Args:
        problem: of the method, after its run. before: a trace of the first pictures alone.
        seconds: whether to go on to equal seconds.
    """
    spent = problem.meter
    if spent.evaluations == 0:
        return {}
    meter = Meter(Budget(evaluations=spent.evaluations), len(problem), running=True)
    own = replace(problem, meter=meter)
    trace = begun(meter, before.noises, before.rewards, before.media, shown=0)
    seeds = [derive_seed(seed, "baseline") for seed in problem.seeds]
    most = -(-spent.evaluations // problem.generation.cost)
    count = min(most, max(1, problem.generation.sampler.batch_size // len(problem)))
    search = BestOfN(problem.first, seeds, BestOfNConfig(candidates=count))
    drive(search, own, trace)
    found = {EVALUATIONS: _taken(trace)}
    if seconds and meter.seconds < NEARLY * spent.seconds:
        meter.budget = Budget(seconds=spent.seconds / len(problem))
        drive(search, own, trace)
    return {**found, SECONDS: _taken(trace)} if seconds else found


def _taken(trace: Trace) -> Baseline:
    meter = trace.meter
    return Baseline(trace.rewards.clone(), trace.media.clone(), meter.evaluations, meter.seconds)
