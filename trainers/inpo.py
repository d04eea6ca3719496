"""InPO and SmPO: Diffusion-DPO on the noise that the model itself would have turned into the pictures.

DDIM-InPO (Lu et al., CVPR 2025, arXiv 2503.18454) replaces the random noise of a pair by DDIM inversion with the
current policy, so that the few steps of a run fall on the noise that matters. SmPO (Lu et al., ICML 2025, arXiv
2506.02698) adds a refined inversion and a margin that follows a soft label. The releases invert one pair at a time and
query the network up to 99 timesteps off the latent's noise level; here every row ends exactly at its own time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.data.batch import PairBatch
from diffalign.elbo import NoisedPairs, pair_errors
from diffalign.errors import DiffalignError
from diffalign.inversion import Inverter, implied_noise
from diffalign.objectives.pair_losses import smoothed_margin
from diffalign.objectives.pairwise import dpo_loss, dpo_margin
from diffalign.trainers.pairs import (
    Forwards,
    Losses,
    PairTrainer,
    ReferenceOptions,
    elements_of,
    pair_metrics,
)


class InPOConfig(ReferenceOptions):
    """InPO and SmPO."""

    method: Literal["inpo"] = "inpo"
    beta: float = Field(default=2000.0, gt=0)
    """As in DPO. The releases use 2000 for SD 1.5 (from a model fine-tuned on chosen pictures) and 5000 for SDXL."""
    reduction: Literal["mean", "sum"] = "mean"
    """Errors are means or sums over latent elements. `beta` for sums is `beta` for means divided by their number."""
    inversion_steps: int = Field(default=10, ge=1)
    """Steps for the whole schedule; a pair takes half of them on average, each a forward of both pictures. SmPO: 5."""
    refinements: int = Field(default=0, ge=0)
    """Extra forwards per step that average the noise at both ends of it. SmPO: 1."""
    inversion_noise: float = Field(default=0.1, ge=0)
    """Random part of each inversion step. SmPO: 0."""
    inverted_by: Literal["policy", "reference"] = "policy"
    """Whose path is followed: the current policy's, as in the releases, or the frozen model's, which does not move."""
    smooth_margin: float = Field(default=0.0, ge=0)
    """Above 0, the margin of soft labels is multiplied by this times 2 p - 1 (SmPO: 10, with p from a reward)."""


class InPOTrainer(PairTrainer):
    """The loss of InPO and SmPO on cached pairs. Held-out margins are measured at random noise, as for all methods."""

    Config = InPOConfig

    def __init__(self, config: InPOConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        if backbone.process.prediction == "sample":
            raise DiffalignError(
                "trainer.method is inpo, but the model predicts clean latents, from which the noise of a clean "
                "latent cannot be computed; expected a model that predicts noise, v or velocity. Use dpo."
            )
        self.beta = config.beta * (elements_of(backbone) if config.reduction == "sum" else 1)
        self.inverter = Inverter(
            config.inversion_steps,
            config.refinements,
            config.inversion_noise,
            config.inverted_by == "reference",
        )

    @classmethod
    def forwards(cls, config: InPOConfig) -> Forwards:
        """As for all methods, and the inversion: a time's share of the steps, rounded up, is half of them and a half.

        For uniform times; a few-step model's own times may need more.
        """
        steps = (config.inversion_steps + 1) / 2 * (1 + config.refinements)
        return replace(super().forwards(config), inversion=config.times_per_pair * steps)

    def loss(self, batch: PairBatch) -> Losses:
        """Per-pair losses `[B]` and metrics `[B]`."""
        times = self.config.times_per_pair
        errors = pair_errors(self.backbone, self._inverted(batch, times)).averaged(1.0, times)
        margin = dpo_margin(errors.chosen_delta, errors.rejected_delta, self.beta)
        preference, weight = batch.preference.to(margin.device), batch.weight.to(margin.device)
        if self.config.smooth_margin:
            losses = dpo_loss(smoothed_margin(margin, preference, self.config.smooth_margin))
        else:
            losses = dpo_loss(margin, preference)
        named = {
            "chosen_delta": errors.chosen_delta,
            "rejected_delta": errors.rejected_delta,
            "chosen_error": errors.chosen_error,
            "rejected_error": errors.rejected_error,
        }
        return losses * weight, pair_metrics(margin, named)

    def _inverted(self, batch: PairBatch, times: int) -> NoisedPairs:
        """The pairs at their times, on the model's own path instead of under random noise."""
        pairs, process = self._noised(batch, times), self.backbone.process
        x0 = torch.cat([batch.chosen] * times + [batch.rejected] * times)
        x0 = x0.to(self.backbone.device, torch.float32)
        noise = self._step_noise(batch, times) if self.inverter.eta else None
        x_t = self.inverter(self.backbone, x0, pairs.t, pairs.conditioning, noise)
        eps = implied_noise(process, x0, x_t, pairs.t)
        return replace(pairs, x_t=x_t, target=process.target(x0, eps, pairs.t))

    def _step_noise(self, batch: PairBatch, times: int) -> Tensor:
        """Noise `[steps, 2 * times * B, C, h, w]` of the inversion, of its own for each picture."""
        shape = (self.config.inversion_steps, *batch.chosen.shape[1:])
        rows = [batch.draw.normal(shape, "inversion", k, side) for side in (0, 1) for k in range(times)]
        return torch.cat(rows).transpose(0, 1).to(self.backbone.device)
