"""RPO: learning a subject from photographs of it and samples of the model, with a harmonic reward as judge.

Miao et al. 2024, "Subject-driven Text-to-Image Generation via Preference-based Reinforcement Learning" (arXiv
2407.12164). One picture of a pair is a photograph of the subject, the other a sample of the model for the same
prompt. The photograph is always imitated; a soft label from the lambda-harmonic reward says how far it is also
preferred.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.data.batch import PairBatch
from diffalign.elbo import pair_errors
from diffalign.objectives.rewarded import harmonic_rpo_loss
from diffalign.trainers.pairs import Losses, PairTrainer, ReferenceOptions, pair_metrics


class RPOConfig(ReferenceOptions):
    """Lambda-harmonic RPO, for errors that are means over latent elements."""

    method: Literal["rpo"] = "rpo"
    beta: float = Field(default=1.0, gt=0)
    """Strength of the preference beside imitation, without DPO's factor 1/2. At the release's 1 the margin stays near 0
    and the term is a weak pull away from the samples; 250 is DPO's slope at beta 500."""
    imitation: float = Field(default=1.0, ge=0)
    """Weight of the photograph's denoising error."""
    photo: Literal["first", "chosen"] = "first"
    """Which picture is the photograph: the first of a record, whatever its label, or the preferred one."""


class RPOTrainer(PairTrainer):
    """The loss of RPO on cached pairs of photograph and sample."""

    Config = RPOConfig

    def __init__(self, config: RPOConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self.beta = 2 * config.beta

    def loss(self, batch: PairBatch) -> Losses:
        """Per-pair losses `[B]` and metrics `[B]`; the margin is that of the photograph over the sample."""
        times, device = self.config.times_per_pair, self.backbone.device
        errors = pair_errors(self.backbone, self._noised(batch, times)).averaged(1.0, times)
        first = self._photo_is_chosen(batch).to(device)
        preference, weight = batch.preference.to(device), batch.weight.to(device)
        photo = torch.where(first, errors.chosen_delta, errors.rejected_delta)
        sample = torch.where(first, errors.rejected_delta, errors.chosen_delta)
        # Deltas carry the gradient of the policy's errors.
        error = torch.where(first, errors.chosen_error, errors.rejected_error) + photo - photo.detach()
        label = torch.where(first, preference, 1 - preference)
        losses = harmonic_rpo_loss(error, photo, sample, label, self.config.beta, self.config.imitation)
        named = {"photo_error": error, "photo_delta": photo, "sample_delta": sample}
        return losses * weight, pair_metrics(self.margin(photo, sample), named)

    def _photo_is_chosen(self, batch: PairBatch) -> Tensor:
        """Whether each pair's preferred picture `[B]` is its photograph."""
        if self.config.photo == "chosen":
            return torch.ones(len(batch), dtype=torch.bool)
        if self._cache is None:
            raise RuntimeError("RPOTrainer.loss needs data; call prepare(cache) first")
        return torch.from_numpy(self._cache.pairs.chosen)[torch.as_tensor(list(batch.draw.records))] == 0
