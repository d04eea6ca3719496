"""Latent consistency models of the SD 1.5 type (Luo et al. 2023, arXiv 2310.04378), such as LCM Dreamshaper v7.

Those of the SDXL type are SDXL pipelines. Of both, the UNet is told its guidance scale (`guidance.py`), training times
are those it was distilled at (`Process.grid`), and the pipeline visits some of these.
"""

from __future__ import annotations

from typing import Any

from diffusers import LatentConsistencyModelPipeline

from diffalign.backbones.base import Backbone
from diffalign.backbones.sd import PIPELINE_OPTIONS
from diffalign.conditioning import Conditioning


class LatentConsistency(Backbone):
    """The unconditional branch, used to drop captions, is the encoded empty prompt."""

    family = "lcm"
    pipeline_class = LatentConsistencyModelPipeline
    pipeline_options = PIPELINE_OPTIONS

    def _encode_text(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeddings, _ = pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return Conditioning(embeddings)

    def _encode_unconditional(self, pipeline: Any) -> Conditioning:
        return self._encode_text(pipeline, [""])
