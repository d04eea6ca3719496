"""Stable Diffusion XL (Podell et al. 2023): two text encoders, pooled embedding, sizes as conditioning.

SDXL-Turbo (Sauer et al. 2023, arXiv 2311.17042) and SDXL latent consistency models are this pipeline with another
network and scheduler.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.conditioning import Conditioning


class StableDiffusionXL(Backbone):
    """The unconditional branch is zeros where the pipeline says so (`force_zeros_for_empty_prompt`)."""

    family = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    pipeline_options = {"add_watermarker": False}  # noqa: RUF012

    def with_sizes(self, cond: Conditioning, original: Tensor, crop: Tensor, target: Tensor) -> Conditioning:
        """Add time ids `[B, 6]`, height first, in float32: bf16 would round 1025 to 1024."""
        ids = torch.cat([original, crop, target], 1).to(cond.embeddings.device, torch.float32)
        return replace(cond, time_ids=ids)

    def _encode_text(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return Conditioning(embeddings, pooled)

    def _encode_unconditional(self, pipeline: Any) -> Conditioning:
        _, embeddings, _, pooled = pipeline.encode_prompt(
            "", device=self.device, do_classifier_free_guidance=True
        )
        return Conditioning(embeddings, pooled)

    def _network_inputs(self, cond: Conditioning) -> dict[str, Any]:
        if cond.time_ids is None:
            raise ValueError("SDXL conditioning has no time ids; call with_sizes first")
        added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        return {**super()._network_inputs(cond), "added_cond_kwargs": added}
