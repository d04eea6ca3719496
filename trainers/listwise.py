"""Listwise preference optimisation: learn from whole groups of pictures of one prompt, ranked or scored.

The implicit rewards `-(beta / 2) delta` of all K pictures, at noise and time shared by the group, are ordered as the
data says: by Plackett-Luce (DPO, arXiv 2305.18290, appendix A.3), by LiPO-lambda (Liu et al. 2024, arXiv 2402.01878),
or so that their softmax matches that of the scores. With K = 2 Plackett-Luce is Diffusion-DPO.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.data.batch import GroupBatch
from diffalign.elbo import reference_errors
from diffalign.objectives.listwise import (
    all_pairs,
    lipo_lambda_loss,
    plackett_luce_loss,
    softmax_matching_loss,
)
from diffalign.objectives.pairwise import error_delta, squared_error
from diffalign.randomness import Draw
from diffalign.trainers.pairs import Losses
from diffalign.trainers.pictures import PictureOptions, PictureTrainer


class ListwiseConfig(PictureOptions):
    """Listwise preference optimisation on ranked groups."""

    method: Literal["listwise"] = "listwise"
    loss: Literal["lipo_lambda", "plackett_luce", "softmax_matching"] = "lipo_lambda"
    """lipo_lambda: every two pictures, weighted by what swapping them would change at the top of the list.
    plackett_luce: the likelihood of the whole order; what is good enough to be told apart counts alike everywhere.
    softmax_matching: how much better counts, not only the order; needs scores that mean something."""
    beta: float = Field(default=5000.0, gt=0)
    """Strength of the pull to the reference, on the scale of DPO's beta (errors are means over latent elements)."""
    temperature: float = Field(default=1.0, gt=0)
    """Of softmax_matching: implicit rewards differ by value gap / temperature at the optimum; values lie in [0, 1]."""
    group_size: int | None = Field(default=None, ge=2)
    """Pictures of a group per step: of larger groups a random sample, smaller ones are left out. Memory grows with it.
    null: the most frequent size of the data."""
    reference: Literal["adapters_off", "frozen_copy", "cached"] = "adapters_off"
    """Where the reference's errors come from. adapters_off: the same network without its adapters (LoRA only), no
    memory. frozen_copy: a second network (full fine-tuning). cached: computed once for `reference_draws` fixed
    draws a group and stored, which saves a third of the compute with LoRA, a quarter without."""
    reference_draws: int = Field(default=8, ge=1)
    """Draws of (time, noise) a group when `reference` is `cached`, and of groups larger than `group_size` also of its
    pictures; filling the store costs that many reference forwards a group, few draws overfit."""

    @model_validator(mode="after")
    def _options_fit(self) -> ListwiseConfig:
        if self.reference == "cached" and self.times_per_picture > 1:
            raise ValueError(
                "times_per_picture should be 1 for reference=cached: a step uses one stored draw"
            )
        return self


class ListwiseTrainer(PictureTrainer):
    """Losses of ranked groups on implicit rewards."""

    Config = ListwiseConfig
    data_kinds: ClassVar[tuple[str, ...]] = ("groups",)
    needs: ClassVar[dict[str, tuple[str, ...]]] = {"groups": ("rank", "score", "label")}

    def __init__(self, config: ListwiseConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self.beta = config.beta

    def loss(self, batch: GroupBatch) -> Losses:
        """Per-group losses `[B]` and metrics `[B]`."""
        error, delta = self._errors(batch)
        scores, values = -0.5 * self.beta * delta, batch.values.to(delta.device)
        losses = batch.weight.to(delta.device) * self._losses(scores, values)
        return losses, group_metrics(scores, values, delta, error)

    def _errors(self, batch: GroupBatch) -> tuple[Tensor, Tensor]:
        """The policy's errors, and with gradients what they are above the reference's, each `[B, K]`."""
        noised = self._noised_together(batch)
        inputs = (noised.x_t, noised.t, noised.conditioning)
        shape = (self.config.times_per_picture, *batch.values.shape)
        if self._stored is not None:
            error = squared_error(self.backbone.predict(*inputs), noised.target).reshape(shape).mean(0)
            return error.detach(), error - self._stored.lookup(batch.draw).to(error.device)
        reference = self.backbone.predict(*inputs, reference=True)
        policy = self.backbone.predict(*inputs)
        error = squared_error(policy.detach(), noised.target)
        delta = error_delta(policy, reference, noised.target)
        return error.reshape(shape).mean(0), delta.reshape(shape).mean(0)

    def _reference_errors(self, draw: Draw) -> Tensor:
        """The reference's errors `[B, K]` of the groups of exactly this draw."""
        batch = self._batch(draw)
        return reference_errors(self.backbone, self._noised_together(batch)).reshape(batch.values.shape)

    def _losses(self, scores: Tensor, values: Tensor) -> Tensor:
        if self.config.loss == "plackett_luce":
            return plackett_luce_loss(scores, values)
        if self.config.loss == "lipo_lambda":
            return lipo_lambda_loss(scores, values)
        return softmax_matching_loss(scores, values, self.config.temperature)


@torch.no_grad()
def group_metrics(scores: Tensor, values: Tensor, delta: Tensor, error: Tensor) -> dict[str, Tensor]:
    """What is logged of groups `[B, K]`, each `[B]`: the best picture against the worst, and the share of pairs whose
    scores are in order; a tie of scores counts as half.
    """
    best, worst = values.argmax(1, keepdim=True), values.argmin(1, keepdim=True)
    gap = scores[:, :, None] - scores[:, None, :]
    right = (gap > 0).float() + 0.5 * (gap == 0).float()
    ordered = all_pairs(values)
    return {
        "margin": (scores.gather(1, best) - scores.gather(1, worst))[:, 0],
        "implicit_accuracy": (right * ordered).sum((1, 2)) / ordered.sum((1, 2)).clamp(min=1),
        "best_delta": delta.gather(1, best)[:, 0],
        "worst_delta": delta.gather(1, worst)[:, 0],
        "error": error.mean(1),
    }
