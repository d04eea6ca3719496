"""SimPO and CPO for diffusion: pair losses on the policy's errors alone.

SimPO (Meng et al. 2024, arXiv 2405.14734) asks for a margin gamma between average log-likelihoods, without a reference.
CPO (Xu et al. 2024, arXiv 2401.08417) has no margin but fine-tunes on the chosen picture as well. Both on the evidence
lower bound, where the average log-likelihood is minus the mean error.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffalign.backbones.base import Backbone
from diffalign.data.batch import PairBatch
from diffalign.elbo import policy_errors
from diffalign.objectives.pairwise import dpo_margin
from diffalign.objectives.reference_free import simpo_loss
from diffalign.trainers.pairs import Losses, PairOptions, PairTrainer, averaged, elements_of, pair_metrics


class SimPOConfig(PairOptions):
    """SimPO and CPO."""

    method: Literal["simpo"] = "simpo"
    beta: float = Field(default=500.0, gt=0)
    """Sharpness of the margin `-(beta / 2) (chosen error - rejected error)`. Nothing holds the model back here, so a
    tenth of what DPO takes."""
    reduction: Literal["mean", "sum"] = "mean"
    """Errors are means or sums over latent elements. `beta` for sums is `beta` for means divided by their number."""
    gamma: float = Field(default=0.0, ge=0)
    """Margin that counts as won. Compare with the spread of the logged `margin` at the start."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Fine-tuning on the chosen picture (CPO), in units of beta / 2 times its error; 0.1 to 1 keeps it from rising."""


class SimPOTrainer(PairTrainer):
    """The losses of SimPO and CPO on cached pairs; the reference is never asked in training."""

    Config = SimPOConfig

    def __init__(self, config: SimPOConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self.beta = config.beta * (elements_of(backbone) if config.reduction == "sum" else 1)

    def loss(self, batch: PairBatch) -> Losses:
        """Per-pair losses `[B]` and metrics `[B]`."""
        times, config = self.config.times_per_pair, self.config
        errors = policy_errors(self.backbone, self._noised(batch, times))
        chosen, rejected = (averaged(error, times) for error in errors)
        preference, weight = batch.preference.to(chosen.device), batch.weight.to(chosen.device)
        losses = simpo_loss(chosen, rejected, preference, self.beta, config.gamma, config.sft_weight)
        metrics = {"chosen_error": chosen, "rejected_error": rejected}
        return losses * weight, pair_metrics(dpo_margin(chosen, rejected, self.beta), metrics)
