"""The VAE of a model: its factor, the scaling of its latents, and another one in its place."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffalign.backbones.loading import Source, loading
from diffalign.config import ModelConfig


def vae_factor(source: Source, config: ModelConfig) -> int:
    """Pixels per latent along one side, from the VAE's configuration alone.

    Raises:
        DiffalignError: it cannot be loaded.
    """
    if config.vae is not None:
        values = loading(f"VAE {config.vae}", lambda: AutoencoderKL.load_config(config.vae))
    else:
        revision = {"revision": source.revision} if source.revision else {}
        values = loading(
            f"VAE of {source.name}",
            lambda: AutoencoderKL.load_config(source.path, subfolder="vae", **revision),
        )
    return int(2 ** (len(values["block_out_channels"]) - 1))


def other_vae(config: ModelConfig, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE that `model.vae` names.

    Raises:
        DiffalignError: it cannot be loaded.
    """
    return loading(
        f"VAE {config.vae}",
        lambda: AutoencoderKL.from_pretrained(config.vae, torch_dtype=dtype, use_safetensors=True),
    )


def latent_scaling(vae: Any, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
    """Shift and scale with `network_latent = (vae_latent - shift) * scale`."""
    config = vae.config
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean = torch.tensor(config.latents_mean, device=device).reshape(1, -1, 1, 1)
        std = torch.tensor(config.latents_std, device=device).reshape(1, -1, 1, 1)
        return mean, config.scaling_factor / std
    return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
