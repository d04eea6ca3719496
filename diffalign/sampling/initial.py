"""The noise that a picture starts from: as a pipeline draws it from a seed, and as noise adapters change it."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.backbones.flux import pack
from diffalign.backbones.guidance import is_told_guidance, tell_guidance
from diffalign.backbones.noise_adapters import changes_noise, noise_change
from diffalign.sampling.rollout import Told
from diffalign.sampling.schedules import schedule_of


def noise_dtype(backbone: Backbone) -> torch.dtype:
    """Number format that a model's pipeline draws noise in: that of its text encoders; Z-Image's is always float32."""
    half = backbone.pipeline().vae.dtype in (torch.bfloat16, torch.float16) and backbone.family != "z_image"
    return backbone.pipeline().vae.dtype if half else torch.float32


def pipeline_latents(noise: Tensor, family: str) -> Tensor:
    """Initial noises `[P, C, h, w]` as `latents=` of the model's pipeline: FLUX's takes packed ones."""
    return pack(noise) if family == "flux" else noise.clone()


def adapted(backbone: Backbone, noise: Tensor, told: Told, steps: int) -> Tensor:
    """Initial noise `[B, C, h, w]` and what noise adapters add to it; the same noise without such adapters.

    Args:
        told: what the network is told of the B pictures; its conditional branch is asked. steps: of the sampler, whose
            first time it is asked at.
    """
    if not changes_noise(backbone):
        return noise
    noise, cond = noise.to(backbone.device), told.conditioning.to(backbone.device)
    if is_told_guidance(backbone.core):
        cond = tell_guidance(cond, told.guidance)
    t = schedule_of(backbone, steps).times[:1].to(backbone.device).expand(len(noise))
    return noise + noise_change(backbone, noise, t, cond)
