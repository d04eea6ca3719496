"""What online methods share that learn through the forward process: clean samples noised anew, and the old policy.

The samples may be drawn by any solver, with or without noise: nothing is asked of the steps that led to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.backbones.guidance import is_told_guidance
from diffalign.backbones.snapshots import Snapshot
from diffalign.objectives.advantages import group_advantages, group_global_std_advantages
from diffalign.objectives.forms import Form, in_form
from diffalign.objectives.nft import Retention, retention
from diffalign.randomness import Draw
from diffalign.sampling.collection import Collected
from diffalign.sampling.rollout import Told, predict
from diffalign.sampling.schedules import schedule_of
from diffalign.trainers.online import (
    OnlineOptions,
    OnlineTrainer,
    SamplingOptions,
    State,
    sample_weights,
    updates_of,
    whole_round,
)
from diffalign.trainers.online_rows import CleanRows, CleanTable, Rows

Retained = Retention | Annotated[float, Field(ge=0, lt=1)]
"""How much of itself the old policy keeps: a schedule or a constant share."""


class ForwardSampling(SamplingOptions):
    """How the policy draws its samples: without guidance, unless you ask for it."""

    guidance: float = 1.0
    """Guidance scale while drawing; 1 or less turns it off, halves the cost and is what these methods are made for."""


class ForwardOptions(OnlineOptions):
    """Options of online methods that noise clean samples."""

    sampling: ForwardSampling = ForwardSampling()
    """How samples are drawn; without `kernel` by the model's deterministic sampler."""
    noise_levels: int = Field(default=4, ge=1)
    """Draws of (time, noise) per sample and optimiser step; each is a row with forward passes of its own."""
    shared_noise: bool = False
    """Whether the samples of a group are noised with the same noises and times, as the pictures of a pair are in DPO:
    their errors then differ by what the samples are, not by the draws. The gradient of centred advantages has the same
    mean and less noise."""
    times: Literal["sampling", "uniform", "logit_normal"] = "sampling"
    """Distribution of training times: those that the samples were drawn at, all, or for flows logit-normal."""
    guided: bool = False
    """With `sampling.guidance` above 1: train the guided prediction, for twice the cost. false: the conditional one,
    which then learns to give without guidance what was drawn with it."""


class RelativeOptions(ForwardOptions):
    """Options of methods that push samples by their advantages."""

    advantage: Literal["group_global_std", "group"] = "group_global_std"
    """Rewards minus their group's mean, over the round's deviation or over the group's."""
    clip: float = Field(default=5.0, gt=0)
    """Advantages are cut to this size and divided by it."""
    kl: float = Field(default=1e-4, ge=0)
    """Weight of the squared distance to the reference's output; 0 asks no reference."""


@dataclass(frozen=True)
class Noised:
    """Noised samples on the device: `x_t` and the network's target `[B, C, h, w]`, times `t` `[B]`, what it is told."""

    x_t: Tensor
    target: Tensor
    t: Tensor
    told: Told


class OldPolicy:
    """The weights that drew the round: those of its beginning, or an average over rounds.

    Args:
        share: of itself that it keeps when a round begins: a schedule or a constant.
    """

    def __init__(self, backbone: Backbone, share: Retention | float) -> None:
        self.backbone, self.share = backbone, share
        # Made when the first round begins: by then the engine has loaded and spread the weights.
        self._snapshot: Snapshot | None = None
        self.differs = False

    def begin_round(self, step: int) -> None:
        """Follow the current weights, `step` optimiser steps after the start."""
        share = self.share if isinstance(self.share, float) else retention(self.share, step)
        parameters = self.backbone.trainable_parameters()
        if self._snapshot is None:
            self._snapshot = Snapshot(parameters)
            return
        self._snapshot.blend(parameters, share)
        self.differs = share > 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model carries the old weights."""
        if self._snapshot is None or not self.differs:
            yield
            return
        with self._snapshot.applied(self.backbone.trainable_parameters()):
            yield

    def state(self) -> State:
        """Tensors and values for a checkpoint."""
        tensors = {} if self._snapshot is None else self._snapshot.state()
        return tensors, {"differs": self.differs}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.differs = bool(values["differs"])
        if tensors:
            self._snapshot = self._snapshot or Snapshot(self.backbone.trainable_parameters())
            self._snapshot.load(tensors)


class ForwardTrainer(OnlineTrainer):
    """Rows, noise and forward passes; a method adds `learn` and `loss`, and `old` if it has an old policy."""

    def __init__(self, config: Any, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self.old: OldPolicy | None = None
        self._table: CleanTable | None = None
        self._guided = config.guided or is_told_guidance(backbone.core)

    def drawing(self, number: int) -> AbstractContextManager[Any]:
        """The block in which a round is drawn: with the old policy's weights, brought up to date first."""
        if self.old is None:
            return super().drawing(number)
        self.old.begin_round(number * updates_of(self.config))
        return self.old.applied()

    def batch(self, rows: Sequence[int], draw: Draw) -> CleanRows:
        """Clean samples and noise of some rows."""
        assert self._table is not None, "learn comes first"
        return self._table.take(rows, draw)

    def after_step(self, step: int) -> None:
        """The weights have left the old policy's."""
        if self.old is not None:
            self.old.differs = True

    def state(self) -> State:
        """The old policy."""
        return super().state() if self.old is None else self.old.state()

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from a `state`."""
        if self.old is not None:
            self.old.restore(tensors, values)

    @cached_property
    def _visited(self) -> Tensor:
        """The times `[S]` that samples are drawn at."""
        return schedule_of(self.backbone, self.config.sampling.steps).times[:-1]

    def _rows(self, collected: Collected, used: Tensor) -> Rows:
        """The rows of the samples where `used` `[N]` is true."""
        options = self.config
        self._table = CleanTable(
            collected, used.nonzero().flatten(), options.noise_levels, options.shared_noise
        )
        return self._table.rows

    def _noised(self, batch: CleanRows) -> Noised:
        process = self.backbone.process
        if self.config.times != "sampling":
            x_t, target, t = batch.noised(process, self.config.times)
            return Noised(x_t, target, t, batch.told)
        t = self._visited[(batch.uniform.cpu() * len(self._visited)).long()].to(batch.x0.device)
        x_t = process.noise(batch.x0, batch.noise, t)
        return Noised(x_t, process.target(batch.x0, batch.noise, t), t, batch.told)

    def _predict(self, noised: Noised) -> Tensor:
        """The network's output `[B, C, h, w]`, guided if that is trained."""
        if self._guided:
            return predict(self.backbone, noised.x_t, noised.t, noised.told)
        return self.backbone.predict(noised.x_t, noised.t, noised.told.conditioning)

    def _reference(self, noised: Noised) -> Tensor:
        """The frozen model's output."""
        with self.backbone.inference(), self.backbone.reference():
            return self._predict(noised)

    def _old(self, noised: Noised, policy: Tensor) -> Tensor:
        """The old policy's output; `policy` itself, without gradient, as long as their weights are equal."""
        assert self.old is not None
        if not self.old.differs:
            return policy.detach()
        with self.backbone.inference(), self.old.applied():
            return self._predict(noised)

    def _in_form(self, form: Form, output: Tensor, noised: Noised) -> Tensor:
        return in_form(self.backbone.process, form, output, noised.x_t, noised.t)


class RelativeTrainer(ForwardTrainer):
    """Advantages of a round; a method adds `_judge` and `loss`."""

    @classmethod
    def needs_frozen_copy(cls, config: Any, tune: str) -> bool:
        """Whether a second network has to be loaded: none is without a KL term."""
        return config.kl > 0 and super().needs_frozen_copy(config, tune)

    def learn(self, collected: Collected) -> tuple[Rows, dict[str, float]]:
        """Judge the samples of groups whose rewards differ."""
        form = group_advantages if self.config.advantage == "group" else group_global_std_advantages
        whole = whole_round(self.gather, collected)
        found = whole.advantages(form(whole.rewards, whole.places)).clamped(self.config.clip)
        found = found.weighted(sample_weights(collected, self.config.uncertainty))
        self._judge(found.values)
        return self._rows(collected, found.used), {
            "used": float(found.used.float().mean()),
            "advantage_size": float(found.values.abs().mean()),
        }

    def _judge(self, advantages: Tensor) -> None:
        """Take the advantages `[N]` of this process's samples, in [-clip, clip]."""
        raise NotImplementedError
