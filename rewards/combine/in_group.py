"""Rewards relative to the batch: how a sample does among the samples of its own prompt.

They are for online training, where a batch holds a group of samples per prompt; a sample alone with its prompt
gets 0.5. They have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import RewardOutput
from diffalign.rewards.combine.aggregate import root
from diffalign.rewards.combine.groups import rank_average, win_rate_among, win_rate_std
from diffalign.rewards.combine.members import score_members
from diffalign.rewards.combine.wrapper import Of, Wrapper, only

By = Literal["prompt", "batch"]


class GroupWinRate(Wrapper):
    """Share of the others of its group that a sample beats, ties as one half.

    Its std is an upper bound (see `groups.win_rate_std`); None when the reward has none.

    Args:
        of: one reward. by: `prompt` compares samples of the same prompt, `batch` all of the batch.
    """

    def __init__(self, of: Of, by: By = "prompt") -> None:
        inner = only(of, "group-win-rate")
        super().__init__(inner, f"group-win-rate({getattr(inner, 'name', inner)})")
        self.by = _grouping(self.name, by)
        self.differentiable = False
        _samples_only(self)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`; parts hold the reward's own score."""
        with torch.no_grad():
            members = score_members(self.name, self.of, media, prompts)
        scores = members.values[0]
        groups = _groups(prompts, self.by).to(scores.device)
        std = None if members.stds is None else win_rate_std(scores, members.stds[0], groups)
        return RewardOutput(win_rate_among(scores, groups), std, members.parts)


class RankAverage(Wrapper):
    """Mean over rewards of a sample's rank in its group, scaled to 0 (worst) .. 1 (best): no reward's scale matters.

    Its std adds those of the rewards' win rates as independent, `sqrt(sum_k std_k^2) / K`.

    Args:
        of: the rewards. by: `prompt` ranks samples of the same prompt, `batch` all of the batch.
    """

    def __init__(self, of: Of, by: By = "prompt") -> None:
        super().__init__(of, "rank-average")
        self.by = _grouping(self.name, by)
        self.differentiable = False
        _samples_only(self)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`; parts hold each reward's own score."""
        with torch.no_grad():
            members = score_members(self.name, self.of, media, prompts)
        groups = _groups(prompts, self.by).to(members.values.device)
        std = None
        if members.stds is not None:
            pairs = zip(members.values, members.stds, strict=True)
            rows = torch.stack([win_rate_std(values, stds, groups) for values, stds in pairs])
            std = root(rows.square().sum(0)) / len(rows)
        return RewardOutput(rank_average(members.values, groups), std, members.parts)


def _groups(prompts: Sequence[str], by: By) -> Tensor:
    """Group label `[B]` of each sample."""
    if by == "batch":
        return torch.zeros(len(prompts), dtype=torch.long)
    index: dict[str, int] = {}
    return torch.tensor([index.setdefault(prompt, len(index)) for prompt in prompts])


def _grouping(name: str, by: By) -> By:
    if by not in ("prompt", "batch"):
        raise DiffalignError(f"reward {name!r}: by is {by!r}; expected prompt or batch")
    return by


def _samples_only(wrapper: Wrapper) -> None:
    if wrapper.kind == "set":
        raise DiffalignError(
            f"reward {wrapper.name!r} ranks samples, but {wrapper.of[0].name!r} gives a whole set one score"
        )
