"""Rewards whose scores are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffalign.rewards import Facts, RewardOutput


class Channel:
    """Mean of one colour channel times a factor: differentiable, and known for flat pictures."""

    modality = "image"
    differentiable = True
    kind = "sample"

    def __init__(
        self, channel: int = 0, factor: float = 1.0, name: str = "", std: float | None = None
    ) -> None:
        self.channel, self.factor, self.std = channel, factor, std
        self.name = name or f"channel-{channel}"
        self.facts = Facts(scale="0 to 1", licence="MIT", backbone=f"net-{channel}")

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        mean = self.factor * media[:, self.channel].mean((-2, -1)).float()
        std = None if self.std is None else torch.full_like(mean, self.std)
        return RewardOutput(mean, std, {"doubled": 2 * mean})


class Black(Channel):
    """A channel without gradient."""

    differentiable = False


class SetReward(Channel):
    kind = "set"


class Heads(Channel):
    """One reward whose parts are three heads."""

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        means = media.mean((-2, -1)).float()
        return RewardOutput(means.mean(1), None, {f"member-{i}": means[:, i] for i in range(3)})


class Dropping(nn.Module):
    """A linear head on mean colours with dropout, and a batch norm that must stay in evaluation mode."""

    name = "dropping"
    modality = "image"
    differentiable = True
    kind = "sample"

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(3, 1, bias=False)
        nn.init.ones_(self.head.weight)
        self.requires_grad_(False).eval()

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        return RewardOutput(self.head(self.drop(self.norm(media.mean((-2, -1))))).squeeze(1))


def colours(*rows: tuple[float, float, float]) -> Tensor:
    """Flat pictures `[B, 3, 8, 8]`, one per colour."""
    return torch.tensor(rows)[:, :, None, None].expand(-1, -1, 8, 8).clone()
