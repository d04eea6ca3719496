"""HyperNoise: adapters that change the initial noise of a few-step generator, instead of optimising each noise.

Eyring et al. 2025, arXiv 2508.09968. The generator g stays as it is; its own network with adapters predicts a change f
of the noise x, and for fresh noises at every step

    L = regularisation mean(f^2) - weight r(g(x + f(x, c)), c)

falls. The first term is, up to its factor, the divergence |f|^2 / 2 of the changed noise from the standard normal one
(theorem 1 of the paper for small changes), so that pictures stay those of the generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.inference.generation import Checkpointing, Generation
from diffalign.randomness import Draw
from diffalign.rewards.guard import ask
from diffalign.sampling.initial import adapted
from diffalign.strict import StrictModel


class HypernoiseConfig(StrictModel):
    """Options of HyperNoise."""

    method: Literal["hypernoise"] = "hypernoise"
    """Adapters that change the initial noise; needs `model.lora.changes: noise`."""
    reward: Any = "pickscore"
    """What is to rise, with gradients: a name, `name@PATH`, `module:Name`, a file, or a mapping with key `reward`."""
    prompts: str | None = None
    """Prompts to draw noises for, as `evaluation.prompts` takes them. null: the captions of `data.source`."""
    steps: int = Field(default=1, ge=1)
    """Denoising steps of a picture, all of which are differentiated through."""
    guidance: float = Field(default=0.0, ge=0)
    """As the model's pipeline means it; Turbo and schnell models want 0, LCM what it was distilled with."""
    weight: float = Field(default=1.0, gt=0)
    """Of the reward, whose scale it makes up for."""
    regularisation: float = Field(default=0.5, ge=0)
    """Of the mean square of the change; 0 lets the noise go wherever the reward leads. The release's value, for rewards
    that sum up to a few units."""
    checkpointing: Checkpointing = "none"
    """`steps` computes network calls and decoding again in the backward pass: a third slower, for memory that does not
    grow with the steps."""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts `[B]`, and the draw that their noises come from."""

    prompts: tuple[str, ...]
    draw: Draw

    def to(self, device: torch.device) -> PromptBatch:
        """The same: there is nothing to move."""
        return self


class HypernoiseTrainer:
    """Differentiates a reward through the generator into the adapters."""

    Config = HypernoiseConfig
    data_kinds: ClassVar[tuple[str, ...]] = ("noises",)
    needs: ClassVar[dict[str, tuple[str, ...]]] = {}
    tunes: ClassVar[tuple[str, ...]] = ("lora",)

    def __init__(self, config: HypernoiseConfig, backbone: Backbone, seed: int = 0) -> None:
        self.config, self.backbone, self.seed = config, backbone, seed
        # What is to rise, and for which prompts; the engine puts them here.
        self.reward: Any = None
        self.prompts: Sequence[str] = ()

    @classmethod
    def needs_frozen_copy(cls, config: HypernoiseConfig, tune: str) -> bool:
        """Whether a second network has to be loaded: never, since the generator is the one without adapters."""
        return False

    def fetch(self, draw: Draw) -> PromptBatch:
        """The prompts of a draw."""
        return PromptBatch(tuple(self.prompts[record] for record in draw.records), draw)

    def loss(self, batch: PromptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses and metrics, each `[B]`; noises belong to (seed, step, prompt)."""
        options = self.config
        generation = Generation(
            self.backbone,
            batch.prompts,
            steps=options.steps,
            guidance=options.guidance,
            checkpointing=options.checkpointing,
        )
        noises = batch.draw.normal(generation.noise_shape, "noise").to(self.backbone.device)
        first = adapted(self.backbone, noises[:, 0], generation.told, options.steps)
        change = (first - noises[:, 0]).flatten(1).square().mean(1)
        media = generation(torch.cat([first[:, None], noises[:, 1:]], 1))
        rewards = ask(self.reward, media, batch.prompts).mean.to(change)
        losses = options.regularisation * change - options.weight * rewards
        return losses, {"reward": rewards.detach(), "change": change.detach()}
