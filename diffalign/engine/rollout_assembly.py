"""Puts a run on stored rollouts together: the base model draws, a reward judges, training reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffalign import backbones
from diffalign.config import RunConfig, trainer_class, trainer_config
from diffalign.data.keys import resolve_precision
from diffalign.data.records import Records
from diffalign.data.rollouts import INDEX, RolloutJob, RolloutStore, store_rollouts
from diffalign.data.shards import CorruptShard
from diffalign.data.sources import open_held_out, open_records
from diffalign.data.step_pairs import StepPairs
from diffalign.data.store import wait_for
from diffalign.engine.assembly import Ingredients, OpenedOnce, generator_parts, picture_prompts
from diffalign.engine.parallel import Parallel
from diffalign.errors import DiffalignError
from diffalign.evaluation.statistics import wilson
from diffalign.progress import Reporter
from diffalign.randomness import Draw, generator
from diffalign.rewards import Reward, load_reward, place

WAIT_SECONDS = 24 * 3600.0


def assemble_rollouts(config: RunConfig, parallel: Parallel, reporter: Reporter) -> Ingredients:
    """The parts of a run that learns from rollouts of its own base model.

    Raises:
        DiffalignError: bad model, prompts or reward, or nothing in the rollouts differs.
    """
    pictures = picture_prompts(config)
    opened = OpenedOnce(config, parallel)
    pairs, held_out = open_rollouts(config, opened, parallel.is_main, reporter)
    backbone = opened()
    backbone.release_encoders()
    trainer = trainer_class(config)(trainer_config(config), backbone, config.seed)
    trainer.prepare(pairs)
    rows = config.optim.batch_size
    evaluate = None if held_out is None else partial(step_accuracy, trainer, backbone, held_out, rows)
    return generator_parts(config, trainer, pairs, evaluate, pictures, reporter)


def open_rollouts(
    config: RunConfig, opener: Callable[[], Any], builder: bool, reporter: Reporter
) -> tuple[StepPairs, StepPairs | None]:
    """Training pairs of steps and held-out ones (None when there are none), drawn where still missing.

    Raises:
        DiffalignError: bad model, prompts or reward, or a full disk.
    """
    options = trainer_config(config)
    wanted = options.rollouts
    prompts = choose_prompts(
        open_records(config.data), wanted.prompts, config.seed, "trainer.rollouts.prompts"
    )
    others = open_held_out(config.data) if wanted.held_out_prompts else None
    reward = image_reward(options.reward)
    build = partial(_stored, config, opener, reward, builder, reporter)
    pairs = build(prompts)
    if others is None:
        return pairs, None
    name = "trainer.rollouts.held_out_prompts"
    return pairs, build(choose_prompts(others, wanted.held_out_prompts, config.seed, name))


def choose_prompts(records: Records, count: int, seed: int, option: str) -> tuple[str, ...]:
    """`count` different captions of a data set, in an order that belongs to the seed.

    Raises:
        DiffalignError: there are fewer.
    """
    found = list(dict.fromkeys(row.prompt for row in records.rows))
    if len(found) < count:
        raise DiffalignError(
            f"{option} is {count}, but {records.description} has {len(found)} different captions; expected at most "
            "that many."
        )
    order = torch.randperm(len(found), generator=generator(seed, "rollout prompts")).tolist()
    return tuple(found[i] for i in order[:count])


def image_reward(spec: Any) -> Reward:
    """The reward that prefers.

    Raises:
        DiffalignError: it does not score single pictures.
    """
    reward = load_reward(spec)
    if reward.kind != "sample" or reward.modality != "image":
        raise DiffalignError(
            f"trainer.reward {reward.name!r} scores {reward.modality} of kind {reward.kind}; expected a reward "
            "of single pictures."
        )
    return reward


@torch.no_grad()
def step_accuracy(trainer: Any, backbone: Any, pairs: StepPairs, batch_size: int) -> dict[str, float]:
    """Share of held-out pairs of steps whose margin is above 0, 0 counting half, with its 95 % interval."""
    margins = []
    for start in range(0, len(pairs), batch_size):
        rows = range(start, min(start + batch_size, len(pairs)))
        batch = pairs.fetch(Draw(0, 0, rows, rows, len(pairs))).to(backbone.device)
        margins.append(trainer.margin(batch).double().cpu())
    margin = torch.cat(margins)
    right = float((margin > 0).sum()) + 0.5 * float((margin == 0).sum())
    low, high = wilson(right, len(margin))
    return {
        "held_out/implicit_accuracy": right / len(margin),
        "held_out/implicit_accuracy_low": low,
        "held_out/implicit_accuracy_high": high,
        "held_out/margin": float(margin.mean()),
        "held_out/pairs": float(len(margin)),
    }


def _stored(
    config: RunConfig,
    opener: Callable[[], Any],
    reward: Reward,
    builder: bool,
    reporter: Reporter,
    prompts: tuple[str, ...],
) -> StepPairs:
    """The pairs of steps of some prompts; drawn by the builder, awaited by the other processes."""
    options, backbone, kind = trainer_config(config), opener(), trainer_class(config)
    job: RolloutJob = kind.job(options, backbone, prompts, config.seed)
    key = job.key(
        backbones.model_fingerprint(config.model, network=True),
        resolve_precision(config.model.precision),
        config.data.resolution,
        json.dumps(options.reward, sort_keys=True),
    )
    folder = Path(config.data.cache_dir) / f"rollouts-{key}"
    if builder:
        store = _open(folder, key)
        if store is None:
            placed = place(reward, backbone.device)
            with backbone.inference():
                store = store_rollouts(folder, backbone, job, placed, key=key, progress=reporter)
    else:
        wait_for(lambda: _open(folder, key) is not None, folder / INDEX, WAIT_SECONDS)
        store = RolloutStore.open(folder, key)
    pairs: StepPairs = kind.pairs(options, backbone, store)
    reporter.say(f"{len(pairs)} {pairs.unit} of {len(prompts)} prompts' rollouts in {folder}")
    return pairs


def _open(folder: Path, key: str) -> RolloutStore | None:
    """The rollouts, when they are complete."""
    try:
        return RolloutStore.open(folder, key)
    except CorruptShard:
        return None
