"""What a round's samples become for an optimiser step: steps of trajectories, or clean samples to be noised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.process import Process
from diffalign.randomness import Draw, generator
from diffalign.sampling.collection import Collected
from diffalign.sampling.rollout import Told, policy_transition
from diffalign.sampling.transition import Kernel, Transition


@dataclass(frozen=True)
class Rows:
    """What this process can learn from in a round.

    Fields:
        group: `[R]` long, the place in the round of the group that a row belongs to.
        number: `[R]` long, the row's number in the whole round: its noise and time are drawn for it.
    """

    group: Tensor
    number: Tensor

    def __len__(self) -> int:
        return len(self.group)

    def keep(self, mask: Tensor) -> Rows:
        """The rows where `mask` `[R]` is true."""
        return Rows(self.group[mask], self.number[mask])


@dataclass(frozen=True)
class StepRows:
    """Steps of trajectories; a batch may mix steps and samples.

    Fields:
        x_t, x_prev: states before and after `[B, C, h, w]`. t, t_prev: their times `[B]`.
        told: B rows. old: the behaviour policy's log-probability `[B]`, mean over elements.
        sample: `[B]` long, the sample's row in the round of this process. step: `[B]` long.
    """

    x_t: Tensor
    x_prev: Tensor
    t: Tensor
    t_prev: Tensor
    told: Told
    old: Tensor
    sample: Tensor
    step: Tensor
    draw: Draw

    def __len__(self) -> int:
        return len(self.x_t)

    def to(self, device: torch.device) -> StepRows:
        """The same batch on a device."""
        return moved(self, device)

    def transition(self, backbone: Backbone, kernel: Kernel, reference: bool = False) -> Transition:
        """What the current weights, or the frozen model, make of the states."""
        return policy_transition(
            backbone, kernel, self.x_t, self.t, self.t_prev, self.told, reference=reference
        )


class StepTable:
    """Rows (sample, step) of a round's trajectories, the steps of a sample next to each other.

    Args:
        collected: a round with trajectories. steps: the n steps that are learned from; all draw noise.
    """

    def __init__(self, collected: Collected, steps: Sequence[int]) -> None:
        assert collected.trajectory is not None, "the trainer sets needs_trajectory"
        self.trajectory, self.steps = collected.trajectory, torch.tensor(list(steps))
        count = len(self.steps)
        self.sample = torch.arange(len(collected)).repeat_interleave(count)
        self.step = self.steps.repeat(len(collected))
        number = collected.numbers.repeat_interleave(count) * count + torch.arange(count).repeat(
            len(collected)
        )
        self.rows = Rows(collected.places.repeat_interleave(count), number)

    def keep(self, mask: Tensor) -> None:
        """Leave out the rows where `mask` `[R]` is false."""
        self.sample, self.step, self.rows = self.sample[mask], self.step[mask], self.rows.keep(mask)

    def take(self, rows: Sequence[int], draw: Draw) -> StepRows:
        """The tensors of some rows."""
        index = torch.tensor(list(rows))
        sample, step = self.sample[index], self.step[index]
        trajectory, times = self.trajectory, self.trajectory.sampler.schedule.times
        return StepRows(
            trajectory.latents[step, sample],
            trajectory.latents[step + 1, sample],
            times[step],
            times[step + 1],
            trajectory.told.select(sample),
            trajectory.log_probs[step, sample],
            sample,
            step,
            draw,
        )


@dataclass(frozen=True)
class CleanRows:
    """Samples to be noised: clean latents and noise `[B, C, h, w]`, uniform numbers `[B]` for their times.

    Fields:
        told: B rows. sample: `[B]` long, the sample's row in the round of this process.
    """

    x0: Tensor
    noise: Tensor
    uniform: Tensor
    told: Told
    sample: Tensor
    draw: Draw

    def __len__(self) -> int:
        return len(self.x0)

    def to(self, device: torch.device) -> CleanRows:
        """The same batch on a device."""
        return moved(self, device)

    def noised(self, process: Process, weighting: Any = "uniform") -> tuple[Tensor, Tensor, Tensor]:
        """`x_t`, the network's target, both `[B, C, h, w]`, and the times `[B]`."""
        t = process.times(self.uniform.cpu(), weighting).to(self.x0.device)
        return process.noise(self.x0, self.noise, t), process.target(self.x0, self.noise, t), t


class CleanTable:
    """Rows of a round's clean samples, `draws` of each with a noise and a time of its own.

    Args:
        samples: rows of `collected` that are learned from; None: all. shared: the samples of a group have the same
            noises and times.
    """

    def __init__(
        self,
        collected: Collected,
        samples: Sequence[int] | Tensor | None = None,
        draws: int = 1,
        shared: bool = False,
    ) -> None:
        self.collected, self.shared = collected, shared
        chosen = torch.arange(len(collected)) if samples is None else torch.as_tensor(samples).long()
        self.sample = chosen.repeat_interleave(draws)
        of_sample = torch.arange(draws).repeat(len(chosen))
        self.rows = Rows(collected.places[self.sample], collected.numbers[self.sample] * draws + of_sample)
        self._of_group = self.rows.group * draws + of_sample

    def take(self, rows: Sequence[int], draw: Draw, stratified: bool = True) -> CleanRows:
        """The tensors of some rows; times of shared draws are always spread over the range."""
        index = torch.tensor(list(rows))
        sample = self.sample[index]
        x0 = self.collected.latents[sample]
        if self.shared:
            draw = replace(draw, records=self._of_group[index].tolist())
            uniform = golden_spread(draw)
        else:
            uniform = draw.uniform("time", stratified=stratified)
        noise = draw.normal(tuple(x0.shape[1:]), "noise")
        return CleanRows(x0, noise, uniform, self.collected.told.select(sample), sample, draw)


def golden_spread(draw: Draw) -> Tensor:
    """Uniform numbers `[B]` in [0, 1): equal records have equal ones, and neighbouring records spread evenly.

    Record r gets the fractional part of `u + r (sqrt 5 - 1) / 2`, with one u for the step, whatever the batch.
    """
    start = torch.rand((), generator=generator(draw.seed, draw.step, "spread"), dtype=torch.float64)
    records = torch.tensor(list(draw.records), dtype=torch.float64)
    return ((start + records * (math.sqrt(5) - 1) / 2) % 1).float().clamp(max=1 - 1e-7)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with everything that can be moved on a device."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(
        batch, **{name: value.to(device) for name, value in values.items() if hasattr(value, "to")}
    )
