"""UNets that are told their guidance scale (latent consistency models; Luo et al. 2023, arXiv 2310.04378).

Such a UNet was distilled from guided predictions. It has `time_cond_proj_dim`, the width of an embedding of the scale
that joins the time's, and it needs no unconditional forward.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.conditioning import Conditioning

USUAL_SCALE = 8.0
"""What such a UNet is told in training where nothing else is said: what the published ones are sampled with, in the
middle of the paper's scales (3 to 15 as the pipelines count). Not 1: they were never shown a scale without guidance."""


def is_told_guidance(network: nn.Module) -> bool:
    """Whether a network is a UNet that takes an embedding of the guidance scale."""
    config: Any = network.config
    return getattr(config, "time_cond_proj_dim", None) is not None


def tell_guidance(cond: Conditioning, scale: float | Tensor) -> Conditioning:
    """The conditioning with a guidance scale for its rows, a number or `[B]`."""
    scales = torch.as_tensor(scale, dtype=torch.float32, device=cond.embeddings.device)
    return replace(cond, guidance=scales.expand(len(cond)))


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """Embedding `[B, width]` of guidance scales `[B]`: sines, then cosines, of 1000 (scale - 1) at falling frequencies.

    The pipelines subtract 1 because the network was distilled with the scale counted from 0, which is no guidance.
    """
    half = width // 2
    falling = torch.arange(half, device=scale.device) * -(math.log(10_000.0) / (half - 1))
    angles = 1000.0 * (scale.float() - 1)[:, None] * falling.exp()
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


def guidance_inputs(network: nn.Module, cond: Conditioning, unsaid: float | None) -> dict[str, Tensor]:
    """What a UNet is given for its guidance: nothing, or the embedding of the conditioning's scale.

    Args:
        unsaid: the scale of a conditioning that has none; None: `USUAL_SCALE`.
    """
    if not is_told_guidance(network):
        return {}
    config: Any = network.config
    scale = cond.guidance
    if scale is None:
        scale = torch.full((len(cond),), unsaid or USUAL_SCALE, device=cond.embeddings.device)
    return {"timestep_cond": guidance_embedding(scale, config.time_cond_proj_dim)}
