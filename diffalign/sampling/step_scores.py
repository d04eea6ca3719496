"""Scores of noisy latents inside a rollout: by a scorer that knows the step, or through the predicted picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.sampling.rollout import StepScore, Told, chunks, predict
from diffalign.sampling.transition import levels

Judge = Callable[[Tensor, Sequence[str]], Tensor]
"""Scores `[B]` of pictures `[B, 3, H, W]` in [0, 1] for prompts."""


@runtime_checkable
class StepReward(Protocol):
    """A scorer of noisy latents, such as SPO's step-aware preference model or LPO's latent reward model."""

    def score_step(self, latents: Tensor, times: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores `[B]` of latents `[B, C, h, w]` at times `[B]` of the process."""
        ...


@runtime_checkable
class ReadsGenerator(Protocol):
    """A scorer that reads latents with a generator's own network."""

    def attach(self, backbone: Backbone) -> None:
        """Read with this one from here on; DiffalignError if it cannot."""
        ...


def attach(reward: object, backbone: Backbone) -> None:
    """Let a scorer that reads latents with a generator's network use this one instead of a copy.

    Raises:
        DiffalignError: it is not the generator that the scorer was trained on.
    """
    if isinstance(reward, ReadsGenerator):
        reward.attach(backbone)


def step_aware(reward: StepReward, prompts: Sequence[str]) -> StepScore:
    """A step-aware reward for the prompts of a rollout."""

    def score(latents: Tensor, times: Tensor, rows: Sequence[int]) -> Tensor:
        return reward.score_step(latents, times, [prompts[row] for row in rows])

    return score


def predicted_picture(
    backbone: Backbone, told: Told, prompts: Sequence[str], judge: Judge, batch_size: int
) -> StepScore:
    """The judge's score of the picture that the network sees in a noisy latent: one forward and one decoding each."""

    def score(latents: Tensor, times: Tensor, rows: Sequence[int]) -> Tensor:
        parts = []
        for part in chunks(len(rows), batch_size):
            x, t = latents[part.start : part.stop], times[part.start : part.stop]
            own = [rows[i] for i in part]
            pictures = backbone.decode(predicted_clean(backbone, x, t, told.select(own)))
            parts.append(judge(pictures, [prompts[row] for row in own]).float().cpu())
        return torch.cat(parts)

    return score


def predicted_clean(backbone: Backbone, x: Tensor, t: Tensor, told: Told) -> Tensor:
    """The clean latents that the network sees in `x` `[B, C, h, w]` at times `[B]`; `x` itself where it is clean."""
    noisy = levels(backbone.process, t)[1] > 0
    if not bool(noisy.any()):
        return x
    t = t.clamp(min=0)
    with backbone.inference():
        seen = backbone.process.to_x0(predict(backbone, x, t, told.to(backbone.device)), x, t)
    return torch.where(noisy.reshape(-1, 1, 1, 1), seen, x)
