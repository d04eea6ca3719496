"""The driver: any method, on any backbone, with any reward, and best-of-N for the same money."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch

from diffalign.backbones.base import Backbone
from diffalign.errors import DiffalignError
from diffalign.evaluation.pictures import Progress, silent
from diffalign.evaluation.prompts import EvalPrompt, with_seeds
from diffalign.inference.baseline import best_of_n
from diffalign.inference.budget import Budget, Meter
from diffalign.inference.config import GenerationConfig
from diffalign.inference.generation import Generation, ready
from diffalign.inference.methods import (
    METHODS,
    ROUNDS,
    check_method,
    check_ranked,
    method_config,
    needing_gradients,
    run_method,
    without_gradients,
)
from diffalign.inference.objective import Objective, calibrated, check_differentiable
from diffalign.inference.own_sampler import check_steps, usual_settings
from diffalign.inference.person import Person
from diffalign.inference.problem import Problem
from diffalign.inference.result import Group, Optimized, joined
from diffalign.inference.trace import begun
from diffalign.randomness import derive_seed
from diffalign.rewards import Reward, Spec, distinct, load_reward, place
from diffalign.sampling.rollout import chunks
from diffalign.sampling.transition import Kernel

CALIBRATION = 64
"""Pictures that a reward is fitted to when it compares with the untouched model."""
BaselineChoice = Literal["both", "evaluations", "none"]


def optimize(
    backbone: Backbone,
    prompts: Sequence[str | EvalPrompt],
    reward: Reward | Spec,
    *,
    method: str | Mapping[str, Any] = "reno",
    seed: int = 0,
    generation: GenerationConfig | None = None,
    budget: Budget | None = None,
    caution: float = 0.0,
    held_out: Sequence[Reward | Spec] = (),
    baseline: BaselineChoice = "both",
    shown: int = 8,
    progress: Progress = silent,
) -> Optimized:
    """Better pictures of a backbone's current weights, by changing the noises that they come from.

    Prompts are worked on in groups of `generation.batch_size`, independently of each other. An interrupt, a lack of
    memory or another error in the middle ends the run with the best so far; `Optimized.stopped` says so.

    Args:
        prompts: texts, whose seeds are derived from `seed` as `diffalign generate` does it, or prompts with seeds.
        reward: what is to be high; a `Person` ranks instead. method: a name of `METHODS`, or a mapping with `method`
            and its options.
        budget: limits per picture. caution: deviations that are taken off the reward's mean.
        held_out: rewards to measure before and after. baseline: best-of-N to compare with.
        shown: of how many prompts the way is kept.

    Raises:
        DiffalignError: a method, reward, model or number of steps that do not fit each other, or an error before there
            is anything to keep.
    """
    config = method_config({"method": method} if isinstance(method, str) else dict(method))
    run = _Run(
        backbone,
        config,
        Objective(placed(reward, backbone), caution),
        with_defaults(backbone, generation or GenerationConfig(), config.method),
        budget or Budget(),
        shown,
        progress,
    )
    rows = [p if isinstance(p, EvalPrompt) else with_seeds([EvalPrompt(p)], seed)[0] for p in prompts]
    run.check(rows)
    others = distinct([placed(other, backbone) for other in held_out])
    if run.person:
        # A person cannot be asked about the independent noises of a baseline as well.
        baseline = "none"
        run.person.open(run.facts(rows))
    with ready(backbone, run.options.checkpointing):
        run.calibrate(rows, seed)
        groups, stopped = run.groups(rows, baseline)
        for group in groups:
            group.measure(others)
    settings = {
        "model": backbone.source.name,
        **run.options.model_dump(),
        **groups[0].problem.generation.facts(),
    }
    return joined(groups, run.config.model_dump(), run.objective.name, settings, stopped)


class _Run:
    """The parts of a run, checked against each other."""

    def __init__(
        self,
        backbone: Backbone,
        config: Any,
        objective: Objective,
        options: GenerationConfig,
        budget: Budget,
        shown: int,
        progress: Progress,
    ) -> None:
        self.backbone, self.config, self.objective = backbone, config, objective
        self.options, self.budget, self.shown, self.progress = options, budget, shown, progress

    @property
    def person(self) -> Person | None:
        """Who ranks in place of a reward, if anybody does."""
        return self.objective.reward if isinstance(self.objective.reward, Person) else None

    def facts(self, rows: Sequence[EvalPrompt]) -> dict[str, Any]:
        """What decides on the pictures that a search shows, as plain values."""
        method = {f"method.{name}": value for name, value in self.config.model_dump(mode="json").items()}
        options = self.options.model_dump(mode="json", exclude={"checkpointing"})
        return {
            "model": self.backbone.source.name,
            "prompts": [row.text for row in rows],
            "seeds": [row.seed for row in rows],
            **method,
            **{f"generation.{name}": value for name, value in options.items()},
        }

    def check(self, rows: Sequence[EvalPrompt]) -> None:
        """Refuse what does not fit before anything is drawn."""
        if not rows:
            raise DiffalignError("there are no prompts; expected at least one")
        if self.person:
            check_ranked(self.config.method)
        if needing := needing_gradients(self.config):
            check_differentiable(self.objective, needing, without_gradients())
        assert self.options.steps is not None
        check_steps(self.backbone, self.options.steps, self.options.distilled)

    def calibrate(self, rows: Sequence[EvalPrompt], seed: int) -> None:
        """Fit a reward that compares with the untouched model."""
        if not getattr(self.objective.reward, "uncalibrated", False):
            return
        prompts = [rows[i % len(rows)].text for i in range(CALIBRATION)]
        drawn = self._generation(prompts)
        seeds = [derive_seed(seed, "calibration", i) for i in range(CALIBRATION)]
        calibrated(self.objective, drawn.media(drawn.start(seeds)).to(self.backbone.device), prompts)

    def groups(self, rows: Sequence[EvalPrompt], baseline: BaselineChoice) -> tuple[list[Group], str]:
        """Work on one group after the other, and why it ended early, if it did."""
        done: list[Group] = []
        for span in chunks(len(rows), self.options.batch_size):
            try:
                group = self._begin(rows[span.start : span.stop])
                done.append(group)
                self._work(group, baseline)
            except KeyboardInterrupt:
                if not done:
                    raise
                return done, "interrupted"
            except (DiffalignError, RuntimeError, MemoryError) as error:
                message = _told(error, self.options)
                if message is None:
                    raise
                if not done:
                    raise DiffalignError(message) from error
                return done, message
            self.progress("prompts", span.stop, len(rows))
        return done, ""

    def _begin(self, rows: Sequence[EvalPrompt]) -> Group:
        """Draw and judge the first pictures; they cost the method nothing."""
        generation = self._generation([row.text for row in rows])
        check_method(self.config, generation, self.objective)
        seeds = [row.seed for row in rows]
        start = generation.start(seeds)
        media = generation.media(start)
        with torch.no_grad():
            rewards = self.objective(media.to(self.backbone.device), generation.prompts).float().cpu()
        meter = Meter(self.budget, len(rows))
        before, trace = (begun(meter, start, rewards, media, self.shown) for _ in range(2))
        trace.watch = partial(self._watch, generation.cost)
        variables = self.options.variables
        assert variables is not None
        return Group(rows, Problem(generation, self.objective, meter, start, seeds, variables), before, trace)

    def _watch(self, cost: int, meter: Meter) -> None:
        """Show how far a group is, by what will end it: evaluations, or else seconds."""
        budget, method = self.budget, self.config.method
        most = budget.evaluations or getattr(self.config, "iterations", ROUNDS) * cost
        if budget.evaluations is None and budget.seconds is not None:
            limit = int(budget.seconds * meter.pictures) + 1
            self.progress(f"{method}: seconds", min(int(meter.seconds), limit), limit)
        else:
            self.progress(f"{method}: evaluations per picture", min(meter.evaluations, most), most)

    def _work(self, group: Group, baseline: BaselineChoice) -> None:
        group.problem.meter.start()
        try:
            run_method(self.config, group.problem, group.trace)
        finally:
            group.problem.meter.stop()
        if baseline != "none":
            group.baselines = best_of_n(group.problem, group.before, baseline == "both")

    def _generation(self, prompts: Sequence[str]) -> Generation:
        options = self.options
        kernel = Kernel(options.kernel, options.noise) if options.kernel else None
        assert options.steps is not None
        assert options.guidance is not None
        return Generation(
            self.backbone,
            prompts,
            steps=options.steps,
            guidance=options.guidance,
            kernel=kernel,
            batch_size=options.batch_size,
            checkpointing=options.checkpointing,
        )


def with_defaults(backbone: Backbone, options: GenerationConfig, method: str) -> GenerationConfig:
    """The same options with the model's usual steps and guidance and a method's noises where none are given."""
    steps, guidance = usual_settings(backbone)
    update = {
        "variables": options.variables or METHODS[method].variables,
        "steps": steps if options.steps is None else options.steps,
        "guidance": guidance if options.guidance is None else options.guidance,
    }
    return options.model_copy(update=update)


def placed(reward: Reward | Spec, backbone: Backbone) -> Reward:
    """A reward, loaded if it is a specification, on the backbone's device."""
    return place(load_reward(reward) if isinstance(reward, str | Mapping) else reward, backbone.device)


def _told(error: BaseException, options: GenerationConfig) -> str | None:
    """What a person is told of an error that is not a fault of the program; None of any other."""
    # A reward's own lack of memory comes wrapped.
    if not any(_is_memory(one) for one in (error, error.__cause__)):
        return str(error) if isinstance(error, DiffalignError) else None
    further = {"none": "steps", "steps": "blocks"}.get(options.checkpointing)
    recompute = f"generation.checkpointing={further}" if further else "a smaller generation.resolution"
    fewer = f"generation.batch_size={max(1, options.batch_size // 2)}"
    return (
        f"out of memory with {options.batch_size} prompts at once, {options.steps} steps and "
        f"generation.checkpointing={options.checkpointing}. Try {fewer if options.batch_size > 1 else recompute}"
        f"{', ' + recompute if options.batch_size > 1 and further else ''}, model.precision=bf16, or fewer steps."
    )


def _is_memory(error: BaseException | None) -> bool:
    """Whether an error is a lack of memory, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)
