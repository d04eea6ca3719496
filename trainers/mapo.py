"""MaPO: preference optimisation without a reference model.

Hong et al. 2024, "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference" (arXiv
2406.06424): denoise the chosen picture well, and better than the rejected one. The released code and the second
version of the paper state different losses; both are here, by name.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffalign.backbones.base import Backbone
from diffalign.data.batch import PairBatch
from diffalign.elbo import policy_errors
from diffalign.objectives.reference_free import likelihood_proxy, mapo_loss, mapo_margin, mapo_paper_loss
from diffalign.trainers.pairs import Losses, PairOptions, PairTrainer, averaged, pair_metrics

# Diffusion steps T of the released margin, whatever the model has.
STEPS = 1000


class MaPOConfig(PairOptions):
    """MaPO, for errors that are means over latent elements."""

    method: Literal["mapo"] = "mapo"
    form: Literal["code", "paper"] = "code"
    """code: the release, fixed slope of the margin, `beta` weighs it against fine-tuning. paper: its second version,
    where `beta` is an exponent and its inverse the weight. A beta of one means nothing in the other."""
    beta: float | None = Field(default=None, gt=0)
    """null: 0.1 for `code` (larger: more preference, less fine-tuning), 8 for `paper` (larger: sharper margin)."""
    snr: float = Field(default=0.5, gt=0)
    """Scale of the errors inside the margin of `code`, `snr_value` there; the slope of the margin is 500 times it."""


class MaPOTrainer(PairTrainer):
    """The loss of MaPO on cached pairs; the reference is never asked in training."""

    Config = MaPOConfig

    def __init__(self, config: MaPOConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self.strength = config.beta or {"code": 0.1, "paper": 8.0}[config.form]
        # The DPO beta with the slope that the margin has at small errors; held-out margins are shown in it.
        self.beta = STEPS * config.snr if config.form == "code" else self.strength

    def loss(self, batch: PairBatch) -> Losses:
        """Per-pair losses `[B]` and metrics `[B]`."""
        times = self.config.times_per_pair
        errors = policy_errors(self.backbone, self._noised(batch, times))
        chosen, rejected = (averaged(error, times) for error in errors)
        preference, weight = batch.preference.to(chosen.device), batch.weight.to(chosen.device)
        if self.config.form == "code":
            losses = mapo_loss(chosen, rejected, preference, self.strength, self.config.snr)
            margin = mapo_margin(chosen, rejected, self.config.snr)
        else:
            losses = mapo_paper_loss(chosen, rejected, preference, self.strength)
            margin = likelihood_proxy(chosen) ** self.strength - likelihood_proxy(rejected) ** self.strength
        return losses * weight, pair_metrics(margin, {"chosen_error": chosen, "rejected_error": rejected})
