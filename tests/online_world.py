"""A small online method and a run of it on a tiny random model, for the tests of rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign import trainers
from diffalign.config import RunConfig
from diffalign.engine import train
from diffalign.progress import Reporter
from diffalign.randomness import Draw
from diffalign.sampling.collection import Collected, tell
from diffalign.trainers.online import OnlineOptions, OnlineTrainer
from diffalign.trainers.online_rows import CleanRows, CleanTable, Rows, StepRows, StepTable

trainers.TRAINERS["climb"] = f"{__name__}:ClimbTrainer"
trainers.TRAINERS["imitate"] = f"{__name__}:ImitateTrainer"
PROMPTS = (
    "a red circle",
    "two blue squares",
    "a green star",
    "a yellow cross",
    "one red square",
    "a blue star",
)


class ClimbConfig(OnlineOptions):
    method: Literal["climb"] = "climb"


class ClimbTrainer(OnlineTrainer):
    """REINFORCE on the steps of a trajectory, rewards centred in their group."""

    Config = ClimbConfig
    needs_trajectory: ClassVar[bool] = True

    def learn(self, collected: Collected) -> tuple[Rows, dict[str, float]]:
        rewards = collected.rewards.view(-1, collected.samples)
        advantage = (rewards - rewards.nanmean(1, keepdim=True)).flatten()
        self.table = StepTable(collected, self.sampler(0).stochastic(self.backbone.process))
        self.advantage = advantage / self.gather(advantage[advantage.isfinite()]).std().clamp(min=1e-6)
        self.table.keep(self.advantage[self.table.sample].isfinite())
        return self.table.rows, {"advantages": float(advantage.isfinite().sum())}

    def batch(self, rows: Sequence[int], draw: Draw) -> StepRows:
        return self.table.take(rows, draw)

    def loss(self, batch: StepRows) -> tuple[Tensor, dict[str, Tensor]]:
        now = batch.transition(self.backbone, self.kernel())
        log_prob = now.log_prob(batch.x_prev)
        ratio = (log_prob - batch.old).exp()
        return -self.advantage[batch.sample.cpu()].to(ratio.device) * ratio, {"ratio": ratio}


class ImitateConfig(OnlineOptions):
    method: Literal["imitate"] = "imitate"


class ImitateTrainer(OnlineTrainer):
    """Denoising errors of each group's best sample."""

    Config = ImitateConfig
    asks_reference: ClassVar[bool] = False

    def learn(self, collected: Collected) -> tuple[Rows, dict[str, float]]:
        best = collected.rewards.view(-1, collected.samples).nan_to_num(-torch.inf).argmax(1)
        self.table = CleanTable(collected, best + torch.arange(len(best)) * collected.samples, draws=2)
        return self.table.rows, {}

    def batch(self, rows: Sequence[int], draw: Draw) -> CleanRows:
        return self.table.take(rows, draw)

    def loss(self, batch: CleanRows) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, target, t = batch.noised(self.backbone.process)
        error = (self.backbone.predict(x_t, t, batch.told.conditioning) - target).square().flatten(1).mean(1)
        return error, {"error": error.detach()}


def redness(pictures: Tensor, prompts: Any) -> Tensor:
    """How red a picture is: something a random model's pictures differ in."""
    return 1000 * (pictures[:, 0] - pictures[:, 1]).flatten(1).mean(1)


def a_round(trainer: Any, rewards: list[float], samples: int = 2, number: int = 0) -> Collected:
    """A round of random latents with these rewards, as the collector would give it; the trainer has drawn it."""
    count, backbone = len(rewards), trainer.backbone
    generator = torch.Generator().manual_seed(number)
    prompts = tuple(PROMPTS[row // samples] for row in range(count))
    collected = Collected(
        prompts=prompts,
        chosen=torch.arange(count) // samples,
        latents=torch.randn(count, *backbone.latent_shape, generator=generator),
        told=tell(backbone, prompts, trainer.config.sampling.guidance).to("cpu"),
        trajectory=None,
        rewards=torch.tensor(rewards),
        std=None,
        parts={},
        places=torch.arange(count) // samples,
        numbers=torch.arange(count),
        samples=samples,
        round=number,
    )
    with trainer.drawing(number):
        trainer.collected = collected
    return collected


def taken(trainer: Any, rows: Rows) -> Any:
    """All rows of a round as one batch."""
    numbers = rows.number.tolist()
    return trainer.batch(list(range(len(rows))), Draw(0, 0, numbers, list(range(len(rows))), len(rows)))


def gradient(trainer: Any, batch: Any) -> Tensor:
    """The gradient of the mean loss, all weights in one vector."""
    parameters = [p for _, p in trainer.backbone.trainable_parameters()]
    found = torch.autograd.grad(trainer.loss(batch)[0].mean(), parameters)
    return torch.cat([g.flatten() for g in found])


def run_config(model: Path, folder: Path, name: str, method: str = "climb", **changes: Any) -> RunConfig:
    """A run of two updates a round on 4 prompts x 3 samples; keys of `changes` are `section__key`."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    values: dict[str, Any] = {
        "name": name,
        "output_dir": str(folder),
        "model": {"path": str(model), "precision": "fp32"},
        "data": {"source": "scenes:preferences", "resolution": 64},
        "trainer": {
            "method": method,
            "reward": "online_world:redness",
            "prompts": str(prompts),
            "prompts_per_round": 4,
            "samples": 3,
            "updates": 2,
            "sampling": {"steps": 3, "guidance": 3.0, "batch_size": 6},
        },
        "optim": {"steps": 6, "batch_size": 8, "lr": 1e-3, "warmup": 0},
        "checkpoint": {"every": 100},
    }
    for key, value in changes.items():
        section, _, option = key.partition("__")
        values[section][option] = value
    return RunConfig.model_validate(values)


def run(config: RunConfig, resume: bool = False) -> Any:
    """Train quietly."""
    return train(config, resume=resume, reporter=Reporter(enabled=False))
