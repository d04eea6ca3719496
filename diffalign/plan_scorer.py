"""Size of a reward-model run: the head, and with `model.tune: full` the CLIP, traced on the meta device."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffalign.config import RunConfig, trainer_class, trainer_config
from diffalign.plan_network import NetworkSize, counting
from diffalign.rewards.heads import build_head
from diffalign.rewards.preference_head import clip_source

CONTEXT = 77


def scorer_size(config: RunConfig) -> NetworkSize | None:
    """Weights, activations and compute of a pair (two pictures, two captions); None for a CLIP of the hub.

    Raises:
        DiffalignError: the CLIP does not exist.
    """
    clip = _empty_clip(clip_source(config.model.path))
    if clip is None:
        return None
    with counting(clip) as kept, FlopCounterMode(display=False) as counter:
        width = _run(clip)
    # The number of users is known only when the data are read; their weights are few.
    head = build_head(trainer_class(config).spec(trainer_config(config), width, math.e, (), config.seed))
    trained = sum(p.numel() for p in head.parameters())
    with counting(head) as own, FlopCounterMode(display=False) as head_counter:
        head(torch.zeros(2, width), torch.zeros(2, width))
    if config.model.tune == "head":
        return NetworkSize(trained, trained, own.total(), head_counter.get_total_flops())
    trained += sum(p.numel() for p in clip.parameters())
    activations = own.total() + kept.total()
    flops = head_counter.get_total_flops() + counter.get_total_flops() + kept.attention_flops
    return NetworkSize(trained, trained, activations, flops)


def _empty_clip(source: str) -> Any:
    """The network with parameters of shapes without data; None when its configuration is not on this machine."""
    import open_clip

    folder = Path(source.removeprefix("local-dir:"))
    name = source.partition("@")[0]
    if (folder / "open_clip_config.json").is_file():
        return _open_clip(f"local-dir:{folder}")
    if name in open_clip.list_models():
        return _open_clip(name)
    if (folder / "config.json").is_file():
        from transformers import CLIPConfig, CLIPModel

        with torch.device("meta"):
            return CLIPModel(CLIPConfig.from_pretrained(folder))
    return None


def _open_clip(name: str) -> Any:
    import open_clip

    # It warns that the weights are random, which is meant here.
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            return open_clip.create_model(name, load_weights=False, pretrained_text=False, device="meta")
    finally:
        logging.disable(logging.NOTSET)


def _run(clip: nn.Module) -> int:
    """Embed two pictures and two captions; returns the size of the embeddings."""
    network: Any = clip
    if hasattr(network, "encode_image"):
        side = network.visual.image_size
        pixels = _pixels(side[0] if isinstance(side, tuple) else side)
        length = getattr(network, "context_length", CONTEXT)
        network.encode_image(pixels)
        return int(network.encode_text(_tokens(length)).shape[-1])
    network.get_image_features(pixel_values=_pixels(network.config.vision_config.image_size))
    network.get_text_features(input_ids=_tokens(network.config.text_config.max_position_embeddings))
    return int(network.config.projection_dim)


def _pixels(side: int) -> Tensor:
    return torch.empty(2, 3, side, side, device="meta")


def _tokens(length: int) -> Tensor:
    return torch.zeros(2, length, dtype=torch.long, device="meta")
