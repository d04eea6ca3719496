"""Positive and negative sets of a round's own samples as rows of a batch: pairs, or single samples with labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.conditioning import Conditioning
from diffalign.objectives.contrast import Contrast
from diffalign.randomness import Draw
from diffalign.sampling.collection import Collected
from diffalign.trainers.online_rows import Rows, moved


@dataclass(frozen=True)
class ContrastRows:
    """Samples to be noised, and what they are: pairs (B positive rows, then B negative ones) or single samples.

    Fields:
        x0, noise: `[S, C, h, w]`, S = 2 B or B. uniform: `[S]` for the times. conditioning: S rows.
        label: `[B]`, 1 for a positive sample or a pair. weight: `[B]`.
    """

    x0: Tensor
    noise: Tensor
    uniform: Tensor
    conditioning: Conditioning
    label: Tensor
    weight: Tensor
    draw: Draw

    def __len__(self) -> int:
        return len(self.label)

    def to(self, device: torch.device) -> ContrastRows:
        """The same batch on a device."""
        return moved(self, device)  # type: ignore[no-any-return]


class ContrastTable:
    """Rows of a round's sets, `draws` of each pair or sample with a noise and a time of its own.

    Args:
        contrast: samples of `collected`. pairs: a row per pair, else a row per sample. weights: of pairs `[n]`, or of
            positive and then negative samples `[n + m]`.
    """

    def __init__(
        self, collected: Collected, contrast: Contrast, weights: Tensor, pairs: bool, draws: int
    ) -> None:
        self.collected = collected
        positive, negative = contrast.positive, contrast.negative
        if pairs:
            sides = [positive, negative]
            label = torch.ones(len(positive))
            # The side that no sample comes twice in gives a row its number.
            named = positive if len(positive.unique()) == len(positive) else negative
        else:
            named = torch.cat([positive, negative])
            sides, label = [named], torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
        self.sides = [side.repeat_interleave(draws) for side in sides]
        self.label, self.weight = label.repeat_interleave(draws), weights.repeat_interleave(draws)
        number = collected.numbers[named].repeat_interleave(draws) * draws
        place = collected.places[named].repeat_interleave(draws)
        self.rows = Rows(place, number + torch.arange(draws).repeat(len(named)))

    def take(self, rows: Sequence[int], draw: Draw, stratified: bool) -> ContrastRows:
        """The tensors of some rows; both samples of a pair get the same noise and time."""
        index = torch.tensor(list(rows), dtype=torch.long)
        samples = torch.cat([side[index] for side in self.sides])
        times, count = draw.uniform("time", stratified=stratified), len(self.sides)
        x0 = self.collected.latents[samples]
        return ContrastRows(
            x0,
            torch.cat([draw.normal(tuple(x0.shape[1:]), "noise")] * count),
            torch.cat([times] * count),
            self.collected.told.select(samples).conditioning,
            self.label[index],
            self.weight[index],
            draw,
        )
