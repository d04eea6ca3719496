"""Inputs of a network as shapes without data, for a plan that is made before anything is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PICTURES = 2
"""A plan is about one pair."""
CLIP_TOKENS = 77


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor `[2, *shape]` on the meta device."""
    return torch.empty(PICTURES, *shape, device="meta", dtype=dtype)


def unet_inputs(config: Any, side: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a UNet is given for one pair.

    Args:
        config: of the network. side: latents along one side of a picture.
    """
    inputs: dict[str, Any] = {
        "sample": empty(config.in_channels, side, side, dtype=dtype),
        "timestep": empty(),
        "encoder_hidden_states": empty(CLIP_TOKENS, config.cross_attention_dim, dtype=dtype),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": empty(pooled, dtype=dtype),
            "time_ids": empty(6, dtype=dtype),
        }
    return inputs
