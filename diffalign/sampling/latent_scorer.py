"""Scores of noisy latents by a head on the hidden states of a frozen generator.

LPO's latent reward model (Zhang et al. 2025, arXiv 2502.01051) and Flow-NRG's time-dependent reward (Liu et al. 2025,
arXiv 2501.13918, section 4.3) read the noisy latents with the generator's own network, which has seen noise of all
levels, up to a layer. Here the network stays frozen: only the head on the states' mean is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from diffalign.backbones.base import Backbone
from diffalign.backbones.early import early_states
from diffalign.conditioning import Conditioning
from diffalign.process import Process
from diffalign.randomness import generator
from diffalign.sampling.transition import levels

OCTAVES = 4
"""Sines and cosines of the noise level: from half a period over the whole range to four."""


@dataclass(frozen=True)
class HeadSpec:
    """A head.

    Fields:
        states: D, size of the hidden states. caption: P, size of the caption's vector. hidden: units.
        dropout: on states, caption and units. seed: of the initial weights.
    """

    states: int
    caption: int
    hidden: int = 64
    dropout: float = 0.1
    seed: int = 0


class LatentHead(nn.Module):
    """Two layers on states and caption, the second scaled and shifted by the noise level; 0 before training."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.states = nn.Linear(spec.states, spec.hidden)
        self.caption = nn.Linear(spec.caption, spec.hidden)
        self.level = nn.Linear(2 * OCTAVES, 2 * spec.hidden)
        self.joined = nn.Linear(spec.hidden, spec.hidden)
        self.out = nn.Linear(spec.hidden, 1, bias=False)
        self.dropout = nn.Dropout(spec.dropout)
        _initialise(self, spec.seed)

    def forward(self, states: Tensor, caption: Tensor, level: Tensor) -> Tensor:
        """Scores `[B]`, in log-odds.

        Args:
            states: `[B, D]`. caption: `[B, P]`. level: `[B]` in [0, 1], see `noise_level`.
        """
        both = self.states(self._seen(states)) + self.caption(self._seen(caption))
        scale, shift = self.level(waves(level)).chunk(2, -1)
        inner = self.joined(nn.functional.silu(both)) * (1 + scale) + shift
        scores: Tensor = self.out(self.dropout(nn.functional.silu(inner)))[:, 0]
        return scores

    def _seen(self, values: Tensor) -> Tensor:
        dropped: Tensor = self.dropout(layer_norm(values, values.shape[-1:]))
        return dropped


class LatentScorer:
    """A frozen generator and a head on its hidden states.

    Fields:
        generator: read inside `reference()`, whatever it is tuned to. layer: where its network is read.
        guidance: what the caption does to the states is multiplied by this (LPO, "visual feature enhancement"); 1: one
            forward instead of two.
        core: the bare head. network: the same as the engine wraps it. dtype: of the head.
    """

    dtype = torch.float32

    def __init__(self, generator: Backbone, head: LatentHead, layer: str, guidance: float = 1.0) -> None:
        self.generator, self.layer, self.guidance = generator, layer, guidance
        self.core = head
        self.network: nn.Module = head

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Scores `[B]` of latents `[B, C, h, w]` at times `[B]`, with gradients in latents and head where enabled."""
        cond, level = cond.to(x_t.device), noise_level(self.generator.process, t).to(x_t.device)
        scores: Tensor = self.network(self.states(x_t, t.clamp(min=0), cond), caption_vector(cond), level)
        return scores

    def states(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Mean hidden states `[B, D]`; with guidance g `without + g (with - without)` the caption."""

        def mean(x: Tensor, times: Tensor, told: Conditioning) -> Tensor:
            return early_states(self.generator, x, times, told, self.layer).mean(1)

        if self.guidance == 1:
            return mean(x_t, t, cond)
        blank = self.generator.unconditional(len(x_t)).to(x_t.device)
        both = Conditioning.concat([Conditioning(**{**cond.tensors(), **blank.tensors()}), cond])
        without, told = mean(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return without + self.guidance * (told - without)

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of the head."""
        return list(self.core.named_parameters())

    def trainable_state(self) -> dict[str, Tensor]:
        """The head's weights by name, sharing memory with it."""
        return {name: p.detach() for name, p in self.trainable_parameters()}


def caption_vector(cond: Conditioning) -> Tensor:
    """What a caption says, in one vector `[B, P]`: the pooled embedding, or the mean of the text states."""
    if cond.pooled is not None:
        return cond.pooled.float()
    if cond.mask is None:
        return cond.embeddings.float().mean(1)
    weight = cond.mask.float()[..., None]
    return (cond.embeddings.float() * weight).sum(1) / weight.sum(1).clamp(min=1)


def noise_level(process: Process, t: Tensor) -> Tensor:
    """Share of noise `[B]`: the angle between signal and noise from 0 (clean) to 1 (noise), alike for all processes."""
    alpha, sigma = levels(process, t)
    return (torch.atan2(sigma, alpha) * (2 / math.pi)).float()


def waves(level: Tensor) -> Tensor:
    """Sines and cosines `[B, 8]` of levels `[B]` in [0, 1]."""
    angles = level[:, None] * math.pi * 2.0 ** torch.arange(OCTAVES, device=level.device)
    return torch.cat([angles.sin(), angles.cos()], -1)


def _initialise(head: LatentHead, seed: int) -> None:
    """Normal weights of the seed with variance 1 / inputs; the score and what the noise level does start at 0."""
    draws = generator(seed, "latent head")
    with torch.no_grad():
        for name, weight in head.named_parameters():
            still = name.startswith(("out", "level")) or weight.dim() == 1
            drawn = torch.randn(weight.shape, generator=draws) / math.sqrt(weight.shape[-1])
            weight.copy_(0 * drawn if still else drawn)
