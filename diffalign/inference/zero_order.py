"""Zero-order search: the best neighbour of a pivot, at a fixed angle on the sphere, becomes the next pivot.

Ma et al. 2025, arXiv 2501.09732, section 3.1 ("zero-order search"); the neighbours `|x| (c u + sqrt(1 - c^2) w)` with
c = 0.95 and the rejected rounds are those of its public implementation, sayakpaul/tt-scale-flux.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.inference.search import NoiseSearch, best_of, rotated, where_rows
from diffalign.strict import StrictModel


class ZeroOrderConfig(StrictModel):
    """Options of zero-order search."""

    method: Literal["zero_order"] = "zero_order"
    """The best neighbour at a fixed angle becomes the next pivot."""
    candidates: int = Field(default=4, ge=2)
    """Neighbours per round and prompt, as in the release; the paper takes 2 to 4."""
    cosine: float = Field(default=0.95, gt=-1, lt=1)
    """Of the angle between a pivot and its neighbours: 0.95 is 18 degrees. Nearer to 1 climbs surer and slower."""
    patience: int = Field(default=0, ge=0)
    """Rounds without a better neighbour after which a fresh noise becomes the pivot, 1 as in the release; 0: never."""


class ZeroOrder(NoiseSearch):
    """A pivot per row. A pivot that has no reward is asked for itself, in place of its first neighbour."""

    def __init__(self, start: Tensor, seeds: Sequence[int], config: ZeroOrderConfig | None = None) -> None:
        super().__init__(start, seeds)
        self.config = config or ZeroOrderConfig()
        self._pivot = self.start.clone()
        self._reward = torch.full((len(self.seeds),), -math.inf)
        self._stale = torch.zeros(len(self.seeds), dtype=torch.long)

    def _propose(self) -> Tensor:
        fresh = self._fresh(self.config.candidates, "zero_order")
        found = rotated(self._pivot[:, None].expand_as(fresh), fresh, self.config.cosine, lead=2)
        found[:, 0] = where_rows(self._reward == -math.inf, self._pivot, found[:, 0])
        return found

    def _learn(self, noises: Tensor, rewards: Tensor) -> None:
        found, values = best_of(noises, rewards)
        better = values > self._reward
        self._pivot = where_rows(better, found, self._pivot)
        self._reward = torch.where(better, values, self._reward)
        self._stale = torch.where(better, 0, self._stale + 1)
        if self.config.patience:
            self._start_again(self._stale >= self.config.patience)

    def _start_again(self, rows: Tensor) -> None:
        """Give the rows of the mask `[B]` a fresh pivot."""
        self._pivot = where_rows(rows, self._fresh(1, "zero_order", "pivot")[:, 0], self._pivot)
        self._reward = torch.where(rows, -math.inf, self._reward)
        self._stale = torch.where(rows, 0, self._stale)

    def _state(self) -> dict[str, Tensor]:
        return {"pivot": self._pivot, "pivot_reward": self._reward, "stale": self._stale}

    def _restore(self, state: dict[str, Tensor]) -> None:
        self._pivot, self._reward, self._stale = state["pivot"], state["pivot_reward"], state["stale"]
