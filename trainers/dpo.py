"""Diffusion-DPO: fine-tune on pairs with the likelihood replaced by its evidence lower bound.

Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization" (arXiv 2311.12908), eq. 14,
with the constants of the authors' release: `-log sigmoid(-(beta / 2) (delta_chosen - delta_rejected))`, where
delta is the policy's error minus the reference's, a mean over latent elements, at noise and time shared by the pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.conditioning import Conditioning
from diffalign.config import StrictModel
from diffalign.data.batch import PairBatch
from diffalign.data.cache import PairCache
from diffalign.elbo import NoisedPairs, noise_pairs, pair_errors
from diffalign.objectives.pairwise import dpo_loss, dpo_margin
from diffalign.randomness import Draw, derive_seed
from diffalign.reference import FixedDraws, Progress, ReferenceErrors, silent

Losses = tuple[Tensor, dict[str, Tensor]]


class DPOConfig(StrictModel):
    """Diffusion-DPO."""

    method: Literal["dpo"] = "dpo"
    beta: float = Field(default=5000.0, gt=0)
    """Strength of the pull to the reference, for errors reduced as `reduction` says. Larger: closer to the
    reference and sharper preferences. The paper used 2000 (SD1.5) and 5000 (SDXL); values of other libraries
    that sum, or that train at another resolution, do not carry over."""
    reduction: Literal["mean", "sum"] = "mean"
    """Errors are means or sums over latent elements. `beta` for sums is `beta` for means divided by their number."""
    reference: Literal["adapters_off", "frozen_copy", "cached"] = "adapters_off"
    """Where the reference's errors come from. adapters_off: the same network without its adapters (LoRA only), no
    memory. frozen_copy: a second network (full fine-tuning). cached: computed once for `reference_draws` fixed
    draws a pair and stored, which saves a third of the compute with LoRA, a quarter without."""
    reference_draws: int = Field(default=8, ge=1)
    """Draws of (time, noise) a pair when `reference` is `cached`; filling the store costs that many reference
    forwards a pair, few draws overfit."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of wrong labels (conservative DPO); 0 trusts every label."""
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of pairs trained without their caption. Default 0; the authors' script drops 0.2, the paper none."""
    stratified_times: bool = True
    """Spread the times of a batch evenly over the schedule: lower gradient variance at no cost."""
    time_weighting: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of training times."""


class DPOTrainer:
    """The loss of Diffusion-DPO on cached pairs."""

    Config = DPOConfig
    data = "pairs"

    def __init__(self, config: DPOConfig, backbone: Backbone, seed: int = 0) -> None:
        self.config, self.backbone, self.seed = config, backbone, seed
        elements = 1
        for size in backbone.latent_shape:
            elements *= size
        self.beta = config.beta * (elements if config.reduction == "sum" else 1)
        self._cache: PairCache | None = None
        self._stored: ReferenceErrors | None = None
        self._stored_held_out: ReferenceErrors | None = None

    @staticmethod
    def needs_frozen_copy(config: DPOConfig, tune: str) -> bool:
        """Whether a second network has to be loaded: for full fine-tuning, unless the errors are cached."""
        return config.reference == "frozen_copy" or (tune == "full" and config.reference == "adapters_off")

    def prepare(
        self,
        cache: PairCache,
        folder: Path | None = None,
        builder: bool = True,
        *,
        held_out: FixedDraws | None = None,
        progress: Progress = silent,
    ) -> None:
        """Take the data; with `reference: cached`, compute the reference's errors. Before any weight is trained.

        Args:
            folder: where these errors are kept and found again. builder: whether this process computes them.
            held_out: what `deltas` will be asked for. Under full fine-tuning with `cached` there is no reference
                network later on, so these errors are computed now, too.
        """
        self._cache = cache
        if self.config.reference != "cached":
            return

        def build(
            pairs: FixedDraws, noised: Callable[[Draw], NoisedPairs], *options: object
        ) -> ReferenceErrors:
            noising = (self.config.stratified_times, self.config.time_weighting, *options)
            return ReferenceErrors.build(
                self.backbone,
                pairs,
                noised,
                noising=noising,
                folder=folder,
                builder=builder,
                progress=progress,
            )

        fixed = FixedDraws(cache, derive_seed(self.seed, "reference draws"), self.config.reference_draws)
        self._stored = build(fixed, lambda draw: self._noised(self._batch(draw)), self.config.caption_dropout)
        if held_out is not None and self.backbone.config.tune == "full":
            self._stored_held_out = build(held_out, lambda draw: self._noised(held_out.cache.fetch(draw)))

    def fetch(self, draw: Draw) -> PairBatch:
        """The batch of a draw: with cached reference errors one of the stored draws, and captions dropped by chance.

        Raises:
            RuntimeError: `prepare` was not called.
        """
        return self._batch(self._stored.remap(draw) if self._stored else draw)

    def loss(self, batch: PairBatch) -> Losses:
        """Per-pair losses `[B]` and metrics `[B]` (margin, implicit accuracy, errors against the reference)."""
        stored = self._stored.lookup(batch.draw) if self._stored else None
        errors = pair_errors(self.backbone, self._noised(batch), stored)
        margin = dpo_margin(errors.chosen_delta, errors.rejected_delta, self.beta)
        preference = batch.preference.to(margin.device)
        losses = dpo_loss(margin, preference, self.config.label_smoothing) * batch.weight.to(margin.device)
        metrics = {
            "margin": margin,
            "implicit_accuracy": (margin > 0).float(),
            "chosen_delta": errors.chosen_delta,
            "rejected_delta": errors.rejected_delta,
            "chosen_error": errors.chosen_error,
            "rejected_error": errors.rejected_error,
        }
        return losses, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def deltas(self, batch: PairBatch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Policy minus reference errors `[B]` of chosen and rejected for a draw, for evaluation."""
        stored = self._stored_held_out.lookup(draw) if self._stored_held_out else None
        errors = pair_errors(self.backbone, self._noised(replace(batch, draw=draw)), stored)
        return errors.chosen_delta, errors.rejected_delta

    def margin(self, chosen_delta: Tensor, rejected_delta: Tensor) -> Tensor:
        """The DPO logit at this trainer's beta."""
        return dpo_margin(chosen_delta, rejected_delta, self.beta)

    def _batch(self, draw: Draw) -> PairBatch:
        """The training pairs of exactly this draw."""
        if self._cache is None:
            raise RuntimeError("DPOTrainer.fetch needs data; call prepare(cache) first")
        batch = self._cache.fetch(draw)
        if not self.config.caption_dropout:
            return batch
        return drop_captions(
            batch, draw.uniform("caption dropout") < self.config.caption_dropout, self._cache
        )

    def _noised(self, batch: PairBatch) -> NoisedPairs:
        """Noise a batch with the noise and times of its draw, shared inside each pair."""
        draw, process = batch.draw, self.backbone.process
        uniform = draw.uniform("time", stratified=self.config.stratified_times)
        noise = draw.normal(tuple(batch.chosen.shape[1:]), "noise")
        return noise_pairs(self.backbone, batch, process.times(uniform, self.config.time_weighting), noise)


def drop_captions(batch: PairBatch, dropped: Tensor, cache: PairCache) -> PairBatch:
    """Replace the captions of the rows `dropped` `[B]` by the unconditional embedding; micro-conditioning stays."""
    empty = cache.unconditional(len(dropped))

    def mix(conditioning: Conditioning) -> Conditioning:
        swapped = {
            name: torch.where(dropped.reshape(-1, *([1] * (value.dim() - 1))), getattr(empty, name), value)
            for name, value in conditioning.tensors().items()
            if getattr(empty, name) is not None
        }
        return replace(conditioning, **swapped)

    return replace(
        batch,
        conditioning_chosen=mix(batch.conditioning_chosen),
        conditioning_rejected=mix(batch.conditioning_rejected),
    )
