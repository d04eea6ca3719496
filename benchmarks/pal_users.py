"""PAL on a synthetic population of two kinds of users: does a second prototype help, and do 8 pairs fit a new user?

    python -m benchmarks.pal_users
    python -m benchmarks.pal_users --users 200 --form angle --json pal.json

Items are random unit vectors. A user prefers the item nearer to the ideal point of their kind, and says so with
Bradley-Terry noise; accuracy is measured against what they really prefer, on pairs nobody saw.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffalign.config import RunConfig, trainer_config
from diffalign.data.features import JudgedPairs, Store
from diffalign.data.judged import Judgements
from diffalign.engine import train
from diffalign.engine.assembly import Ingredients
from diffalign.engine.parallel import Parallel
from diffalign.engine.scorer_assembly import ScorerBackbone
from diffalign.evaluation.statistics import paired_difference
from diffalign.progress import Reporter
from diffalign.randomness import generator
from diffalign.rewards.heads import PALHead, build_head
from diffalign.rewards.preference_head import RewardNetwork
from diffalign.trainers.pal import PALTrainer, fit_users

NOISE = 4.0


@dataclass(frozen=True)
class World:
    """The population.

    Fields:
        users: known users, half of each kind. pairs: training pairs of each. new_users: users never trained on.
        few: pairs a new user gives. test: pairs each user is tested on. width: size of the items. seed: of all draws.
    """

    users: int = 100
    pairs: int = 20
    new_users: int = 100
    few: int = 8
    test: int = 40
    width: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Answers:
    """Pairs of users: items `[U, N, 2, D]`, and whether the first is labelled (noisy) and really preferred `[U, N]`."""

    items: Tensor
    labelled: Tensor
    preferred: Tensor


def ask(world: World, users: int, pairs: int, purpose: str) -> Answers:
    """Let `users` (every second one of the other kind) judge `pairs` random pairs each."""
    draws = generator("pal users", world.seed, purpose)
    ideals = torch.eye(world.width)[:2].repeat((users + 1) // 2, 1)[:users]
    items = torch.nn.functional.normalize(torch.randn(users, pairs, 2, world.width, generator=draws), dim=-1)
    distance = torch.linalg.vector_norm(items - ideals[:, None, None], dim=-1)
    margin = NOISE * (distance[..., 1] - distance[..., 0])
    labelled = torch.rand(margin.shape, generator=draws) < margin.sigmoid()
    return Answers(items, labelled, margin > 0)


def as_pairs(answers: Answers) -> JudgedPairs:
    """Answers as training data of one prompt."""
    users, pairs, _, width = answers.items.shape
    count = users * pairs
    store = Store(
        Path(),
        [],
        np.ones(count, bool),
        torch.zeros(count, 2, dtype=torch.int64),
        ("",),
        torch.full((1, width), 1 / math.sqrt(width)),
        [answers.items.flatten(0, 1)],
        np.stack([np.zeros(count, np.int64), np.arange(count)], 1),
        0.0,
    )
    judged = Judgements(
        np.arange(count),
        (~answers.labelled).long().flatten(),
        torch.ones(count, 1),
        torch.ones(count),
        torch.arange(users).repeat_interleave(pairs),
        ("overall",),
        tuple(f"user {i}" for i in range(users)),
    )
    return JudgedPairs(store, judged)


def train_pal(pairs: JudgedPairs, prototypes: int, form: str, steps: int, folder: Path) -> PALHead:
    """Train PAL with the engine."""
    config = RunConfig.model_validate(
        {
            "name": f"prototypes-{prototypes}",
            "output_dir": str(folder),
            "model": {"path": "synthetic", "tune": "head"},
            "data": {"source": "synthetic", "resolution": 64},
            "trainer": {"method": "pal", "prototypes": prototypes, "form": form, "size": 16},
            "optim": {"lr": 1e-2, "steps": steps, "batch_size": 128, "schedule": "cosine", "warmup": 10},
        }
    )
    options = trainer_config(config)
    spec = PALTrainer.spec(options, pairs.store.width, 1.0, pairs.judgements.names, config.seed)
    backbone = ScorerBackbone(RewardNetwork(build_head(spec)))

    def assemble(config: RunConfig, parallel: Parallel, reporter: Reporter) -> Ingredients:
        trainer = PALTrainer(options, backbone)
        trainer.prepare(pairs)
        return Ingredients(backbone, trainer, pairs)

    train(config, assemble=assemble, reporter=Reporter(enabled=False))
    return backbone.core.head.eval()


@torch.no_grad()
def accuracy(head: PALHead, answers: Answers, weights: Tensor) -> np.ndarray:
    """1 where the model orders a pair as the user really does, `[U * N]`; users have mixture `weights` `[U, K]`."""
    users, pairs, _, width = answers.items.shape
    items = answers.items.flatten(0, 2)
    texts = torch.full((1, width), 1 / math.sqrt(width)).expand(len(items), -1)
    scores = head.scores(items, texts, weights.repeat_interleave(2 * pairs, 0)).view(users, pairs, 2)
    return ((scores[..., 0] > scores[..., 1]) == answers.preferred).float().flatten().numpy()


def experiment(world: World, form: str = "distance", steps: int = 400) -> dict[str, Any]:
    """Known users: one prototype against two. New users: the population's mean against a fit of a few pairs.

    Returns:
        per comparison: accuracies of both, and their difference with its 95 % interval (bootstrap over users).
    """
    pairs = as_pairs(ask(world, world.users, world.pairs, "train"))
    known, few = ask(world, world.users, world.test, "test"), ask(world, world.new_users, world.few, "few")
    new = ask(world, world.new_users, world.test, "new test")
    with tempfile.TemporaryDirectory() as folder:
        one, two = (train_pal(pairs, k, form, steps, Path(folder)) for k in (1, 2))
    everyone = torch.arange(world.users)
    with torch.no_grad():
        known_one, known_two = (
            accuracy(head, known, head.weights(everyone, world.users)) for head in (one, two)
        )
        mean = accuracy(two, new, two.weights(None, world.new_users))
        single = accuracy(one, new, one.weights(None, world.new_users))
    texts = torch.full_like(few.items, 1 / math.sqrt(world.width))
    fitted = accuracy(two, new, fit_users(two, few.items, texts, few.labelled.float()))
    known_users = np.repeat(np.arange(world.users), world.test)
    new_users = np.repeat(np.arange(world.new_users), world.test)
    return {
        "known users: 1 prototype against 2": asdict(paired_difference(known_one, known_two, known_users)),
        f"new users: population mean against {world.few} pairs": asdict(
            paired_difference(mean, fitted, new_users)
        ),
        f"new users: 1 prototype against {world.few} pairs": asdict(
            paired_difference(single, fitted, new_users)
        ),
    }


def main(
    users: Annotated[int, typer.Option(min=2, help="Known users, and as many new ones.")] = 100,
    pairs: Annotated[int, typer.Option(min=1, help="Training pairs of a known user.")] = 20,
    few: Annotated[int, typer.Option(min=1, help="Pairs of a new user.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 400,
    form: Annotated[str, typer.Option(help="distance (PAL-A) or angle (PAL-B).")] = "distance",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all numbers here.")] = None,
) -> None:
    """Print accuracies and differences with 95 % intervals."""
    result = experiment(World(users, pairs, users, few, seed=seed), form, steps)
    table = Table("comparison", "first", "second", "difference", "95 % interval", title=f"PAL, form {form}")
    for name, found in result.items():
        low, high = found["interval"]
        table.add_row(
            name,
            f"{100 * found['base']:.1f} %",
            f"{100 * found['tuned']:.1f} %",
            f"{100 * found['difference']:+.1f}",
            f"{100 * low:+.1f} .. {100 * high:+.1f}",
        )
    Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
