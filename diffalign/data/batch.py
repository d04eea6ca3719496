"""What a trainer is given at each micro-step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.conditioning import Conditioning
from diffalign.randomness import Draw


@dataclass(frozen=True)
class PairBatch:
    """Preference pairs as latents, ready for the network.

    Fields:
        chosen, rejected: latents `[B, C, H, W]`, float32, scaled as the network expects.
        conditioning_chosen, conditioning_rejected: one row per pair.
        preference: `[B]` probability that `chosen` is really preferred: 1, or 0.5 for a kept tie.
        weight: `[B]` factor on each pair's loss.
        draw: which records these are; every random number of the step comes from it.
    """

    chosen: Tensor
    rejected: Tensor
    conditioning_chosen: Conditioning
    conditioning_rejected: Conditioning
    preference: Tensor
    weight: Tensor
    draw: Draw

    def __len__(self) -> int:
        return len(self.chosen)

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch on a device; number formats stay."""
        return replace(
            self,
            chosen=self.chosen.to(device),
            rejected=self.rejected.to(device),
            conditioning_chosen=self.conditioning_chosen.to(device),
            conditioning_rejected=self.conditioning_rejected.to(device),
            preference=self.preference.to(device),
            weight=self.weight.to(device),
        )


@dataclass(frozen=True)
class UnpairedBatch:
    """Single pictures that somebody liked or did not, as latents; no two of them need to belong together.

    Fields:
        latents: `[N, C, H, W]`, float32, scaled as the network expects. conditioning: one row per picture.
        label: `[N]` probability that the picture is desirable: 1, 0, or between.
        weight: `[N]` factor on each picture's loss.
        draw: which records these are; N is its number of rows, or twice that for pairs taken apart.
    """

    latents: Tensor
    conditioning: Conditioning
    label: Tensor
    weight: Tensor
    draw: Draw

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str) -> UnpairedBatch:
        """The same batch on a device; number formats stay."""
        return replace(
            self,
            latents=self.latents.to(device),
            conditioning=self.conditioning.to(device),
            label=self.label.to(device),
            weight=self.weight.to(device),
        )


@dataclass(frozen=True)
class GroupBatch:
    """Groups of K pictures that were compared with each other, as latents.

    Fields:
        latents: `[B, K, C, H, W]`, float32, scaled as the network expects.
        conditioning: B K rows, the K pictures of the first group first.
        values: `[B, K]` in [0, 1]: how good each picture is among those of its group.
        weight: `[B]` factor on each group's loss. draw: which groups these are.
    """

    latents: Tensor
    conditioning: Conditioning
    values: Tensor
    weight: Tensor
    draw: Draw

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str) -> GroupBatch:
        """The same batch on a device; number formats stay."""
        return replace(
            self,
            latents=self.latents.to(device),
            conditioning=self.conditioning.to(device),
            values=self.values.to(device),
            weight=self.weight.to(device),
        )
