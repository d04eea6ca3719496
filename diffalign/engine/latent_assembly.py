"""Puts a run together that trains a reward of noisy latents: frozen generator, head, cached pairs, final files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.backbones import Backbone, model_fingerprint
from diffalign.backbones.early import default_layer, early_states
from diffalign.config import RunConfig, trainer_class, trainer_config
from diffalign.data.batch import PairBatch
from diffalign.engine.assembly import Ingredients, OpenedOnce, open_caches
from diffalign.engine.curriculum import open_curriculum
from diffalign.engine.fit import Fit
from diffalign.engine.parallel import Parallel
from diffalign.errors import DiffalignError
from diffalign.evaluation.statistics import wilson
from diffalign.inference.latent_reward import DESCRIPTION, MODEL_KEYS
from diffalign.objectives.reward_model import bradley_terry_loss, credit
from diffalign.progress import Reporter
from diffalign.randomness import Draw, derive_seed
from diffalign.sampling.latent_scorer import HeadSpec, LatentHead, LatentScorer, caption_vector
from diffalign.versions import versions

BINS = {"clean": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "noisy": (2 / 3, 1.0)}
"""Thirds of the schedule: sampling ends in the first and begins in the last."""
DRAWS = 2
"""Draws of noise and time a held-out pair and third."""
ONE_PROCESS = "use one process or DDP (configs/accelerate/ddp.yaml)"


def assemble_latent_reward(
    config: RunConfig, fit: Fit, parallel: Parallel, reporter: Reporter
) -> Ingredients:
    """The parts of a run; pairs are encoded on first use, by the first process.

    Raises:
        DiffalignError: bad model or data, an option that only tuned generators have, or sharding.
    """
    _refuse(config, parallel)
    options, opened = trainer_config(config), OpenedOnce(config, parallel)
    cache, held_out = open_caches(config, fit, opened, parallel.is_main, reporter)
    generator = opened()
    generator.core.eval()
    generator.unconditional(1)
    generator.release_encoders()
    scorer = build_scorer(options, generator, cache.fetch(Draw(0, 0, [0], [0], 1)), config.seed)
    trainer = trainer_class(config)(options, scorer, config.seed)
    trainer.prepare(cache)
    rows, seed = config.optim.batch_size, config.evaluation.seed
    return Ingredients(
        scorer,
        trainer,
        cache,
        None if held_out is None else lambda: held_out_accuracy(trainer, held_out, seed, rows),
        export=lambda folder: write_description(folder, config, scorer),
        summary=_summary(config, scorer),
        curriculum=open_curriculum(config, cache),
        unit=cache.unit,
    )


def build_scorer(options: Any, generator: Backbone, sample: PairBatch, seed: int) -> LatentScorer:
    """A scorer with an untrained head; its sizes are those of a pair's states and caption."""
    layer = options.layer or default_layer(generator.core)
    cond, device = sample.conditioning_chosen.to(generator.device), generator.device
    t = generator.process.times(torch.tensor([0.5])).to(device)
    with torch.no_grad():
        states = early_states(generator, sample.chosen.to(device), t, cond, layer)
    spec = HeadSpec(
        states.shape[-1],
        caption_vector(cond).shape[-1],
        options.hidden,
        options.dropout,
        derive_seed(seed, "head"),
    )
    return LatentScorer(generator, LatentHead(spec).to(device), layer, options.guidance)


def held_out_accuracy(trainer: Any, cache: Any, seed: int, batch_size: int) -> dict[str, float]:
    """Share of decided held-out pairs whose better picture scores higher, by noise level and in all; with log-loss.

    Each pair is seen at `DRAWS` times of each third of the schedule, with fixed noise. Intervals are Wilson's for the
    number of pairs, since the draws of a pair are not independent.
    """
    right, losses, found = [], [], {}
    for number, (name, (low, high)) in enumerate(BINS.items()):
        margin, preference = _margins(
            trainer, cache, derive_seed(seed, "held_out", number), batch_size, low, high
        )
        decided = preference != 0.5
        share = credit(margin, preference).mean(0)[decided]
        right.append(share)
        losses.append(bradley_terry_loss(margin, preference).mean(0)[decided])
        found[f"held_out/accuracy_{name}"] = float(share.mean())
    pairs, mean = len(right[0]), float(torch.stack(right).mean())
    interval = wilson(mean * pairs, pairs) if pairs else (mean, mean)
    return {
        "held_out/accuracy": mean,
        "held_out/accuracy_low": interval[0],
        "held_out/accuracy_high": interval[1],
        **found,
        "held_out/log_loss": float(torch.stack(losses).mean()),
        "held_out/pairs": float(pairs),
    }


def write_description(folder: Path, config: RunConfig, scorer: LatentScorer) -> None:
    """`latent_reward.json`: what `LatentReward` needs beside the weights."""
    generator = scorer.generator
    facts = {
        "name": config.name,
        "model": config.model.model_dump(include=set(MODEL_KEYS)),
        "fingerprint": model_fingerprint(config.model, network=True),
        "latent_shape": list(generator.latent_shape),
        "resolution": generator.resolution[0],
        "layer": scorer.layer,
        "guidance": scorer.guidance,
        "head": scorer.core.spec.__dict__,
        "versions": versions(),
    }
    (folder / DESCRIPTION).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _margins(
    trainer: Any, cache: Any, key: int, batch_size: int, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Margins `[D, N]` of all pairs at D draws, and their preferences `[N]`, in float64 on the CPU."""
    size, draws, preferences = len(cache), [], []
    for step in range(DRAWS):
        rows = []
        for start in range(0, size, batch_size):
            part = range(start, min(start + batch_size, size))
            draw = Draw(key, step, part, part, size)
            batch = cache.fetch(draw).to(trainer.backbone.device)
            rows.append(trainer.margins_between(batch, draw, low, high).double().cpu())
            preferences += [batch.preference.double().cpu()] if step == 0 else []
        draws.append(torch.cat(rows))
    return torch.stack(draws), torch.cat(preferences)


def _refuse(config: RunConfig, parallel: Parallel) -> None:
    """Options that mean nothing where a head alone is trained.

    Raises:
        DiffalignError: one is set.
    """
    method = config.trainer["method"]
    if parallel.sharded:
        raise DiffalignError(f"trainer.method {method} trains a small head; {ONE_PROCESS}.")
    for name in ("compile", "gradient_checkpointing"):
        if getattr(config.model, name):
            raise DiffalignError(
                f"model.{name} is true, but trainer.method {method} reads a frozen network up to a layer; set it to "
                "false."
            )


def _summary(config: RunConfig, scorer: LatentScorer) -> str:
    shown = ", ".join(f"{name} {value}" for name, value in config.trainer.items() if name != "method")
    weights = sum(p.numel() for _, p in scorer.trainable_parameters())
    return (
        f"{config.trainer['method']}: {shown}\nhead of {weights:,} weights on {scorer.layer} of {config.model.path}, "
        "which is frozen"
    )
