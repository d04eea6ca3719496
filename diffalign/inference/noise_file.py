"""Noises as a file: all that is needed to draw the same pictures again, here or with plain diffusers.

Tensors: `noises` `[P, S, C, h, w]`, and `latents`, the initial ones as the pipeline's `latents=` takes them. Metadata
(JSON under `diffalign`): the model, prompts, seeds, steps, guidance and sampler.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.sampling.initial import pipeline_latents

KEY = "diffalign"


@dataclass(frozen=True)
class NoiseFile:
    """Noises `[P, S, C, h, w]`, prompts and seeds, the model's configuration and how it is sampled."""

    noises: Tensor
    prompts: Sequence[str]
    seeds: Sequence[int]
    model: dict[str, Any]
    settings: dict[str, Any]


def write_noises(path: Path, content: NoiseFile, family: str) -> None:
    """Write a file of noises; its name appears only when it is complete."""
    facts = {"prompts": list(content.prompts), "seeds": list(content.seeds)}
    about = json.dumps({**facts, "model": content.model, "settings": content.settings}, ensure_ascii=False)
    tensors = {"noises": content.noises, "latents": pipeline_latents(content.noises[:, 0], family)}
    part = path.with_name(f".{path.name}.part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part, {KEY: about})
    part.replace(path)


def read_noises(path: Path) -> NoiseFile:
    """Read what `write_noises` wrote.

    Raises:
        DiffalignError: no such file, or not a file of noises.
    """
    if not path.is_file():
        raise DiffalignError(
            f"no noise file {str(path)!r}; expected the noise.safetensors of an optimised folder"
        )
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
            noises = file.get_tensor("noises")
        return NoiseFile(noises, about["prompts"], about["seeds"], about["model"], about["settings"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DiffalignError(
            f"{path} holds no noises of diffalign optimize; expected its noise.safetensors"
        ) from error


def check_replayable(content: NoiseFile) -> None:
    """Whether every picture has noises that give it again.

    Raises:
        DiffalignError: some were found by steering a run.
    """
    lost = (~torch.isfinite(content.noises.flatten(1)).all(1)).nonzero().flatten().tolist()
    if lost:
        raise DiffalignError(
            f"{len(lost)} of {len(content.noises)} pictures were found by steering the sampler and have no noises that "
            "give them again; look at the pictures in after/"
        )
