"""Pairs of a round's own samples as rows of a batch: noised samples with shared noise, or steps of trajectories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.data.labelling import Comparison, Labeller
from diffalign.objectives.group_pairs import PairChoice, compared, verdict_table
from diffalign.process import Process
from diffalign.randomness import Draw
from diffalign.sampling.collection import Collected
from diffalign.sampling.rollout import Told, chunks
from diffalign.trainers.online_rows import Rows, moved

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PreferenceRows:
    """B rows of n samples each: chosen ones first, then rejected ones, then random ones, if any.

    Fields:
        x_t: `[n B, C, h, w]`, or `[B, C, h, w]` where the n next states were drawn from one state.
        goal: `[n B, C, h, w]`, training targets or next states. t, t_prev: times `[B]`. told: B rows.
        preference, weight: `[B]`.
    """

    x_t: Tensor
    goal: Tensor
    t: Tensor
    t_prev: Tensor
    told: Told
    preference: Tensor
    weight: Tensor
    draw: Draw

    def __len__(self) -> int:
        return len(self.t)

    @property
    def states(self) -> int:
        """States per row: n or 1."""
        return len(self.x_t) // len(self)

    @property
    def sides(self) -> int:
        """n: samples per row."""
        return len(self.goal) // len(self)

    @property
    def told_each(self) -> Told:
        """What the network is told with each row of `x_t`."""
        return self.told.select(list(range(len(self))) * self.states)

    def to(self, device: torch.device) -> PreferenceRows:
        """The same batch on a device."""
        return moved(self, device)  # type: ignore[no-any-return]


class PairTable:
    """Rows (pair, step) of a round, the steps of a pair next to each other.

    Args:
        collected: the round. sides: `[n, M]` long, its samples in each pair: chosen, rejected, and perhaps a third.
        preference, weight: `[M]`. steps: those of the trajectories that are compared; None: noised samples.
        shared: whether the samples of a group have one state before the step.
    """

    def __init__(
        self,
        collected: Collected,
        sides: Tensor,
        preference: Tensor,
        weight: Tensor,
        steps: Sequence[int] | None = None,
        shared: bool = False,
    ) -> None:
        self.collected, self.shared = collected, shared
        used = torch.tensor([0] if steps is None else list(steps))
        count, size = len(used), collected.samples
        self.sides = sides.repeat_interleave(count, 1)
        self.step = used.repeat(sides.shape[1])
        self.preference = preference.float().repeat_interleave(count)
        self.weight = weight.repeat_interleave(count)
        chosen, rejected = collected.numbers[self.sides[0]], collected.numbers[self.sides[1]]
        number = (chosen * size + rejected % size) * (int(used.max()) + 1) + self.step
        self.rows = Rows(collected.places[self.sides[0]], number)

    def take(self, rows: Sequence[int], draw: Draw, process: Process, weighting: str) -> PreferenceRows:
        """The tensors of some rows.

        Args:
            weighting: of the times of noised samples.
        """
        index = torch.tensor(list(rows))
        sides, step = self.sides[:, index], self.step[index]
        if self.collected.trajectory is None:
            inputs = self._noised(sides, draw, process, weighting)
        else:
            inputs = self._stepped(sides, step)
        told = self.collected.told.select(sides[0])
        return PreferenceRows(*inputs, told, self.preference[index], self.weight[index], draw)

    def _noised(self, sides: Tensor, draw: Draw, process: Process, weighting: str) -> Inputs:
        """`x_t`, targets, times and times again; noise and time are shared by the samples of a row."""
        x0 = self.collected.latents[sides.flatten()]
        t = process.times(draw.uniform("time", stratified=True), weighting)
        noise = torch.cat([draw.normal(tuple(x0.shape[1:]), "noise")] * len(sides))
        times = t.repeat(len(sides))
        return process.noise(x0, noise, times), process.target(x0, noise, times), t, t

    def _stepped(self, sides: Tensor, step: Tensor) -> Inputs:
        """States, next states and the two times of the steps."""
        trajectory = self.collected.trajectory
        assert trajectory is not None
        times = trajectory.sampler.schedule.times
        starts = sides[:1] if self.shared else sides
        before = trajectory.latents[step.repeat(len(starts)), starts.flatten()]
        after = trajectory.latents[step.repeat(len(sides)) + 1, sides.flatten()]
        return before, after, times[step], times[step + 1]


def verdicts(
    collected: Collected, labeller: Labeller, choice: PairChoice, backbone: Backbone, batch_size: int
) -> Tensor:
    """What a rule or a person says of the round's pairs: `[G, K, K]`, NaN where unknown.

    Args:
        choice: which pairs will be made of it. batch_size: latents that are decoded at once.
    """
    size, pictures = collected.samples, _pictures(collected, backbone, batch_size)
    asked = [(group, *pair) for group in range(collected.groups) for pair in compared(size, choice)]
    comparisons = []
    for group, first, second in asked:
        row = group * size
        key = f"round-{collected.round:05d}/{int(collected.places[row])}-{first}-{second}"
        prompt = collected.prompts[row]
        comparisons.append(Comparison(key, prompt, pictures[row + first], pictures[row + second]))
    answers = labeller.judge(comparisons)
    known = torch.tensor([math.nan if answer is None else answer for answer in answers])
    return verdict_table(collected.groups, size, asked, known)


def _pictures(collected: Collected, backbone: Backbone, batch_size: int) -> Tensor:
    """`[N, 3, H, W]` in [0, 1], on the CPU."""
    with backbone.inference():
        parts = [
            backbone.decode(collected.latents[rows.start : rows.stop]).cpu()
            for rows in chunks(len(collected), batch_size)
        ]
    return torch.cat(parts)
