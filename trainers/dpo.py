"""Diffusion-DPO and the other losses on its margin: fine-tune on pairs with the likelihood replaced by its ELBO.

Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization" (arXiv 2311.12908), eq. 14,
with the constants of the authors' release: `-log sigmoid(-(beta / 2) (delta_chosen - delta_rejected))`, where
delta is the policy's error minus the reference's, a mean over latent elements, at noise and time shared by the pair.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.data.batch import PairBatch
from diffalign.data.cache import PairCache
from diffalign.data.gaps import known_gaps
from diffalign.elbo import PairErrors, pair_errors
from diffalign.objectives.pair_losses import (
    PAIR_LOSSES,
    PairRewards,
    debiased_preference,
    divergence_reward,
    dynamic_beta_factor,
    imitation_loss,
    safeguarded_delta,
)
from diffalign.objectives.pairwise import dpo_margin, smoothed_preference
from diffalign.objectives.rewarded import modpo_margin
from diffalign.process import Process
from diffalign.trainers.pairs import (
    Losses,
    PairOptions,
    PairTrainer,
    chosen_first,
    elements_of,
    pair_metrics,
)

PairLossName = Literal["sigmoid", "hinge", "ipo", "exo", "sppo", "nca", "bce", "apo_zero", "apo_down"]
# Losses that see nothing but the margin, so that other rewards can be taken out of it.
MARGIN_LOSSES = ("sigmoid", "hinge", "ipo", "exo")


class DPOConfig(PairOptions):
    """Diffusion-DPO."""

    method: Literal["dpo"] = "dpo"
    beta: float = Field(default=5000.0, gt=0)
    """Strength of the pull to the reference, for errors reduced as `reduction` says. Larger: closer to the
    reference and sharper preferences. The paper used 2000 (SD1.5) and 5000 (SDXL); values of other libraries
    that sum, or that train at another resolution, do not carry over."""
    reduction: Literal["mean", "sum"] = "mean"
    """Errors are means or sums over latent elements. `beta` for sums is `beta` for means divided by their number."""
    loss: PairLossName = "sigmoid"
    """What is made of the margin h and the two implicit rewards. sigmoid: DPO. ipo: h towards 1/2, cannot run away on
    certain labels. hinge: stops at h = 1. exo: h towards log((1 - e) / e), e = `label_smoothing`. sppo, nca, bce and
    apo_zero move each picture on its own, chosen up and rejected down; apo_down moves both down."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """How distance to the reference counts (f-DPO). forward_kl and large alpha keep more of its variety."""
    divergence_alpha: float = Field(default=0.5, gt=0)
    """For `divergence: alpha`: near 0 is the reverse, 1 the forward KL. TRL's newer releases write 1 - alpha."""
    beta_rejected: float | None = Field(default=None, ge=0)
    """Own beta of the rejected side. Below `beta`: less push away from rejected pictures, which is what damages
    details; null: the same."""
    beta_weighting: Literal["constant", "noise_space", "velocity_space"] = "constant"
    """Beta over time. noise_space: as if errors were those of the noise, which multiplies beta by alpha(t)^2 for v and
    (1 - t)^2 for flow models (Flow-DPO's theory, which its authors found worse than constant). velocity_space: as if
    they were those of v, which divides beta by alpha(t)^2 for models that predict noise: for few-step models, whose
    first step decides the picture where errors of the noise are tiny. `beta` has to be some 20 times smaller then."""
    dynamic_beta: float = Field(default=0.0, ge=0)
    """Raises beta by up to this factor for pairs whose label states a large reward gap; needs soft labels."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Adds fine-tuning on the chosen picture, in units of beta / 2 times its error: 0.1 to 1 counters a chosen error
    that rises; elsewhere written alpha beta / 2 with alpha near 1000."""
    other_rewards: dict[str, float] = Field(default_factory=dict)
    """MODPO: weights of other rewards, by the name of their column in the data's `labels`; the labels themselves weigh
    1 minus the sum. The optimum is that of the weighted sum of all rewards; one run per weighting."""
    safeguard: float | None = Field(default=None, ge=0, le=1)
    """Scales the rejected side's gradient down where it would make the chosen picture worse (Diffusion-SDPO's mu:
    0.9 for SD 1.5, 0.6 for SDXL there); 1 removes it wherever the two pull together, null: off."""
    reference: Literal["adapters_off", "frozen_copy", "cached"] = "adapters_off"
    """Where the reference's errors come from. adapters_off: the same network without its adapters (LoRA only), no
    memory. frozen_copy: a second network (full fine-tuning). cached: computed once for `reference_draws` fixed
    draws a pair and stored, which saves a third of the compute with LoRA, a quarter without."""
    reference_draws: int = Field(default=8, ge=1)
    """Draws of (time, noise) a pair when `reference` is `cached`; filling the store costs that many reference
    forwards a pair, few draws overfit."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of wrong labels (conservative DPO); 0 trusts every label."""
    label_flip: float = Field(default=0.0, ge=0, lt=0.5)
    """Known rate of flipped labels, undone without bias (robust DPO). Unbounded: margins grow without end, so
    stop early; `label_smoothing` is its bounded cousin."""

    @model_validator(mode="after")
    def _options_fit(self) -> DPOConfig:
        if self.label_smoothing and self.label_flip:
            raise ValueError("label_smoothing or label_flip should be 0: both treat the same wrong labels")
        if self.loss == "exo" and not self.label_smoothing:
            raise ValueError("label_smoothing should be above 0 for loss=exo, such as 0.01: it is the target")
        if self.loss in ("exo", "sppo") and self.label_flip:
            fitting = ", ".join(name for name in PAIR_LOSSES if name not in ("exo", "sppo"))
            raise ValueError(f"label_flip should be 0 for loss={self.loss}; it fits: {fitting}")
        total = sum(self.other_rewards.values())
        if any(weight < 0 for weight in self.other_rewards.values()) or total >= 1:
            raise ValueError(
                f"other_rewards should be weights of at least 0 with a sum below 1 (it is {total:g}): the labels weigh "
                "the rest"
            )
        if self.other_rewards and self.loss not in MARGIN_LOSSES:
            raise ValueError(
                f"other_rewards should be empty for loss={self.loss}; they fit: {', '.join(MARGIN_LOSSES)}"
            )
        if self.reference == "cached" and self.times_per_pair > 1:
            raise ValueError("times_per_pair should be 1 for reference=cached: a step uses one stored draw")
        return self


class DPOTrainer(PairTrainer):
    """The losses of the Diffusion-DPO margin on cached pairs."""

    Config = DPOConfig

    def __init__(self, config: DPOConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self.beta = config.beta * (elements_of(backbone) if config.reduction == "sum" else 1)
        self.rejected_share = 1.0 if config.beta_rejected is None else config.beta_rejected / config.beta
        self._other_gaps: Tensor | None = None

    def prepare(
        self, cache: PairCache, folder: Path | None = None, builder: bool = True, **options: Any
    ) -> None:
        """Take the data and, of it, the gaps `[N, K]` of other rewards; 0 where a pair has no label for one."""
        if self.config.other_rewards:
            names = self.config.other_rewards
            gaps = [known_gaps(cache.pairs.gaps, name, "trainer.other_rewards") for name in names]
            self._other_gaps = torch.stack([torch.from_numpy(gap) for gap in gaps], 1).nan_to_num(0.0).float()
        super().prepare(cache, folder, builder, **options)

    def loss(self, batch: PairBatch) -> Losses:
        """Per-pair losses `[B]` and metrics `[B]` (margin, implicit accuracy, errors against the reference)."""
        errors = self._errors(batch)
        preference = batch.preference.to(errors.chosen_delta.device)
        rewards = self._rewards(errors, preference)
        judged = replace(rewards, margin=self._judged_margin(rewards.margin, batch))
        losses = pair_losses(self.config, judged, preference) * batch.weight.to(preference.device)
        named = {
            "chosen_delta": errors.chosen_delta,
            "rejected_delta": errors.rejected_delta,
            "chosen_error": errors.chosen_error,
            "rejected_error": errors.rejected_error,
        }
        return losses, pair_metrics(rewards.margin, named)

    def _judged_margin(self, margin: Tensor, batch: PairBatch) -> Tensor:
        """What the labels are compared with: the margin, without the share of other rewards in it (MODPO)."""
        if self._other_gaps is None:
            return margin
        gaps = self._other_gaps[torch.as_tensor(list(batch.draw.records))].to(margin.device)
        others = list(self.config.other_rewards.values())
        return modpo_margin(margin, gaps, torch.tensor([1 - sum(others), *others], device=margin.device))

    def _errors(self, batch: PairBatch) -> PairErrors:
        """Errors `[B]` at this draw's times, averaged over several of them."""
        stored = chosen_first(self._stored.lookup(batch.draw)) if self._stored else None
        draws = self.config.times_per_pair
        pairs = self._noised(batch, draws)
        errors = pair_errors(self.backbone, pairs, stored)
        weight = beta_weight(self.backbone.process, pairs.t.chunk(2)[0], self.config.beta_weighting)
        return errors.averaged(weight, draws)

    def _rewards(self, errors: PairErrors, preference: Tensor) -> PairRewards:
        """Implicit rewards and margin, after everything that changes beta or the rejected side."""
        config, rejected = self.config, errors.rejected_delta
        if config.safeguard is not None:
            rejected = safeguarded_delta(rejected, errors.chosen_error, errors.overlap, config.safeguard)
        rejected = self.rejected_share * rejected
        beta: float | Tensor = self.beta
        if config.dynamic_beta:
            beta = self.beta * dynamic_beta_factor(preference, config.dynamic_beta)
        margin = dpo_margin(errors.chosen_delta, rejected, beta)
        rewards = PairRewards(-0.5 * beta * errors.chosen_delta, -0.5 * beta * rejected, margin)
        if config.divergence == "reverse_kl":
            return rewards
        chosen, rejected = (
            divergence_reward(reward, config.divergence, config.divergence_alpha)
            for reward in (rewards.chosen, rewards.rejected)
        )
        return PairRewards(chosen, rejected, chosen - rejected)


def pair_losses(config: DPOConfig, rewards: PairRewards, preference: Tensor) -> Tensor:
    """The loss that the options name `[B]`, with their view of the labels and fine-tuning on the chosen picture."""
    if config.label_flip:
        believed = debiased_preference(preference, config.label_flip)
    else:
        believed = smoothed_preference(preference, config.label_smoothing)
    losses = PAIR_LOSSES[config.loss](rewards, believed)
    if config.sft_weight:
        losses = losses + config.sft_weight * imitation_loss(rewards, preference)
    return losses


def beta_weight(process: Process, t: Tensor, weighting: str) -> Tensor | float:
    """Factor on beta at times `t` `[B]`: 1, or what turns the network's own errors into those of noise or velocity.

    For given x_t an error e of v is one of `alpha e` of the noise and of `-sigma e` of x0. So it is for the velocity of
    flow models, with alpha = 1 - t.
    """
    if weighting == "constant":
        return 1.0
    alpha, sigma = process.alpha_sigma(t)
    own = {"epsilon": alpha, "sample": sigma}.get(process.prediction, torch.ones_like(alpha))
    # `own` is the size of an error of v in the network's own terms.
    return own.reciprocal().square() * (alpha.square() if weighting == "noise_space" else 1.0)
