"""What a method is given: prompts that are worked on at once, their first noises, and ways to judge other ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from diffalign.inference.budget import Meter
from diffalign.inference.generation import Generation
from diffalign.inference.objective import Objective
from diffalign.sampling.rollout import chunks

Variables = Literal["initial", "all"]
"""Which noises are changed: the initial one, or also those of the steps that draw noise."""


@dataclass(frozen=True)
class Judged:
    """Candidates of B prompts.

    Fields:
        rewards: `[B, M]`, NaN where the reward failed or the budget was over. best: `[B]`, the best of each row, NaN
            without one. noises: full noises of these `[B, S, C, h, w]`. media: their pictures `[B, 3, H, W]`.
    """

    rewards: Tensor
    best: Tensor
    noises: Tensor
    media: Tensor


@dataclass
class Problem:
    """B prompts with seeds, their first noises, and what is to be high.

    Fields:
        generation: noises to media, and B prompts. objective: media to scores. meter: what it has cost.
        start: full noises `[B, S, C, h, w]` of the seeds, float32 on the CPU; what is not optimised stays at these.
        seeds: B. variables: which of the noises are changed.
        texts: prompts as the reward sees them.
    """

    generation: Generation
    objective: Objective
    meter: Meter
    start: Tensor
    seeds: Sequence[int]
    variables: Variables = "initial"
    texts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.texts = list(self.generation.prompts)

    def __len__(self) -> int:
        return len(self.start)

    @property
    def first(self) -> Tensor:
        """The noises that are changed, as drawn: `[B, C, h, w]`, or `[B, S, C, h, w]` with those of the steps."""
        return self.start if self._all else self.start[:, 0]

    def full(self, noises: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """All noises `[N, S, C, h, w]` of changed ones `[N, *shape]`; gradients pass.

        Args:
            rows: the prompt of each of the N; None: one each, in order.
        """
        if self._all:
            return noises
        rest = self.start[:, 1:] if rows is None else self.start[list(rows), 1:]
        return torch.cat([noises[:, None], rest.to(noises)], 1)

    def objective_of(self, noises: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `[B]` and media `[B, 3, H, W]` of a candidate per prompt `[B, *shape]`, with gradients if enabled."""
        self.meter.spend(self.generation.cost)
        media = self.generation(self.full(noises))
        return self.objective(media, self.texts), media

    def judge(self, candidates: Tensor, look: Callable[[Tensor], None] | None = None) -> Judged:
        """Rewards of candidates `[B, M, *shape]`, without gradients; those that the budget does not reach get NaN.

        Args:
            look: is shown the media `[N, 3, H, W]`, a few at a time: all of the first prompt, then of the second, ...
        """
        count, many = candidates.shape[:2]
        affordable = min(many, self.meter.affordable(self.generation.cost))
        rows = [row for row in range(count) for _ in range(affordable)]
        flat = self.full(candidates[:, :affordable].flatten(0, 1), rows)
        rewards, media = self._scored(flat, rows, look)
        self.meter.spend(self.generation.cost * affordable)
        scores = torch.full((count, many), math.nan)
        scores[:, :affordable] = rewards.view(count, affordable)
        known = torch.where(scores.isnan(), -math.inf, scores)
        top, index = known.max(1)
        noises = self.full(candidates[torch.arange(count), index])
        return Judged(scores, torch.where(top.isinf(), math.nan, top), noises, media)

    def _scored(
        self, noises: Tensor, rows: Sequence[int], look: Callable[[Tensor], None] | None
    ) -> tuple[Tensor, Tensor]:
        """Scores `[N]`, and of each prompt the picture with the best `[B, 3, H, W]`."""
        height, width = self.generation.backbone.resolution
        kept = torch.zeros(len(self), 3, height, width)
        best, scores = torch.full((len(self),), -math.inf), []
        for part in chunks(len(noises), self.generation.sampler.batch_size):
            span = slice(part.start, part.stop)
            with torch.no_grad():
                media = self.generation(noises[span], rows[span])
                if look is not None:
                    look(media)
                found = self.objective(media, [self.texts[row] for row in rows[span]]).float().cpu()
            for row, score, picture in zip(rows[span], found, media.float().cpu(), strict=True):
                if score > best[row]:
                    best[row], kept[row] = score, picture
            scores.append(found)
        return torch.cat(scores) if scores else torch.empty(0), kept

    @property
    def _all(self) -> bool:
        return self.variables == "all" and self.start.shape[1] > 1
