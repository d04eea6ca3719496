"""The regulariser of Smooth Diffusion beside the loss of any offline method: penalties, and their running mean.

Guo et al. 2024, arXiv 2312.04410; the maths is in `diffalign/smoothness.py`. A method needs to know nothing of it: one
noised picture of each record is predicted once more, and the penalty's gradients are added to those of the loss.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffalign.backbones.base import Backbone
from diffalign.conditioning import Conditioning
from diffalign.config import RunConfig
from diffalign.data.batch import GroupBatch, PairBatch, UnpairedBatch
from diffalign.engine.parallel import Parallel
from diffalign.errors import DiffalignError
from diffalign.randomness import Draw
from diffalign.smoothness import running_mean, step_variation
from diffalign.smoothness_config import SmoothnessConfig

AnyBatch = PairBatch | UnpairedBatch | GroupBatch


class Smoothing:
    """The penalty on a run's batches.

    The running mean is one number for all processes. It stays as it is during an optimiser step and then takes in the
    mean over the whole step, so that the batch split changes nothing; a skipped step leaves it alone.

    Fields:
        mean: the running mean `[]`, float32. steps: how many are in it `[]`; the first one only measures.
    """

    def __init__(self, options: SmoothnessConfig, trainer: Any, seed: int, parallel: Parallel) -> None:
        self.options, self.parallel, self.seed = options, parallel, seed
        self.backbone: Backbone = trainer.backbone
        self._noising = trainer.config
        self.mean = self.steps = torch.zeros((), device=parallel.device)
        self._pending = self._sums = self._nothing()

    def backward(self, batch: AnyBatch, step: int, factor: float) -> None:
        """Add the gradients of `weight` times the penalties of a micro-batch.

        Args:
            step: the optimiser step, which decides directions and shares. factor: of each record's part of the loss.
        """
        # A batch of stored reference errors has noise of its own; directions are drawn at every step all the same.
        draw = replace(batch.draw, seed=self.seed, step=step)
        rows = self._rows(draw)
        if not rows:
            return
        # Also around the backward pass: gradient checkpointing runs attention there once more.
        with sdpa_kernel(SDPBackend.MATH):
            variation = self._variation(batch, draw, rows)
            penalty = (variation - self.mean).square() * (self.steps > 0)
            scale = factor * self.options.weight / self.options.share
            (penalty.sum() * scale).backward()  # type: ignore[no-untyped-call]
        found = torch.stack([variation.detach().sum(), penalty.detach().sum()])
        self._pending = self._pending + torch.cat([found, found.new_tensor([len(rows)])])

    def commit(self) -> None:
        """Count the step that was made; every process must call this."""
        found = self.parallel.sum(self._pending)
        self._sums = self._sums + found
        moved = running_mean(self.mean, found[0] / found[2].clamp(min=1), self.options.decay, self.steps)
        self.mean = torch.where(found[2] > 0, moved, self.mean)
        self.steps = self.steps + (found[2] > 0)
        self.discard()

    def discard(self) -> None:
        """Forget the step that was skipped."""
        self._pending = self._nothing()

    def metrics(self) -> dict[str, float]:
        """Means over all processes since the last call, and the running mean; empty when nothing was penalised."""
        variation, penalty, count = self._sums.tolist()
        self._sums = self._nothing()
        if not count:
            return {}
        return {
            "smoothness/variation": variation / count,
            "smoothness/penalty": penalty / count,
            "smoothness/running_mean": float(self.mean),
        }

    def state(self) -> dict[str, float]:
        """The running mean and the steps in it, which a checkpoint needs."""
        return {"mean": float(self.mean), "steps": float(self.steps)}

    def restore(self, state: dict[str, float]) -> None:
        """Take back what `state` gave."""
        self.mean, self.steps = (torch.full_like(self.mean, state[name]) for name in ("mean", "steps"))

    def _nothing(self) -> Tensor:
        """Sums of variations and penalties, and their number."""
        return torch.zeros(3, device=self.mean.device)

    def _rows(self, draw: Draw) -> list[int]:
        """Rows of the micro-batch that are penalised."""
        if self.options.share == 1:
            return list(range(len(draw)))
        chosen = draw.uniform("smoothness share") < self.options.share
        return [row for row, taken in enumerate(chosen.tolist()) if taken]

    def _variation(self, batch: AnyBatch, draw: Draw, rows: list[int]) -> Tensor:
        """Step variations of the rows `[R]`, at noise and times of the training draw."""
        x0, told = one_picture(batch)
        x0, told = x0[rows].float(), told.select(rows)
        device, process, shape = x0.device, self.backbone.process, tuple(x0.shape[1:])
        uniform = batch.draw.uniform("time", stratified=self._noising.stratified_times)
        t = process.times(uniform[rows], self._noising.time_weighting).to(device)
        noise = rows_of(batch.draw, rows).normal(shape, "noise").to(device).requires_grad_()
        delta = rows_of(draw, rows).normal(shape, "smoothness").to(device)
        x_t = process.noise(x0, noise, t)
        clean = process.to_x0(self.backbone.predict(x_t, t, told), x_t, t)
        return step_variation(clean, noise, delta, process.alpha_sigma(t)[1])


def open_smoothing(config: RunConfig, trainer: Any, parallel: Parallel) -> Smoothing | None:
    """The regulariser of a recipe; None where it is off.

    Raises:
        DiffalignError: the run is sharded.
    """
    if config.smoothness is None:
        return None
    if parallel.sharded:
        raise DiffalignError(
            "smoothness is on, which sharded runs (FSDP) do not support: gathered weights are gone when its gradient "
            "is differentiated again. Use one process or DDP, or remove the section smoothness."
        )
    return Smoothing(config.smoothness, trainer, config.seed, parallel)


def one_picture(batch: AnyBatch) -> tuple[Tensor, Conditioning]:
    """Latents `[B, C, h, w]` and conditioning of a picture of each record: the chosen one of a pair, the first of a
    group as it was fetched.
    """
    if isinstance(batch, PairBatch):
        return batch.chosen, batch.conditioning_chosen
    if isinstance(batch, GroupBatch):
        count, size = batch.latents.shape[:2]
        return batch.latents[:, 0], batch.conditioning.select(range(0, count * size, size))
    return batch.latents, batch.conditioning


def rows_of(draw: Draw, rows: list[int]) -> Draw:
    """Some rows of a draw as a draw of their own."""
    return replace(draw, records=[draw.records[r] for r in rows], positions=[draw.positions[r] for r in rows])
