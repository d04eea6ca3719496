"""Random search around pivots: rotations of the best noises by random angles, beside fresh noises.

Between best-of-N (angle 90 degrees: independent noise) and zero-order search (one pivot, one small angle): angles are
drawn anew for each candidate, so no step size has to be right, and several pivots are kept, so one lucky score does
not decide. Pivots: Ma et al. 2025, arXiv 2501.09732; step sizes from a distribution: random pursuit, Stich et al.
2013, arXiv 1111.0194, with the line search replaced by draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.inference.search import NoiseSearch, rotated
from diffalign.randomness import generator
from diffalign.strict import StrictModel


class RandomSearchConfig(StrictModel):
    """Options of random search with pivots."""

    method: Literal["random_search"] = "random_search"
    """Rotations of the best noises by random angles, and some fresh noises."""
    candidates: int = Field(default=8, ge=1)
    """Noises per round and prompt."""
    pivots: int = Field(default=2, ge=1)
    """Best noises that are kept; candidates are shared out among them in turn. More explore more and climb slower."""
    fresh: float = Field(default=0.125, ge=0, le=1)
    """Share of a round that is drawn from nothing, so that the search can leave its pivots; 1 is best-of-N."""
    angle: tuple[float, float] = (10.0, 60.0)
    """Degrees: angles are log-uniform between these. Small ones refine, 90 is a new noise."""

    @model_validator(mode="after")
    def _range(self) -> RandomSearchConfig:
        if not 0 < self.angle[0] <= self.angle[1] <= 90:
            raise ValueError(f"angle is {self.angle}; expected two rising values in (0, 90]")
        return self


class RandomSearch(NoiseSearch):
    """The first round holds the start and fresh noises. Every candidate keeps its pivot's norm."""

    def __init__(self, start: Tensor, seeds: Sequence[int], config: RandomSearchConfig | None = None) -> None:
        super().__init__(start, seeds)
        self.config = config or RandomSearchConfig()
        self._pivots = self.start[:, None].repeat(1, self.config.pivots, *[1] * (self.start.dim() - 1))
        self._rewards = torch.full((len(self.seeds), self.config.pivots), -math.inf)

    def _propose(self) -> Tensor:
        fresh = self._fresh(self.config.candidates, "random_search")
        if self.round == 0:
            return torch.cat([self.start[:, None], fresh[:, 1:]], 1)
        kept = round(self.config.fresh * self.config.candidates)
        near = rotated(self._centres()[:, kept:], fresh[:, kept:], self._cosines()[:, kept:], lead=2)
        return torch.cat([fresh[:, :kept], near], 1)

    def _centres(self) -> Tensor:
        """The pivot of each candidate `[B, M, *shape]`: those with a reward, in turn, from the last candidate on."""
        known = (self._rewards > -math.inf).sum(1).clamp(min=1)
        turn = torch.arange(self.config.candidates).flip(0)
        return self._pivots[torch.arange(len(known))[:, None], turn % known[:, None]]

    def _cosines(self) -> Tensor:
        low, high = (math.log(math.radians(angle)) for angle in self.config.angle)
        rows = [
            torch.rand(self.config.candidates, generator=generator(seed, self.round, "angle"))
            for seed in self.seeds
        ]
        angles = torch.exp(low + (high - low) * torch.stack(rows))
        return angles.cos().view(*angles.shape, *[1] * (self.start.dim() - 1))

    def _learn(self, noises: Tensor, rewards: Tensor) -> None:
        pool = torch.cat([self._pivots, noises], 1)
        values = torch.cat([self._rewards, rewards.nan_to_num(-math.inf)], 1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, : self.config.pivots]
        self._rewards = values.gather(1, order)
        self._pivots = pool[torch.arange(len(pool))[:, None], order]

    def _state(self) -> dict[str, Tensor]:
        return {"pivots": self._pivots, "pivot_rewards": self._rewards}

    def _restore(self, state: dict[str, Tensor]) -> None:
        self._pivots, self._rewards = state["pivots"], state["pivot_rewards"]
