"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): good samples are imitated, bad ones avoided, in one regression.

A round's rewards become probabilities r that a sample is a good one. Each sample is noised at some levels; from the
predictions of the current and of the old policy two implicit ones are made, `v+ = (1 - beta) v_old + beta v` and
`v- = (1 + beta) v_old - beta v`, and the loss is `r |v+ - target|^2 + (1 - r) |v- - target|^2` over beta. Its optimum
is `v_old + (2 / beta) Delta`, a step towards the good samples. The old policy draws them and follows slowly.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.objectives.forms import Form
from diffalign.objectives.nft import (
    implicit_predictions,
    nft_loss,
    normalised_error,
    reward_probability,
)
from diffalign.objectives.pairwise import squared_error
from diffalign.trainers.forward_online import (
    Noised,
    OldPolicy,
    RelativeOptions,
    RelativeTrainer,
    Retained,
)
from diffalign.trainers.online import Losses
from diffalign.trainers.online_rows import CleanRows


class NFTConfig(RelativeOptions):
    """DiffusionNFT."""

    method: Literal["nft"] = "nft"
    beta: float = Field(default=1.0, gt=0)
    """Length of the implicit predictions. The optimum is `2 / beta` guidance directions away from the old policy: 0.1
    learns faster and is less stable than 1."""
    form: Form = "x0"
    """What errors are taken of. x0: clean latents (the release); velocity: as the paper states it; output: what the
    network predicts, which for eps models does not blow up at high noise."""
    normalise: bool | None = None
    """Divide each error by its mean absolute size, so that all noise levels have gradients alike. null: for x0."""
    retention: Retained = "ramp"
    """Share of itself that the old policy keeps when a round begins. copy: none, the samples are the current policy's;
    ramp: 0.001 per optimiser step, at most 0.5; delayed: 0 for 75 steps, then 0.0075 per step, at most 0.999; or a
    number. More is slower and more stable."""


class NFTTrainer(RelativeTrainer):
    """Positive and negative implicit predictions of noised samples."""

    Config = NFTConfig

    def __init__(self, config: NFTConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self.old = OldPolicy(backbone, config.retention)
        self._probability = Tensor()
        self._normalised = config.form == "x0" if config.normalise is None else config.normalise

    def _judge(self, advantages: Tensor) -> None:
        self._probability = reward_probability(advantages, self.config.clip)

    def loss(self, batch: CleanRows) -> Losses:
        """Losses and metrics `[B]`."""
        noised = self._noised(batch)
        policy = self._predict(noised)
        old = self._old(noised, policy)
        positive, negative = implicit_predictions(policy, old, self.config.beta)
        probability = self._probability[batch.sample.cpu()].to(policy.device)
        errors = self._error(positive, noised), self._error(negative, noised)
        losses = nft_loss(*errors, probability, self.config.beta, self.config.clip)
        metrics = {
            "positive_error": errors[0].detach(),
            "negative_error": errors[1].detach(),
            "old_distance": squared_error(policy.detach(), old),
        }
        if self.config.kl:
            distance = squared_error(policy, self._reference(noised))
            losses = losses + self.config.kl * distance
            metrics["reference_distance"] = distance.detach()
        return losses, metrics

    def _error(self, output: Tensor, noised: Noised) -> Tensor:
        """The error `[B]` of a network output."""
        form = self.config.form
        sides = self._in_form(form, output, noised), self._in_form(form, noised.target, noised)
        return normalised_error(*sides) if self._normalised else squared_error(*sides)
