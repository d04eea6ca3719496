"""Puts an online run together: prompts, a guarded reward, the collector of rounds, the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffalign.config import EvaluationConfig, RunConfig, trainer_class, trainer_config
from diffalign.data.picture_sources import find_pictures, open_pictures
from diffalign.data.sources import open_records
from diffalign.engine.assembly import (
    Ingredients,
    OpenedOnce,
    generator_parts,
    open_singles,
    picture_prompts,
)
from diffalign.engine.fit import Fit
from diffalign.engine.parallel import Parallel
from diffalign.engine.rollout_assembly import image_reward
from diffalign.engine.rounds import Rounds
from diffalign.errors import DiffalignError
from diffalign.evaluation.prompts import read_prompts
from diffalign.plan_online import Drawing
from diffalign.progress import Reporter
from diffalign.rewards import Reward, place
from diffalign.rewards.guard import Guarded
from diffalign.sampling.collection import Choose, Collector, check_rounds
from diffalign.sampling.prompt_choice import PromptChooser


class PromptSet:
    """The prompts that an online run draws for."""

    unit = "prompts"

    def __init__(self, prompts: list[str], description: str) -> None:
        self.prompts, self.description = prompts, description

    def __len__(self) -> int:
        return len(self.prompts)


def assemble_online(config: RunConfig, parallel: Parallel, reporter: Reporter) -> Ingredients:
    """The parts of a run whose method learns from samples that it draws itself.

    Raises:
        DiffalignError: bad model, prompts or reward, or a round that cannot be divided.
    """
    options = trainer_config(config)
    check_online(config, parallel)
    pictures = picture_prompts(config)
    prompts = open_prompts(config)
    opened = OpenedOnce(config, parallel)
    kind = trainer_class(config)
    reward = guarded(options.reward, opened().device, getattr(kind, "open_reward", image_reward))
    backbone = opened()
    trainer = kind(options, backbone, config.seed)
    trainer.reward = reward
    trainer.folder = config.folder
    if getattr(trainer, "wants_pictures", lambda _: False)(options):
        trainer.pictures = open_real(config, opened, parallel.is_main, reporter)
    collector = Collector(
        backbone,
        prompts.prompts,
        reward,
        trainer.sampler(0),
        guidance=options.sampling.guidance,
        groups=options.prompts_per_round,
        samples=options.samples,
        updates=options.updates,
        same_start=options.sampling.same_start,
        states=trainer.needs_trajectory,
        features=getattr(trainer, "features", None),
        say=trainer.say,
        seed=config.seed,
        rank=parallel.rank,
        world=parallel.world,
    )
    parts = generator_parts(config, trainer, prompts, None, pictures, reporter)
    parts.rounds = Rounds(config, parallel, trainer, collector, chooser(config, trainer, prompts), reporter)
    parts.best_metric = gold_metric(config, parts.monitor)
    reporter.say(rounds_line(config, prompts, parallel.world))
    return parts


def check_online(config: RunConfig, parallel: Parallel) -> None:
    """Refuse what an online run cannot use, before anything is loaded.

    Raises:
        DiffalignError: gradient accumulation, a kind of data, sharding, or a round that cannot be divided.
    """
    options = trainer_config(config)
    check_rounds(options.prompts_per_round, options.updates, parallel.world)
    if config.optim.accumulation != 1:
        raise DiffalignError(
            f"optim.accumulation is {config.optim.accumulation}, but trainer.method {config.trainer['method']} draws "
            "its own samples: all rows of an optimiser step are accumulated, optim.batch_size at a time. Set "
            "optim.accumulation=1, and trainer.updates for more or fewer optimiser steps a round."
        )
    if config.data.kind != "auto":
        raise DiffalignError(
            f"data.kind is {config.data.kind}, but trainer.method {config.trainer['method']} learns from its own "
            "samples. Set data.kind=auto."
        )
    if parallel.sharded:
        raise DiffalignError(
            f"trainer.method {config.trainer['method']} draws its own samples, which sharded runs (FSDP) do not "
            "support. Use one process or DDP (configs/accelerate/ddp.yaml)."
        )


def open_prompts(config: RunConfig) -> PromptSet:
    """The different prompts of `trainer.prompts`, or the captions of `data.source`.

    Raises:
        DiffalignError: there are none, or fewer than a round needs.
    """
    options, found = trainer_config(config), prompt_set(config)
    if len(found) < options.prompts_per_round:
        raise DiffalignError(
            f"{found.description}: {len(found)} different prompts, but trainer.prompts_per_round is "
            f"{options.prompts_per_round}; expected at least that many."
        )
    return found


def prompt_set(config: RunConfig) -> PromptSet:
    """The different prompts of `trainer.prompts`, or the captions of `data.source`.

    Raises:
        DiffalignError: they cannot be read.
    """
    options = trainer_config(config)
    if options.prompts is not None:
        texts, said = [prompt.text for prompt in read_prompts(options.prompts)], options.prompts
    else:
        records = open_records(config.data)
        texts, said = [row.prompt for row in records.rows], f"the captions of {records.description}"
    return PromptSet(list(dict.fromkeys(texts)), said)


def open_real(config: RunConfig, opener: OpenedOnce, builder: bool, reporter: Reporter) -> Any:
    """The encoded pictures of `data.source` that a method mixes with its own samples: those it chooses.

    Raises:
        DiffalignError: bad data, none that it takes, or a full disk.
    """
    found = open_pictures(config.data) if find_pictures(config.data) else open_records(config.data)
    return open_singles(config, Fit("pictures", found), opener, builder, reporter)


def guarded(spec: Any, device: Any, open_reward: Callable[[Any], Reward] = image_reward) -> Guarded:
    """The reward of a recipe on a device; samples that it fails on have no score and cost nothing else.

    Args:
        open_reward: what a method makes of the specification, if it takes other rewards than those of single pictures.

    Raises:
        DiffalignError: it does not score single pictures.
    """
    reward = place(open_reward(spec), device)
    return reward if isinstance(reward, Guarded) else Guarded(reward, on_error="skip")


def chooser(config: RunConfig, trainer: Any, prompts: PromptSet) -> Choose:
    """Which prompts a round takes: what the trainer says, else as `trainer.prompt_choice` says."""
    own = getattr(trainer, "choose_prompts", None)
    if own is not None:
        return lambda number, count: own(number, count, prompts.prompts)
    return PromptChooser(trainer.config.prompt_choice, config.seed, len(prompts))


def gold_metric(config: RunConfig, monitor: Any) -> str | None:
    """What decides which checkpoint is best: there are no held-out pairs, so the gold reward unless the recipe says."""
    default = EvaluationConfig.model_fields["best_metric"].default
    if monitor is None or config.evaluation.best_metric != default:
        return None
    return f"monitor/{monitor.gold}"


def rounds_line(config: RunConfig, prompts: PromptSet, world: int) -> str:
    """What a round is."""
    options = trainer_config(config)
    drawing = Drawing.of(options, config.optim.steps)
    return (
        f"{len(prompts)} prompts ({prompts.description}); a round draws {options.samples} samples for each of "
        f"{options.prompts_per_round} prompts on {world} process{'es' * (world > 1)} and takes {drawing.steps} "
        f"optimiser steps; {drawing.rounds} rounds"
    )
