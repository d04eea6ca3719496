"""The methods by name. `METHODS` is the whole table; nothing is imported before it is asked for.

A method is a class and its options, `NAME` and `NAMEConfig` in one module. Two kinds of class:

- a search (`diffalign.inference.search.Search`): built with the first noises `[B, *shape]`, seeds and options, then
  asked for candidates and told their rewards;
- any other: built with options, with `run(problem, trace)`, which judges noises through the problem, tells the trace
  what it saw, and asks `problem.meter.affordable` before it spends. Those of kind `steering` have also
  `check(generation, objective)`, which refuses what they cannot steer.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

from diffalign.errors import DiffalignError, did_you_mean
from diffalign.inference.generation import Generation
from diffalign.inference.objective import Objective
from diffalign.inference.person import Person
from diffalign.inference.problem import Problem, Variables
from diffalign.inference.ranking import drive_ranked
from diffalign.inference.search import Search
from diffalign.inference.trace import Trace
from diffalign.validation import validate_section

Kind = Literal["gradient", "hybrid", "search", "archive", "steering"]
ROUNDS = 50
"""Rounds of a search without a budget."""


@dataclass(frozen=True)
class Entry:
    """Where a method is, what it needs, and which noises it changes unless told otherwise.

    It needs the reward's gradient, uses one if there is one (`hybrid`), needs nothing (`search`), encoders of its own
    (`archive`), or a run to steer.
    """

    module: str
    name: str
    kind: Kind
    summary: str
    variables: Variables = "initial"


METHODS: dict[str, Entry] = {
    "reno": Entry("diffalign.inference.reno", "Reno", "gradient", "gradient ascent on the noise of few-step models"),
    "dno": Entry("diffalign.inference.dno", "DNO", "hybrid", "gradient ascent on all noises of a sampler", "all"),
    "best_of_n": Entry("diffalign.inference.best_of_n", "BestOfN", "search", "independent noises; the best is kept"),
    "random_search": Entry(
        "diffalign.inference.random_search", "RandomSearch", "search", "rotations of the best noises"
    ),
    "zero_order": Entry("diffalign.inference.zero_order", "ZeroOrder", "search", "neighbours of a pivot"),
    "evolution": Entry("diffalign.inference.evolution", "Evolution", "search", "CMA-ES over noises"),
    "rank_sgd": Entry("diffalign.inference.rank_sgd", "RankSGD", "search", "ZO-RankSGD: rankings only"),
    "qd": Entry("diffalign.inference.qdhf", "QDHF", "archive", "QDHF: the best picture of each kind"),
    "fk": Entry("diffalign.inference.steering.fk", "FK", "steering", "particles drawn anew on the way", "all"),
    "svdd": Entry("diffalign.inference.steering.svdd", "SVDD", "steering", "the best of several at each step", "all"),
    "demon": Entry("diffalign.inference.steering.demon", "Demon", "steering", "noises mixed by their rewards", "all"),
    "paths": Entry("diffalign.inference.steering.paths", "Paths", "steering", "nearly done, noised, done anew", "all"),
    "universal_guidance": Entry(
        "diffalign.inference.steering.guidance", "UniversalGuidance", "gradient", "a gradient moves each step", "all"
    ),
    "noisy_reward": Entry(
        "diffalign.inference.steering.noisy_reward", "NoisyReward", "steering", "Flow-NRG, by noisy latents", "all"
    ),
}  # fmt: skip


class Method(Protocol):
    """What is not a search."""

    def run(self, problem: Problem, trace: Trace) -> None:
        """Work until done or the budget is spent."""
        ...


def entry_of(name: str) -> Entry:
    """The entry of a method.

    Raises:
        DiffalignError: unknown; the nearest is named.
    """
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise DiffalignError(
            f"unknown method {name!r}; expected one of: {known}.{did_you_mean(name, list(METHODS))}"
        )
    return METHODS[name]


def method_config(options: dict[str, Any]) -> Any:
    """The validated options of the method that `options["method"]` names.

    Raises:
        DiffalignError: unknown method, unknown option (the nearest one is named) or a bad value.
    """
    entry = entry_of(str(options.get("method")))
    return validate_section(_attribute(entry, "Config"), options, "method")


def run_method(config: Any, problem: Problem, trace: Trace) -> None:
    """Run a method on a problem until it is done or the budget is spent."""
    entry = METHODS[config.method]
    if entry.kind != "search":
        _attribute(entry)(config).run(problem, trace)
        return
    search = _attribute(entry)(problem.first, problem.seeds, config)
    rounds, judge = None if problem.meter.budget.limited else ROUNDS, problem.objective.reward
    if isinstance(judge, Person):
        drive_ranked(search, problem, trace, judge, rounds)
    else:
        drive(search, problem, trace, rounds)


def check_method(config: Any, generation: Generation, objective: Objective) -> None:
    """Refuse a sampler or a reward that a steering method cannot use, before anything is drawn.

    Raises:
        DiffalignError: they do not fit.
    """
    entry = METHODS[config.method]
    if entry.kind == "steering":
        _attribute(entry)(config).check(generation, objective)


def check_ranked(method: str) -> None:
    """Whether a method works with a person, who says which picture is better and not how good one is.

    Raises:
        DiffalignError: it does not.
    """
    fitting = [name for name, entry in METHODS.items() if entry.kind == "search"]
    if method not in fitting:
        raise DiffalignError(
            f"method {method} needs scores, but a person ranks pictures. Methods for a person: {', '.join(fitting)}; "
            "rank_sgd learns most from a ranking."
        )


def drive(search: Search, problem: Problem, trace: Trace, rounds: int | None = None) -> None:
    """Ask, judge and tell until the budget is spent, or for so many rounds."""
    done = 0
    while problem.meter.affordable(problem.generation.cost) and (rounds is None or done < rounds):
        judged = problem.judge(search.ask())
        search.tell(judged.rewards)
        trace.saw(judged.best, judged.media, judged.noises)
        done += 1


def needing_gradients(config: Any) -> str:
    """What a method with these options is called if it cannot do without the reward's gradient, else nothing."""
    kind = METHODS[config.method].kind
    if kind == "hybrid" and config.gradients == "exact":
        return f"{config.method} with method.gradients=exact"
    return str(config.method) if kind == "gradient" else ""


def without_gradients() -> list[str]:
    """Methods that every reward fits."""
    return [name for name, entry in METHODS.items() if entry.kind != "gradient"]


def _attribute(entry: Entry, suffix: str = "") -> Any:
    try:
        return getattr(import_module(entry.module), entry.name + suffix)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("diffalign"):
            raise
        raise DiffalignError(
            f"the method in {entry.module} needs the package {error.name!r}, which is not installed."
        ) from error
