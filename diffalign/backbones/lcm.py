"""Latent consistency models of the SD 1.5 type (Luo et al. 2023, arXiv 2310.04378), such as LCM Dreamshaper v7.

Those of the SDXL type are SDXL pipelines. Of both, the UNet is told its guidance scale (`guidance.py`), training times
are those it was distilled at (`Process.grid`), and the pipeline visits some of these.
"""

from __future__ import annotations

from diffusers import LatentConsistencyModelPipeline

from diffalign.backbones.sd import StableDiffusion


class LatentConsistency(StableDiffusion):
    """The unconditional branch, used to drop captions, is the encoded empty prompt."""

    family = "lcm"
    pipeline_class = LatentConsistencyModelPipeline
