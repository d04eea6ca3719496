"""A linear model, its trainer and data: everything the engine needs, small enough to train in milliseconds.

Run as a program (`python engine_fakes.py OUTPUT_DIR [key=value ...] [--resume]`) it trains, so that the engine
can be tried under launchers and signals by hand.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffalign import trainers
from diffalign.config import RunConfig
from diffalign.engine.assembly import Ingredients
from diffalign.engine.parallel import Parallel
from diffalign.errors import DiffalignError
from diffalign.progress import Reporter
from diffalign.randomness import Draw
from diffalign.strict import StrictModel
from diffalign.yamls import apply_override

WIDTH = 6
trainers.TRAINERS["linear"] = f"{__name__}:LinearTrainer"


@dataclass
class Rows:
    """A batch: inputs `[B, WIDTH]`, targets `[B]`."""

    inputs: Tensor
    targets: Tensor
    draw: Draw

    def to(self, device: torch.device) -> Rows:
        return Rows(self.inputs.to(device), self.targets.to(device), self.draw)


class LinearConfig(StrictModel):
    method: Literal["linear"] = "linear"
    beta: float = 1.0
    """Factor of the loss."""
    nan_from: int = -1
    """First step whose loss is NaN; -1: none."""
    nan_until: int = 10**9
    """First step after those."""
    kill_at: int = -1
    """Step at which the process kills itself without any clean-up."""
    signal_at: int = -1
    """Step at which the process sends itself SIGTERM."""


class LinearTrainer:
    """Least squares with dropout and noise that belongs to (step, record)."""

    Config = LinearConfig
    data_kinds = ("pairs",)
    tunes = ("lora", "full")

    def __init__(self, config: LinearConfig, backbone: LinearBackbone):
        self.config, self.backbone = config, backbone

    def fetch(self, draw: Draw) -> Rows:
        weights = torch.linspace(-1, 1, WIDTH)
        inputs = torch.stack([torch.sin(torch.arange(WIDTH) * (r + 1.0)) for r in draw.records])
        return Rows(inputs + 0.1 * draw.normal((WIDTH,), "noise"), inputs @ weights, draw)

    def loss(self, batch: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        step = batch.draw.step
        if step == self.config.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.config.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        errors = self.backbone.network(batch.inputs).squeeze(-1) - batch.targets
        losses = self.config.beta * errors.square()
        if self.config.nan_from <= step < self.config.nan_until and self.config.nan_from >= 0:
            losses = losses * torch.nan
        return losses, {
            "implicit_accuracy": (errors.detach().abs() < 0.5).float(),
            "margin": -errors.detach(),
        }


class LinearBackbone:
    """A two-layer network of which the second half is trained."""

    dtype = torch.float32

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(7)
        self.core = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.core[0].requires_grad_(False)
        self.network: nn.Module = self.core

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.core.named_parameters() if p.requires_grad]

    def trainable_state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.trainable_parameters()}


class Picture:
    """Stands for a PIL image."""

    def save(self, path: Path) -> None:
        from PIL import Image

        Image.new("RGB", (4, 4), "red").save(path)


def assemble(config: RunConfig, parallel: Parallel, reporter: Reporter) -> Ingredients:
    backbone = LinearBackbone(config.model.lora.dropout)
    backbone.core.to(parallel.device)
    trainer = LinearTrainer(LinearConfig(**config.trainer), backbone)

    def evaluate() -> dict[str, float]:
        held_out = Draw(99, 0, range(40), range(40), 40)
        backbone.core.eval()
        with torch.no_grad():
            losses, metrics = trainer.loss(trainer.fetch(held_out).to(parallel.device))
        backbone.core.train()
        return {
            "held_out/implicit_accuracy": float(metrics["implicit_accuracy"].mean()),
            "held_out/loss": float(losses.mean()),
        }

    pictures = Picture if config.evaluation.prompts else None
    return Ingredients(backbone, trainer, range(37), evaluate, pictures, summary="linear world")


def run_config(output: Path, *overrides: str) -> RunConfig:
    values: dict[str, Any] = {
        "name": "run",
        "output_dir": str(output),
        "model": {"path": "linear", "lora": {"dropout": 0.2}},
        "data": {"source": "none", "resolution": 64},
        "trainer": {"method": "linear"},
        "optim": {"lr": 1e-2, "steps": 12, "batch_size": 4, "warmup": 3, "schedule": "cosine"},
        "checkpoint": {"every": 4},
    }
    for override in overrides:
        apply_override(values, override)
    return RunConfig.model_validate(values)


def kill_in_step(at: int) -> None:
    """`kill -9` in the middle of a step."""
    original = LinearTrainer.loss

    def loss(self: LinearTrainer, batch: Any) -> Any:
        if batch.draw.step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batch)

    LinearTrainer.loss = loss


def main(arguments: list[str]) -> int:
    from diffalign.engine import train
    from diffalign.engine.parallel import end_together

    torch.set_num_threads(1)
    if "KILL_AT" in os.environ:
        kill_in_step(int(os.environ["KILL_AT"]))
    overrides = [argument for argument in arguments[1:] if "=" in argument]
    try:
        result = train(
            run_config(Path(arguments[0]), *overrides), resume="--resume" in arguments, assemble=assemble
        )
    except DiffalignError as error:
        print(error, file=sys.stderr)
        return 2
    return end_together(result.exit_code)


if __name__ == "__main__":
    # Under this name the trainer is importable as the table of trainers says.
    sys.modules["engine_fakes"] = sys.modules["__main__"]
    trainers.TRAINERS["linear"] = "engine_fakes:LinearTrainer"
    sys.exit(main(sys.argv[1:]))
