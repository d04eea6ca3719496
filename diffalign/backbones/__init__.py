"""Adapters around diffusers pipelines: one file per model family behind one interface."""

from __future__ import annotations

from typing import Literal

import torch

from diffalign.backbones.base import Backbone
from diffalign.backbones.flux import Flux
from diffalign.backbones.lcm import LatentConsistency
from diffalign.backbones.loading import model_fingerprint, open_source, resolve_model
from diffalign.backbones.quantized import check_quantized
from diffalign.backbones.sd import StableDiffusion
from diffalign.backbones.sd3 import StableDiffusion3
from diffalign.backbones.sdxl import StableDiffusionXL
from diffalign.backbones.z_image import ZImage
from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError

FAMILIES: dict[str, type[Backbone]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "LatentConsistencyModelPipeline": LatentConsistency,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "ZImagePipeline": ZImage,
}
"""Adapter of each pipeline class that a model_index.json may name."""

__all__ = [
    "FAMILIES",
    "Backbone",
    "Flux",
    "LatentConsistency",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "ZImage",
    "model_family",
    "model_fingerprint",
    "open_backbone",
    "resolve_model",
]


def open_backbone(
    config: ModelConfig,
    *,
    device: torch.device | str,
    parts: Literal["network", "all"] = "network",
    resolution: int | None = None,
    frozen_copy: bool = False,
    seed: int = 0,
) -> Backbone:
    """Open a model for tuning; its network is in training mode, its adapters are new.

    Args:
        parts: `network` loads VAE and text encoders only when first needed, `all` now.
        resolution: pixels per side; None is the model's own.
        frozen_copy: keep a second, frozen network as the reference (needed for full fine-tuning).
        seed: of the initial adapters.

    Raises:
        DiffalignError: the model cannot be found, loaded or run as asked.
    """
    check_quantized(config, torch.device(device), frozen_copy)
    source = open_source(config)
    family = model_family(source.pipeline_name, config.path)
    if not (config.text_encoder_3 or family.left_out):
        raise DiffalignError(
            f"model.text_encoder_3 is false, but a {source.pipeline_name} has no such part; set it to true."
        )
    backbone = family(source, config, torch.device(device), resolution, frozen_copy, seed)
    if parts == "all":
        backbone.pipeline()
    return backbone


def model_family(pipeline_name: str, path: str) -> type[Backbone]:
    """The adapter for a pipeline class.

    Raises:
        DiffalignError: no adapter for it; lists those there are.
    """
    if pipeline_name not in FAMILIES:
        raise DiffalignError(
            f"model {path!r} is a {pipeline_name}; supported are: {', '.join(FAMILIES)}. "
            "Check the model path, or _class_name in its model_index.json."
        )
    return FAMILIES[pipeline_name]
