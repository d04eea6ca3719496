"""Frozen weights in four bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314) through bitsandbytes and diffusers.

Linear layers of the base are stored as NF4 and multiplied in the precision of the forward pass; everything else stays
in that precision. The reference is the same network with its adapters off, so it is quantised, too.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from diffusers import BitsAndBytesConfig
from torch import Tensor, nn

from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError


def check_quantized(config: ModelConfig, device: torch.device, frozen_copy: bool) -> None:
    """Refuse a quantised base that cannot be had, before anything is loaded.

    Raises:
        DiffalignError: no CUDA GPU, no bitsandbytes, or a second network as the reference.
    """
    if config.quantize == "none":
        return
    asked = f"model.quantize is {config.quantize!r}"
    if device.type != "cuda":
        raise DiffalignError(
            f"{asked}, which needs a CUDA GPU, but the device is {device}; set model.quantize=none."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise DiffalignError(
            f"{asked}, which needs bitsandbytes; pip install 'diffalign[quantize]', or set model.quantize=none."
        )
    if frozen_copy:
        raise DiffalignError(
            f"{asked} and trainer.reference is 'frozen_copy'; set trainer.reference=adapters_off, which is the same "
            "network without its second copy."
        )


def quantization_arguments(config: ModelConfig, compute: torch.dtype) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` of the network; none when it is not quantised.

    Args:
        compute: number format in which four-bit weights are multiplied.
    """
    if config.quantize == "none":
        return {}
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantize,
        bnb_4bit_compute_dtype=compute,
        # Saves 0.4 of 4.5 bits per weight, as in the paper (section 3, double quantisation).
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": four_bit}


def compute_in(network: nn.Module, compute: torch.dtype) -> None:
    """Let layers in four bits answer in the precision of the forward pass, as plain ones do under autocast.

    By themselves they answer in the format of what they are given, and norms under autocast give float32.
    """

    def cast(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].to(compute), *inputs[1:])

    for layer in network.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.uint8:
            layer.register_forward_pre_hook(cast)
