"""Fine-tuning on the preferred pictures: the control of every preference method, and reward-weighted regression.

With certain labels it minimises the denoising error of the chosen picture. With soft labels p = sigmoid(reward gap), as
relabelling by a reward gives them, both pictures count with weights exp(reward / temperature) normalised over the pair:
reward-weighted regression, which Liu et al. 2025 (arXiv 2501.13918) use for flow models as Flow-RWR.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from diffalign.backbones.base import Backbone
from diffalign.data.batch import PairBatch
from diffalign.data.cache import PairCache
from diffalign.elbo import policy_errors
from diffalign.objectives.pairwise import dpo_margin, squared_error
from diffalign.objectives.reference_free import imitation_error
from diffalign.trainers.pairs import Losses, PairOptions, PairTrainer, averaged, pair_metrics


class SFTConfig(PairOptions):
    """Fine-tuning on the preferred pictures, weighted by reward where the labels are soft."""

    method: Literal["sft"] = "sft"
    temperature: float = Field(default=1.0, gt=0)
    """Of the weights exp(reward / temperature), normalised over the pair; certain labels always weigh 1 and 0."""


class SFTTrainer(PairTrainer):
    """Denoising error of the preferred picture."""

    Config = SFTConfig
    beta = 1.0

    def __init__(self, config: SFTConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self._all_certain = False

    def prepare(
        self, cache: PairCache, folder: Path | None = None, builder: bool = True, **options: Any
    ) -> None:
        """Take the data; whether all labels are certain decides what goes through the network."""
        super().prepare(cache, folder, builder, **options)
        self._all_certain = bool((cache.pairs.preference == 1).all())

    def loss(self, batch: PairBatch) -> Losses:
        """Per-pair losses `[B]` and metrics `[B]`; rejected pictures cost nothing when all labels are certain."""
        times = self.config.times_per_pair
        pairs, weight = self._noised(batch, times), batch.weight.to(self.backbone.device)
        if self._all_certain:
            rows = range(len(pairs.t) // 2)
            x_t, t, target = (x[: len(rows)] for x in (pairs.x_t, pairs.t, pairs.target))
            pred = self.backbone.predict(x_t, t, pairs.conditioning.select(rows))
            chosen = averaged(squared_error(pred, target), times)
            return chosen * weight, {"chosen_error": chosen.detach()}
        chosen, rejected = (averaged(error, times) for error in policy_errors(self.backbone, pairs))
        preference = batch.preference.to(chosen.device)
        losses = imitation_error(chosen, rejected, preference, self.config.temperature)
        metrics = {"chosen_error": chosen, "rejected_error": rejected}
        return losses * weight, pair_metrics(dpo_margin(chosen, rejected, self.beta), metrics)
