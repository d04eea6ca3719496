"""DSPO: direct score preference optimisation, in the two forms of its release.

Zhu et al., "DSPO: Direct Score Preference Optimization for Diffusion Model Alignment" (ICLR 2025, OpenReview
xyfb9HHvMe). Draws and margin are those of Diffusion-DPO; `diffalign/objectives/dspo.py` says what the losses really do.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffalign.backbones.base import Backbone
from diffalign.data.batch import PairBatch
from diffalign.objectives.dspo import dspo_score_loss, dspo_squared_loss
from diffalign.objectives.pairwise import dpo_margin, error_delta, squared_error
from diffalign.trainers.pairs import Losses, PairTrainer, ReferenceOptions, averaged, pair_metrics


class DSPOConfig(ReferenceOptions):
    """DSPO, for errors that are means over latent elements."""

    method: Literal["dspo"] = "dspo"
    form: Literal["squared", "score"] = "squared"
    """squared: the release for SDXL, `(1 - sigmoid(margin))^2`. score: the release for SD 1.5, fine-tuning on the
    chosen picture with a correction of the size of `beta`."""
    beta: float | None = Field(default=None, gt=0)
    """null: 5000 for `squared`, as in DPO; 0.001 for `score`, which makes it fine-tuning on chosen pictures."""


class DSPOTrainer(PairTrainer):
    """The losses of DSPO on cached pairs."""

    Config = DSPOConfig

    def __init__(self, config: DSPOConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self.beta = config.beta or {"squared": 5000.0, "score": 0.001}[config.form]

    def loss(self, batch: PairBatch) -> Losses:
        """Per-pair losses `[B]` and metrics `[B]`; a soft label weighs the two orders of its pair."""
        times, pairs = self.config.times_per_pair, self._noised(batch, self.config.times_per_pair)
        inputs = (pairs.x_t, pairs.t, pairs.conditioning)
        reference = self.backbone.predict(*inputs, reference=True)
        policy = self.backbone.predict(*inputs)
        delta = error_delta(policy, reference, pairs.target)
        chosen_delta, rejected_delta = delta.chunk(2)
        margin = dpo_margin(chosen_delta, rejected_delta, self.beta)
        orders = []
        for side, h in zip(range(2), (margin, -margin), strict=True):
            p, r, y = (x.chunk(2)[side] for x in (policy, reference, pairs.target))
            if self.config.form == "score":
                orders.append(averaged(dspo_score_loss(p, r, y, h, self.beta), times))
            else:
                orders.append(averaged(dspo_squared_loss(p, r, h), times))
        preference, weight = batch.preference.to(margin.device), batch.weight.to(margin.device)
        losses = weight * (preference * orders[0] + (1 - preference) * orders[1])
        chosen_error, rejected_error = squared_error(policy.detach(), pairs.target).chunk(2)
        named = {
            "chosen_delta": chosen_delta,
            "rejected_delta": rejected_delta,
            "chosen_error": chosen_error,
            "rejected_error": rejected_error,
        }
        means = {name: averaged(value, times) for name, value in named.items()}
        return losses, pair_metrics(averaged(margin, times), means)
