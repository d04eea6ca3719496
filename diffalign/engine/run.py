"""The changing part of a run: weights, optimiser, averages, counters; a step, a snapshot, a restore."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from diffalign.config import RunConfig
from diffalign.engine.checkpoints import (
    Checkpoint,
    optimizer_tensors,
    parameter_tensors,
    restore_optimizer,
    restore_parameters,
)
from diffalign.engine.curriculum import Curriculum, anchored
from diffalign.engine.optim import (
    LossScale,
    WeightAverage,
    build_optimizer,
    gradient_norm,
    learning_rate,
    rescale_gradients,
    set_learning_rate,
)
from diffalign.engine.parallel import Parallel, whole
from diffalign.engine.smoothing import Smoothing
from diffalign.metrics import Meter
from diffalign.randomness import Draw, batch_records, derive_seed


class Batch(Protocol):
    """What a cache gives for a draw."""

    draw: Draw

    def to(self, device: torch.device) -> Any:
        """The same batch on a device."""


class Trainable(Protocol):
    """What the engine needs of a backbone."""

    network: nn.Module

    def trainable_parameters(self) -> list[tuple[str, Parameter]]:
        """Names and parameters of everything that is trained."""

    def trainable_state(self) -> dict[str, Tensor]:
        """Trained weights under the names they are stored by, sharing memory with the network."""


class Loss(Protocol):
    """What the engine needs of a trainer."""

    def fetch(self, draw: Draw) -> Batch:
        """The batch of a draw, on the CPU; called on another thread."""

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-example losses `[B]` and per-example metrics, each `[B]`."""


@dataclass
class Counters:
    """Cumulative over interruptions.

    Fields:
        step: optimiser steps done, skipped ones included. pairs: examples seen by all processes.
        skipped: steps left out because loss or gradient was not finite.
        skipped_in_a_row: those since the last good step.
        overflows: fp16 steps left out while the loss scale adapted. updates: steps that moved the weights.
        best_value, best_step: best evaluation so far.
    """

    step: int = 0
    pairs: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    overflows: int = 0
    updates: int = 0
    best_value: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class Share:
    """Of an optimiser step: its micro-batches on this process, and its rows over all processes."""

    micro_steps: int
    rows: int


@dataclass(frozen=True)
class Outcome:
    """Of a step: whether the weights moved, this process's loss sum, the gradient norm, whether to stop."""

    finite: bool
    loss: float
    grad_norm: float
    stop: bool


class Run:
    """Weights, optimiser and counters of a run on one process."""

    def __init__(
        self,
        config: RunConfig,
        parallel: Parallel,
        backbone: Trainable,
        trainer: Loss,
        curriculum: Curriculum | None = None,
        smoothing: Smoothing | None = None,
    ):
        self.config, self.parallel = config, parallel
        self.backbone, self.trainer = backbone, trainer
        self.counters = Counters()
        self.meter = Meter()
        self.curriculum, self.smoothing = curriculum, smoothing
        self.anchor: list[Tensor] | None = None
        backbone.network = parallel.prepare(backbone.network)
        self.network = backbone.network
        named = backbone.trainable_parameters()
        self.names: list[str] = [name for name, _ in named]
        self.parameters: list[Parameter] = [parameter for _, parameter in named]
        self.optimizer = build_optimizer(config.optim, self.parameters)
        self.average = None if config.optim.ema is None else WeightAverage(self.parameters, config.optim.ema)
        self.scale = LossScale.for_precision(getattr(backbone, "dtype", torch.float32))

    @property
    def global_batch(self) -> int:
        """Pairs of one optimiser step over all processes and micro-steps."""
        return self.rows * self.parallel.world

    @property
    def rows(self) -> int:
        """Pairs of one optimiser step on this process."""
        return self.config.optim.batch_size * self.config.optim.accumulation

    def draws(self, size: int) -> Iterator[Draw]:
        """The micro-batches of this process from the current step to the last, over `size` pairs."""
        batch, rows = self.config.optim.batch_size, self.rows
        first = self.parallel.rank * rows
        for step in range(self.counters.step, self.config.optim.steps):
            if self.curriculum is None:
                records = batch_records(self.config.seed, step, self.global_batch, size)
            else:
                records = self.curriculum.records(self.config.seed, step, self.global_batch)
            draw = Draw(self.config.seed, step, records, range(self.global_batch), self.global_batch)
            for start in range(first, first + rows, batch):
                yield draw.slice(start, start + batch)

    def step(
        self,
        batches: Iterator[Batch],
        stop: Callable[[], bool] = lambda: False,
        share: Share | None = None,
    ) -> Outcome:
        """One optimiser step over the next micro-batches; one that is not finite leaves the weights alone.

        Args:
            stop: whether this process was asked to stop; the outcome says whether any process was.
            share: the size of the step; None: that of the configuration. Without rows the weights stay as they are.
        """
        share = share or Share(self.config.optim.accumulation, self.global_batch)
        counters = self.counters
        torch.manual_seed(derive_seed(self.config.seed, "dropout", counters.step, self.parallel.rank))
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, counters.step))
        if self.curriculum is not None and self.curriculum.refreshes(counters.step):
            self.anchor = [parameter.detach().clone() for parameter in self.parameters]
        total = self._backward(batches, share)
        norm = gradient_norm(self.parameters, self.scale.value) if share.rows else torch.zeros_like(total)
        # The only wait for the device in a step.
        loss, grad_norm = torch.stack([total.float(), norm]).tolist()
        bad_losses, bad_norms, stops = self.parallel.agree(
            not math.isfinite(loss), not math.isfinite(grad_norm), stop()
        )
        finite = not (bad_losses or bad_norms)
        if finite and share.rows:
            self._update(grad_norm)
        elif not finite:
            self._skip(overflow=not bad_losses and self.scale.can_shrink())
        self.scale.update(finite)
        self.optimizer.zero_grad(set_to_none=True)
        counters.step += 1
        counters.pairs += share.rows
        return Outcome(finite, loss, grad_norm, bool(stops))

    def _backward(self, batches: Iterator[Batch], share: Share) -> Tensor:
        """Accumulate gradients of the mean loss over the rows of the step; returns this process's loss sum."""
        total = torch.zeros((), device=self.parallel.device)
        micro_steps = share.micro_steps
        # Processes average their gradients, so each contributes its share times their number.
        factor = self.parallel.world * self.scale.value / max(1, share.rows)
        for index, batch in enumerate(islice(batches, micro_steps)):
            batch = batch.to(self.parallel.device)
            if self.smoothing is not None:
                # Before the loss, whose backward pass reaches every weight and so may join the processes' gradients.
                with self.parallel.accumulating(self.network, more_to_come=True):
                    self.smoothing.backward(batch, self.counters.step, factor)
            with self.parallel.accumulating(self.network, more_to_come=index + 1 < micro_steps):
                with anchored(self.backbone, self.parameters, self.anchor):
                    losses, metrics = counted(batch.draw, *self.trainer.loss(batch))
                subtotal = losses.sum()
                (subtotal * factor).backward()  # type: ignore[no-untyped-call]
            self.meter.add({"loss": losses, **metrics})
            total = total + subtotal.detach()
        return total

    def _update(self, grad_norm: float) -> None:
        rescale_gradients(self.parameters, grad_norm, self.config.optim.clip, self.scale.value)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.counters.updates)
        self.meter.commit()
        if self.smoothing is not None:
            self.smoothing.commit()
        self.counters.updates += 1
        self.counters.skipped_in_a_row = 0

    def _skip(self, overflow: bool) -> None:
        self.meter.discard()
        if self.smoothing is not None:
            self.smoothing.discard()
        if overflow:
            self.counters.overflows += 1
        else:
            self.counters.skipped += 1
            self.counters.skipped_in_a_row += 1

    def mean_metrics(self) -> dict[str, float]:
        """Means over all processes since the last call; empty when every step was skipped."""
        names, sums, rows = self.meter.totals()
        if not rows:
            return {}
        values = self.parallel.sum(
            torch.stack([*(s.float() for s in sums), sums[0].new_tensor(rows).float()])
        )
        *totals, count = values.tolist()
        means = {name: value / count for name, value in zip(names, totals, strict=True)}
        return means | (self.smoothing.metrics() if self.smoothing is not None else {})

    def weights(self) -> dict[str, Tensor]:
        """The trained weights whole, on the CPU; every process must call this."""
        return {name: whole(value) for name, value in self.backbone.trainable_state().items()}

    def snapshot(self) -> Checkpoint:
        """Everything a resumed run needs; every process must call this."""
        moments, scalars = optimizer_tensors(self.optimizer, self.names, self.parameters)
        tensors = {"trainable": self.weights(), "optimizer": moments}
        if self.average is not None:
            tensors["ema"] = parameter_tensors(self.names, self.average.shadow)
        if self.anchor is not None:
            tensors["reference"] = {n: whole(value) for n, value in zip(self.names, self.anchor, strict=True)}
        state = {
            "counters": {**asdict(self.counters), "skipped_in_a_row": 0},
            "seed": self.config.seed,
            "global_batch": self.global_batch,
            "loss_scale": self.scale.state(),
            "optimizer_scalars": scalars,
        }
        if self.smoothing is not None:
            state["smoothness"] = self.smoothing.state()
        return Checkpoint(tensors, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a snapshot.

        Raises:
            DiffalignError: the snapshot belongs to another model.
        """
        tensors, state = checkpoint.tensors, checkpoint.state
        current = self.backbone.trainable_state()
        restore_parameters(list(current), list(current.values()), tensors["trainable"])
        restore_optimizer(
            self.optimizer, self.names, self.parameters, tensors["optimizer"], state["optimizer_scalars"]
        )
        if self.average is not None:
            restore_parameters(self.names, self.average.shadow, tensors["ema"])
        if "reference" in tensors:
            self.anchor = [tensors["reference"][name].to(self.parallel.device) for name in self.names]
        known = {f.name for f in fields(Counters)}
        self.counters = Counters(**{k: v for k, v in state["counters"].items() if k in known})
        if self.scale.enabled:
            self.scale = LossScale(**state["loss_scale"])
        if self.smoothing is not None:
            self.smoothing.restore(state["smoothness"])


def counted(draw: Draw, losses: Tensor, metrics: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and metrics `[B]` of the rows that count: a negative position marks one that only fills a batch up."""
    live = [row for row, position in enumerate(draw.positions) if position >= 0]
    if len(live) == len(draw):
        return losses, metrics
    return losses[live], {name: values[live] for name, values in metrics.items()}


def prefetched(draws: Iterable[Draw], fetch: Callable[[Draw], Batch], depth: int = 2) -> Iterator[Batch]:
    """Fetch batches ahead on one background thread, in order; its errors are raised here."""
    pending: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="fetch") as pool:
        for draw in draws:
            pending.append(pool.submit(fetch, draw))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
