"""Adapters around diffusers pipelines: one file per model family behind one interface."""

from __future__ import annotations

from typing import Literal

import torch

from diffalign.backbones.base import Backbone
from diffalign.backbones.loading import model_fingerprint, open_source, resolve_model
from diffalign.backbones.sd import StableDiffusion
from diffalign.backbones.sdxl import StableDiffusionXL
from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError

FAMILIES: dict[str, type[Backbone]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
}
"""Adapter of each pipeline class that a model_index.json may name."""

__all__ = [
    "FAMILIES",
    "Backbone",
    "StableDiffusion",
    "StableDiffusionXL",
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
    source = open_source(config)
    family = model_family(source.pipeline_name, config.path)
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
