"""The number format that a network runs in, whoever calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def autocast_forward(forward: Callable[..., Any], device_type: str, dtype: torch.dtype) -> Callable[..., Any]:
    """A network's forward under autocast, with its output in the format of its input.

    Schedulers of diffusers give the latents the output's format, which then has to fit the VAE.
    """

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        # Pipelines of UNets give the latents first, those of transformers by name.
        sample = args[0] if args else kwargs["hidden_states"]
        with torch.autocast(device_type, dtype):
            out = forward(*args, **kwargs)
        if isinstance(sample, list):
            return out  # Z-Image; its pipeline makes float32 of the outputs itself.
        if isinstance(out, tuple):
            return (out[0].to(sample.dtype), *out[1:])
        out.sample = out.sample.to(sample.dtype)
        return out

    return run
