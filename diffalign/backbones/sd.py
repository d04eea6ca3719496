"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022): one text encoder, eps or v prediction.

SD-Turbo (Sauer et al. 2023, arXiv 2311.17042) is this pipeline with another network and scheduler.
"""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionPipeline

from diffalign.backbones.base import Backbone
from diffalign.conditioning import Conditioning


class StableDiffusion(Backbone):
    """The unconditional branch is the encoded empty prompt; there is no size conditioning."""

    family = "sd"
    pipeline_class = StableDiffusionPipeline
    # Without the safety checker, which blackens pictures.
    pipeline_options = {  # noqa: RUF012
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }

    def _encode_text(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeddings, _ = pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return Conditioning(embeddings)

    def _encode_unconditional(self, pipeline: Any) -> Conditioning:
        return self._encode_text(pipeline, [""])
