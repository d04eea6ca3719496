"""Best-of-N: independent noises, of which the reward keeps one. The baseline of every other search.

Ma et al. 2025, arXiv 2501.09732, "random search". The expected reward after n draws is the maximum of n samples, and
the KL divergence from the base is at most `log n - (n - 1) / n` (`diffalign/evaluation/best_of_n.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.inference.search import NoiseSearch, draw
from diffalign.strict import StrictModel


class BestOfNConfig(StrictModel):
    """Options of best-of-N."""

    method: Literal["best_of_n"] = "best_of_n"
    """Independent noises; the best is kept."""
    candidates: int = Field(default=8, ge=1)
    """Noises per round and prompt. Which noises are drawn does not depend on it, only how many go at once."""


class BestOfN(NoiseSearch):
    """Noise number 0 is the start, number i > 0 a function of (seed, i)."""

    def __init__(self, start: Tensor, seeds: Sequence[int], config: BestOfNConfig | None = None) -> None:
        super().__init__(start, seeds)
        self.config = config or BestOfNConfig()

    def _propose(self) -> Tensor:
        count = self.config.candidates
        first = self.round * count
        fresh = draw(self.seeds, count, self.start.shape[1:], "best_of_n", first=first)
        return torch.cat([self.start[:, None], fresh[:, 1:]], 1) if first == 0 else fresh

    def _learn(self, noises: Tensor, rewards: Tensor) -> None:
        """Nothing to learn: the next noises are independent of these."""
