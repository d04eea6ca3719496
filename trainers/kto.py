"""Diffusion-KTO: learn from single pictures marked desirable or undesirable.

Li et al. 2024, "Aligning Diffusion Models by Optimizing Human Utility" (arXiv 2404.04465), on the ELBO: a picture gains
when the policy denoises it better than the reference, and its utility is that gain against the mean gain. Pairs are
split: the chosen picture is desirable, the rejected one is not, each with noise and time of its own.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed
from pydantic import Field
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.conditioning import Conditioning
from diffalign.data.batch import PairBatch, UnpairedBatch
from diffalign.data.picture_labels import Pictures
from diffalign.objectives.pairwise import dpo_margin, error_delta, squared_error
from diffalign.objectives.unpaired import kto_baseline, kto_loss
from diffalign.trainers.pairs import Losses, ReferenceOptions, averaged, pair_metrics
from diffalign.trainers.pictures import PictureTrainer


class KTOConfig(ReferenceOptions):
    """Diffusion-KTO."""

    method: Literal["kto"] = "kto"
    beta: float = Field(default=1000.0, gt=0)
    """Sharpness of the utility, for errors that are means over latent elements, without DPO's factor 1/2: half of a
    DPO beta does the same. 1000 is the release's default, the paper names 5000."""
    utility: Literal["kahneman_tversky", "loss_averse", "risk_seeking"] = "kahneman_tversky"
    """How a gain is felt. kahneman_tversky: saturates on both sides, deaf to hopeless pictures and so to wrong
    labels. loss_averse: binary cross-entropy, never lets go of a wrong one. risk_seeking: unbounded."""
    baseline: Literal["batch", "zero"] = "batch"
    """What gains are compared with. batch: their mean over the micro-batch of all processes, at least 0, so that
    the loss depends on the batch. zero: with loss_averse this is unpaired binary cross-entropy."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of desirable pictures; raise it where they are rare."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of undesirable pictures; 0 learns from the desirable ones alone."""


class KTOTrainer(PictureTrainer):
    """The loss of Diffusion-KTO on single judged pictures, or on pairs that are drawn together and taken apart."""

    Config = KTOConfig
    data_kinds: ClassVar[tuple[str, ...]] = ("pairs", "pictures")
    needs: ClassVar[dict[str, tuple[str, ...]]] = {"pictures": ("label",)}

    def __init__(self, config: KTOConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        # KTO's formula lacks the factor 1/2 of the DPO margin, which shows the held-out numbers.
        self.beta = 2 * config.beta

    def loss(self, batch: PairBatch | UnpairedBatch) -> Losses:
        """Losses `[B]` (of a pair the mean over its two pictures) and metrics `[B]`."""
        judged = split_pairs(batch) if isinstance(batch, PairBatch) else batch
        options, noised = self.config, self._noised_singly(judged)
        inputs = (noised.x_t, noised.t, noised.conditioning)
        reference = self.backbone.predict(*inputs, reference=True)
        policy = self.backbone.predict(*inputs)
        gain = averaged(-error_delta(policy, reference, noised.target), options.times_per_pair)
        error = averaged(squared_error(policy.detach(), noised.target), options.times_per_pair)
        baseline = kto_baseline(*over_processes(gain)) if options.baseline == "batch" else gain.new_zeros(())
        weights = (options.desirable_weight, options.undesirable_weight)
        label, weight = judged.label.to(gain.device), judged.weight.to(gain.device)
        losses = weight * kto_loss(options.beta * (gain - baseline), label, options.utility, *weights)
        if isinstance(batch, PairBatch):
            losses = losses.reshape(2, -1).mean(0)
            return losses, paired_metrics(gain, error, baseline, self.beta)
        metrics = {"gain": gain, "error": error, "baseline": baseline.expand_as(gain)}
        return losses, {name: value.detach() for name, value in metrics.items()}

    @classmethod
    def choose(cls, config: Any, pictures: Pictures) -> Pictures:
        """The pictures that somebody judged."""
        return pictures.keep(~np.isnan(pictures.label))


def split_pairs(batch: PairBatch) -> UnpairedBatch:
    """Pairs taken apart: chosen rows, desirable with probability p, then rejected rows, with 1 - p."""
    return UnpairedBatch(
        torch.cat([batch.chosen, batch.rejected]),
        Conditioning.concat([batch.conditioning_chosen, batch.conditioning_rejected]),
        torch.cat([batch.preference, 1 - batch.preference]),
        torch.cat([batch.weight, batch.weight]),
        batch.draw,
    )


def paired_metrics(gain: Tensor, error: Tensor, baseline: Tensor, beta: float) -> dict[str, Tensor]:
    """The metrics of pairs `[B]` from gains and errors of chosen rows, then rejected rows `[2B]`."""
    chosen_gain, rejected_gain = gain.chunk(2)
    chosen_error, rejected_error = error.chunk(2)
    errors = {
        "chosen_delta": -chosen_gain,
        "rejected_delta": -rejected_gain,
        "chosen_error": chosen_error,
        "rejected_error": rejected_error,
        "baseline": baseline.expand_as(chosen_gain),
    }
    return pair_metrics(dpo_margin(-chosen_gain, -rejected_gain, beta), errors)


def over_processes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the values of all processes, without gradients."""
    totals = torch.stack([values.detach().sum(), values.new_tensor(float(len(values)))])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
    return totals[0], totals[1]
