"""Reward-weighted regression: imitate every picture, the better the more.

Peters and Schaal 2007 (reward-weighted regression), as Lee et al. 2023 (arXiv 2302.12192) and, for flow models, Liu et
al. 2025 (Flow-RWR, arXiv 2501.13918) use it: minimise `E[exp(r / T) ||prediction - target||^2]`. On flow models the
error is that of the velocity, without a weight over time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from diffalign.backbones.base import Backbone
from diffalign.data.batch import UnpairedBatch
from diffalign.data.picture_labels import Pictures
from diffalign.objectives.rewarded import exponential_weights
from diffalign.trainers.pairs import Losses
from diffalign.trainers.pictures import PictureOptions, PictureTrainer


class RWRConfig(PictureOptions):
    """Reward-weighted regression; Flow-RWR on flow models."""

    method: Literal["rwr"] = "rwr"
    temperature: float = Field(default=1.0, gt=0)
    """T of the weights exp(r / T), in units of `scale`. Lower: only the best pictures count, few in effect."""
    scale: Literal["deviation", "raw"] = "deviation"
    """Unit of scores: their standard deviation over the data, which fits any reward, or as they are."""
    within: Literal["data", "group"] = "data"
    """Among which pictures weights have mean 1. group: those of one prompt, so that easy prompts do not outweigh hard
    ones."""
    max_weight: float = Field(default=20.0, gt=1)
    """Larger weights are cut to this: a single picture must not decide a step."""


class RWRTrainer(PictureTrainer):
    """Denoising errors of scored pictures, weighted by their rewards."""

    Config = RWRConfig
    needs: ClassVar[dict[str, tuple[str, ...]]] = {"pictures": ("score",)}
    beta = 1.0

    def __init__(self, config: RWRConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self._weights = torch.ones(0)

    @classmethod
    def choose(cls, config: Any, pictures: Pictures) -> Pictures:
        """The pictures that have a score."""
        return pictures.keep(~np.isnan(pictures.score))

    def prepare(self, cache: Any, folder: Path | None = None, builder: bool = True, **options: Any) -> None:
        """Take the data, and turn its scores into weights."""
        super().prepare(cache, folder, builder, **options)
        self._weights = reward_weights(cache.pictures, self.config)

    def loss(self, batch: UnpairedBatch) -> Losses:
        """Losses and metrics, each `[B]`."""
        error = self._errors_singly(batch)
        weight = self._weights[torch.as_tensor(list(batch.draw.records))].to(error.device)
        return weight * batch.weight.to(error.device) * error, {
            "error": error.detach(),
            "reward_weight": weight,
        }


def reward_weights(pictures: Pictures, config: RWRConfig) -> torch.Tensor:
    """Weights `[N]` in float32: `exp(r / T)` over its mean, in all the data or in each group, at most `max_weight`."""
    score = torch.from_numpy(pictures.score)
    deviation = float(score.std(correction=0))
    if config.scale == "deviation" and deviation > 0:
        score = score / deviation
    group = torch.from_numpy(pictures.group) if config.within == "group" else torch.zeros(len(score)).long()
    weights = torch.empty_like(score)
    order = group.argsort(stable=True)
    for rows in order.split(torch.unique(group, return_counts=True)[1].tolist()):
        weights[rows] = exponential_weights(score[rows], config.temperature)
    return weights.clamp(max=config.max_weight).float()
