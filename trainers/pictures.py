"""What the trainers on single pictures and on ranked groups share. Held-out pairs are measured as for any method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.conditioning import Conditioning
from diffalign.data.batch import GroupBatch, UnpairedBatch
from diffalign.data.cache import PairCache
from diffalign.data.picture_labels import Pictures
from diffalign.elbo import NoisedPairs
from diffalign.objectives.pairwise import squared_error
from diffalign.randomness import Draw
from diffalign.strict import StrictModel
from diffalign.trainers.pairs import Forwards, PairTrainer, averaged, without_captions


class PictureOptions(StrictModel):
    """Options of every method on single pictures or groups."""

    captions: ClassVar[str] = "own"
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of pictures (groups: all of a group together) trained without their caption."""
    stratified_times: bool = True
    """Spread the times of a batch evenly over the schedule: lower gradient variance at no cost."""
    time_weighting: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of training times; logit_normal is for flow models."""
    times_per_picture: int = Field(default=1, ge=1)
    """Draws of (time, noise) a picture and step, averaged: less noise for as many times the compute and memory."""


class PictureTrainer(PairTrainer):
    """Data side of a method on cached pictures, groups, or pairs taken apart; a method adds `loss` and `beta`."""

    data_kinds: ClassVar[tuple[str, ...]] = ("pictures",)

    @classmethod
    def forwards(cls, config: Any) -> Forwards:
        """What a step costs with these options."""
        times = float(draws_of(config))
        asks = getattr(config, "reference", "cached") != "cached"
        return Forwards(policy=times, inversion=0.0, reference=times if asks else 0.0)

    @classmethod
    def choose(cls, config: Any, pictures: Pictures) -> Pictures:
        """The pictures that this method learns from.

        Raises:
            DiffalignError: there is none.
        """
        return pictures

    def _batch(self, draw: Draw) -> Any:
        """The training pairs, pictures or groups of exactly this draw, captions dropped by chance."""
        if self._cache is None or isinstance(self._cache, PairCache):
            return super()._batch(draw)
        batch: UnpairedBatch | GroupBatch = self._cache.fetch(draw)
        if not self.config.caption_dropout:
            return batch
        dropped = draw.uniform("caption dropout") < self.config.caption_dropout
        rows = dropped.repeat_interleave(len(batch.conditioning) // len(batch))
        empty = self._cache.unconditional(len(rows))
        return replace(batch, conditioning=without_captions(batch.conditioning, rows, empty))

    def _noised_singly(self, judged: UnpairedBatch) -> NoisedPairs:
        """Every picture with noise and time of its own, as many draws of each as the options say."""
        draw, draws = judged.draw, draws_of(self.config)
        sides = len(judged.latents) // len(draw)
        keys = [(k, side) for k in range(draws) for side in range(sides)]
        uniform = [draw.uniform("own time", *key, stratified=self.config.stratified_times) for key in keys]
        noise = [draw.normal(tuple(judged.latents.shape[1:]), "own noise", *key) for key in keys]
        x0 = torch.cat([judged.latents] * draws)
        told = Conditioning.concat([judged.conditioning] * draws)
        return self._noised_at(x0, torch.cat(uniform), torch.cat(noise), told)

    def _errors_singly(self, batch: UnpairedBatch) -> Tensor:
        """The policy's errors `[N]` of single pictures with gradients; no reference is asked."""
        noised = self._noised_singly(batch)
        pred = self.backbone.predict(noised.x_t, noised.t, noised.conditioning)
        return averaged(squared_error(pred, noised.target), draws_of(self.config))

    def _noised_together(self, batch: GroupBatch) -> NoisedPairs:
        """All pictures of a group with the same noise and time; rows by draw, group and picture."""
        draw, draws, size = batch.draw, draws_of(self.config), batch.latents.shape[1]
        # The first draw has no number: a group of two is noised as a pair is.
        keys: list[tuple[int, ...]] = [(), *((k,) for k in range(1, draws))]
        uniform = [draw.uniform("time", *key, stratified=self.config.stratified_times) for key in keys]
        noise = [draw.normal(tuple(batch.latents.shape[2:]), "noise", *key) for key in keys]
        return self._noised_at(
            torch.cat([batch.latents.flatten(0, 1)] * draws),
            torch.cat(uniform).repeat_interleave(size),
            torch.cat(noise).repeat_interleave(size, 0),
            Conditioning.concat([batch.conditioning] * draws),
        )

    def _noised_at(self, x0: Tensor, uniform: Tensor, noise: Tensor, told: Conditioning) -> NoisedPairs:
        """Rows `[N]` noised at the times of uniform numbers, on the backbone's device."""
        process, device = self.backbone.process, self.backbone.device
        t = process.times(uniform, self.config.time_weighting).to(device)
        x0, noise = x0.to(device, torch.float32), noise.to(device)
        return NoisedPairs(process.noise(x0, noise, t), t, process.target(x0, noise, t), told.to(device))


def draws_of(config: Any) -> int:
    """Draws of (time, noise) per picture and step; methods that also take pairs name the option for them."""
    name = "times_per_picture" if hasattr(config, "times_per_picture") else "times_per_pair"
    return int(getattr(config, name))
