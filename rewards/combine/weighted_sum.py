"""Weighted sum of rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import RewardOutput
from diffalign.rewards.combine.aggregate import root
from diffalign.rewards.combine.normalise import Mode, Statistics
from diffalign.rewards.combine.panel import Panel
from diffalign.rewards.combine.wrapper import Of, Wrapper


class WeightedSum(Wrapper):
    """`sum_k w_k r_k`; std `sqrt(sum_k w_k^2 std_k^2)`, as for independent members.

    Args:
        of: the rewards. weights: one number per reward, 1 each by default; negative ones penalise.
        normalise: `none`, `running` or `calibrated`: bring each reward to mean 0 and std 1 first, since otherwise the
            one with the widest scale decides. Running statistics grow with every batch scored in training mode.
        statistics: `[[mean, std], ...]` for calibrated; else call `calibrate(media, prompts)`.
    """

    def __init__(
        self,
        of: Of,
        weights: Sequence[float] | None = None,
        normalise: Mode = "none",
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(of, "weighted-sum")
        self.weights = [1.0] * len(self.of) if weights is None else [float(w) for w in weights]
        if len(self.weights) != len(self.of):
            raise DiffalignError(
                f"reward {self.name!r} got {len(self.weights)} weights for {len(self.of)} rewards; "
                "expected one each"
            )
        self.panel = Panel(self.name, self.of, None, normalise, statistics)
        self.learnt["moments"] = self.panel

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`; parts hold each reward's own score."""
        members = self.panel.score(media, prompts, self.training)
        weights = torch.tensor(self.weights).to(members.values)[:, None]
        std = None if members.stds is None else root((weights * members.stds).square().sum(0))
        return RewardOutput((weights * members.values).sum(0), std, members.parts)
