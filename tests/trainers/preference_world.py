"""Shared steps of the trainer tests: open a trainer on cached scenes, train it, compare gradients and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pair_world import open_model, open_pairs, whole_draw

from diffalign.trainers import trainer_class


def make(
    method: str, model: Path, folder: Path, labels: str = "given", opening: Any = None, **options: Any
) -> Any:
    """A prepared trainer of `method` on six pairs of scenes."""
    backbone = open_model(model, **(opening or {}))
    kind = trainer_class(method)
    trainer = kind(kind.Config(**options), backbone, seed=0)
    trainer.prepare(open_pairs(backbone, folder, labels=labels))
    return trainer


def train(trainer: Any, first: int, last: int, lr: float = 3e-3, optimizer: Any = None) -> Any:
    """Steps `first` to `last` - 1, each on the draw that belongs to it; returns the optimiser."""
    parameters = [p for _, p in trainer.backbone.trainable_parameters()]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=lr)
    for step in range(first, last):
        optimizer.zero_grad()
        losses, metrics = trainer.loss(trainer.fetch(whole_draw(step=step)))
        assert losses.shape == (4,)
        assert all(value.shape == (4,) and not value.requires_grad for value in metrics.values())
        losses.mean().backward()
        optimizer.step()
    return optimizer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of the trained weights."""
    return {name: value.clone() for name, value in trainer.backbone.trainable_state().items()}
