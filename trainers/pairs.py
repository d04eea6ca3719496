"""What all trainers on preference pairs share: options, noised batches, stored reference errors, held-out margins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.conditioning import Conditioning
from diffalign.data.batch import PairBatch
from diffalign.data.cache import PairCache
from diffalign.elbo import NoisedPairs, noise_pairs, pair_errors, reference_errors
from diffalign.errors import DiffalignError
from diffalign.objectives.pairwise import dpo_margin
from diffalign.randomness import Draw, derive_seed
from diffalign.reference import FixedDraws, Measured, Progress, ReferenceErrors, silent
from diffalign.strict import StrictModel

Losses = tuple[Tensor, dict[str, Tensor]]
# Pairs that are searched for a second caption before the data is refused.
CAPTION_SEARCH = 256


class PairOptions(StrictModel):
    """Options of every method on pairs."""

    captions: Literal["own", "shared", "dual"] = "own"
    """own: each picture with its own caption, where the data has two. shared: the chosen one's caption for both, the
    control of dual captions. dual: like own, but data without second captions is refused (DCPO)."""
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of pairs trained without their caption. Default 0; the authors' script drops 0.2, the paper none."""
    stratified_times: bool = True
    """Spread the times of a batch evenly over the schedule: lower gradient variance at no cost."""
    time_weighting: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of training times."""
    times_per_pair: int = Field(default=1, ge=1)
    """Draws of (time, noise) a pair and step, averaged before the margin is formed: a less noisy margin for as many
    times the compute and activation memory."""


class ReferenceOptions(PairOptions):
    """Options of the methods that compare with the model before training."""

    reference: Literal["adapters_off", "frozen_copy"] = "adapters_off"
    """Where the reference's errors come from. adapters_off: the same network without its adapters (LoRA only), no
    memory. frozen_copy: a second network; full fine-tuning always uses one."""


@dataclass(frozen=True)
class Forwards:
    """Network passes over a pair (both pictures) in one training step, on average.

    Fields:
        policy: with gradients; each has a backward pass. inversion: by either model, without gradients, to find the
            noise of a picture. reference: by the frozen model, without gradients.
    """

    policy: float
    inversion: float
    reference: float


class PairTrainer:
    """Data side of a method on cached pairs; a method adds `loss`, and `beta` for its margin."""

    Config: ClassVar[type[PairOptions]]
    data_kinds: ClassVar[tuple[str, ...]] = ("pairs",)
    needs: ClassVar[dict[str, tuple[str, ...]]] = {}
    tunes: ClassVar[tuple[str, ...]] = ("lora", "full")
    beta: float

    def __init__(self, config: Any, backbone: Backbone, seed: int = 0) -> None:
        self.config, self.backbone, self.seed = config, backbone, seed
        self._cache: PairCache | None = None
        self._stored: ReferenceErrors | None = None
        self._stored_held_out: ReferenceErrors | None = None

    @staticmethod
    def needs_frozen_copy(config: Any, tune: str) -> bool:
        """Whether a second network has to be loaded: never for a method that asks no reference.

        Full fine-tuning needs one for the others, unless the reference's errors are stored.
        """
        reference = getattr(config, "reference", None)
        return reference == "frozen_copy" or (tune == "full" and reference == "adapters_off")

    @classmethod
    def forwards(cls, config: Any) -> Forwards:
        """What a step costs with these options: for `--dry-run`, which has no data and no model."""
        times = float(config.times_per_pair)
        asks = getattr(config, "reference", "cached") != "cached"
        return Forwards(policy=times, inversion=0.0, reference=times if asks else 0.0)

    def prepare(
        self,
        cache: PairCache,
        folder: Path | None = None,
        builder: bool = True,
        *,
        held_out: FixedDraws[PairCache] | None = None,
        progress: Progress = silent,
    ) -> None:
        """Take the data, and compute the reference's errors that will be looked up. Before any weight is trained.

        Args:
            folder: where these errors are kept and found again. builder: whether this process computes them.
            held_out: what `deltas` will be asked for. Under full fine-tuning without a second network there is no
                reference later on, so these errors are computed now.

        Raises:
            DiffalignError: the data lacks what the options ask for.
        """
        self._cache = cache
        if self.config.captions == "dual":
            require_dual_captions(cache)

        def build(fixed: FixedDraws[Any], measured: Measured, *options: object) -> ReferenceErrors:
            noising = (self.config.stratified_times, self.config.time_weighting, *options)
            return ReferenceErrors.build(
                self.backbone,
                fixed,
                measured,
                noising=noising,
                folder=folder,
                builder=builder,
                progress=progress,
            )

        if getattr(self.config, "reference", None) == "cached":
            fixed = FixedDraws(cache, derive_seed(self.seed, "reference draws"), self.config.reference_draws)
            shared = ("shared captions",) if self.config.captions == "shared" else ()
            self._stored = build(fixed, self._reference_errors, self.config.caption_dropout, *shared)
        full = self.backbone.config.tune == "full"
        if held_out is not None and full and not self.needs_frozen_copy(self.config, "full"):
            self._stored_held_out = build(
                held_out, lambda draw: self._pair_reference(held_out.cache.fetch(draw))
            )

    def fetch(self, draw: Draw) -> PairBatch:
        """The batch of a draw: with cached reference errors one of the stored draws, and captions dropped by chance.

        Raises:
            RuntimeError: `prepare` was not called.
        """
        return self._batch(self._stored.remap(draw) if self._stored else draw)

    def loss(self, batch: PairBatch) -> Losses:
        """Per-pair losses `[B]` and metrics `[B]`."""
        raise NotImplementedError

    @torch.no_grad()
    def deltas(self, batch: PairBatch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Policy minus reference errors `[B]` of chosen and rejected for a draw, for evaluation.

        Also for methods that train without a reference: so the held-out numbers mean the same for all.
        """
        stored = self._stored_held_out.lookup(draw) if self._stored_held_out else None
        noised = self._noised(replace(batch, draw=draw))
        errors = pair_errors(self.backbone, noised, None if stored is None else chosen_first(stored))
        return errors.chosen_delta, errors.rejected_delta

    def margin(self, chosen_delta: Tensor, rejected_delta: Tensor) -> Tensor:
        """The logit of this trainer's beta."""
        return dpo_margin(chosen_delta, rejected_delta, self.beta)

    def _batch(self, draw: Draw) -> PairBatch:
        """The training pairs of exactly this draw."""
        if self._cache is None:
            raise RuntimeError(f"{type(self).__name__}.fetch needs data; call prepare(cache) first")
        batch = self._cache.fetch(draw)
        if self.config.captions == "shared":
            batch = share_captions(batch)
        if not self.config.caption_dropout:
            return batch
        return drop_captions(
            batch, draw.uniform("caption dropout") < self.config.caption_dropout, self._cache
        )

    def _reference_errors(self, draw: Draw) -> Tensor:
        """The reference's errors `[B, S]` of the training records of exactly this draw."""
        return self._pair_reference(self._batch(draw))

    def _pair_reference(self, batch: PairBatch) -> Tensor:
        """The reference's errors `[B, 2]` of chosen and rejected."""
        return reference_errors(self.backbone, self._noised(batch)).reshape(2, -1).T

    def _noised(self, batch: PairBatch, times: int = 1) -> NoisedPairs:
        """Noise a batch with the noise and times of its draw, shared inside each pair; `times` draws of each."""
        draw, shape = batch.draw, tuple(batch.chosen.shape[1:])
        # The first draw has no number, so that one draw a pair is the same with any `times`.
        keys: list[tuple[int, ...]] = [(), *((k,) for k in range(1, times))]
        stratified = self.config.stratified_times
        uniform = torch.cat([draw.uniform("time", *key, stratified=stratified) for key in keys])
        noise = torch.cat([draw.normal(shape, "noise", *key) for key in keys])
        t = self.backbone.process.times(uniform, self.config.time_weighting)
        return noise_pairs(self.backbone, repeated(batch, times), t, noise)


def elements_of(backbone: Backbone) -> int:
    """Number of latent elements: what a beta for sums is multiplied by to fit means."""
    elements = 1
    for size in backbone.latent_shape:
        elements *= size
    return elements


def pair_metrics(margin: Tensor, errors: dict[str, Tensor], **more: Tensor) -> dict[str, Tensor]:
    """What every method logs `[B]`, without gradients: margin, implicit accuracy and the named errors."""
    metrics = {"margin": margin, "implicit_accuracy": (margin > 0).float(), **errors, **more}
    return {name: value.detach() for name, value in metrics.items()}


def chosen_first(errors: Tensor) -> Tensor:
    """Errors `[B, 2]` of chosen and rejected as `[2B]`, all chosen rows first."""
    return errors.T.reshape(-1)


def averaged(values: Tensor, draws: int) -> Tensor:
    """Means `[B]` over the draws of each pair of `[draws * B]` rows as `PairTrainer._noised` orders them."""
    return values.reshape(draws, -1).mean(0)


def repeated(batch: PairBatch, times: int) -> PairBatch:
    """The pairs `times` times one after the other (for noising; labels stay as they are)."""
    if times == 1:
        return batch
    return replace(
        batch,
        chosen=torch.cat([batch.chosen] * times),
        rejected=torch.cat([batch.rejected] * times),
        conditioning_chosen=Conditioning.concat([batch.conditioning_chosen] * times),
        conditioning_rejected=Conditioning.concat([batch.conditioning_rejected] * times),
    )


def share_captions(batch: PairBatch) -> PairBatch:
    """Give the rejected picture the chosen one's caption; its sizes stay its own."""
    chosen, rejected = batch.conditioning_chosen, batch.conditioning_rejected
    return replace(batch, conditioning_rejected=replace(chosen, time_ids=rejected.time_ids))


def drop_captions(batch: PairBatch, dropped: Tensor, cache: PairCache) -> PairBatch:
    """Replace the captions of the rows `dropped` `[B]` by the unconditional embedding; micro-conditioning stays."""
    empty = cache.unconditional(len(dropped))
    return replace(
        batch,
        conditioning_chosen=without_captions(batch.conditioning_chosen, dropped, empty),
        conditioning_rejected=without_captions(batch.conditioning_rejected, dropped, empty),
    )


def without_captions(conditioning: Conditioning, dropped: Tensor, empty: Conditioning) -> Conditioning:
    """Rows `dropped` `[N]` of a conditioning replaced by those of no prompt, `empty`; what that lacks stays."""
    swapped = {
        name: torch.where(dropped.reshape(-1, *([1] * (value.dim() - 1))), getattr(empty, name), value)
        for name, value in conditioning.tensors().items()
        if getattr(empty, name) is not None
    }
    return replace(conditioning, **swapped)


def require_dual_captions(cache: PairCache) -> None:
    """Look for a pair with two different captions.

    Raises:
        DiffalignError: none of the first pairs has them.
    """
    for record in range(min(len(cache), CAPTION_SEARCH)):
        batch = cache.fetch(Draw(0, 0, [record], [0], 1))
        if not torch.equal(batch.conditioning_chosen.embeddings, batch.conditioning_rejected.embeddings):
            return
    raise DiffalignError(
        f"trainer.captions is dual, but in the first {min(len(cache), CAPTION_SEARCH)} pairs both pictures have the "
        "same caption. Give the second picture its own caption in the data, or set trainer.captions=own."
    )
