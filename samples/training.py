"""What the builds of all embedded models share: pictures, latents, tokens, schedules, saving."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffalign.randomness import derive_seed
from diffalign.samples import architectures, scenes


def pictures(seed: int, count: int) -> tuple[np.ndarray, list[str]]:
    """`count` training pictures `[N, 64, 64, 3]` uint8 with their captions."""
    rng = np.random.default_rng(derive_seed("backgrounds", seed))
    drawn = itertools.islice(scenes.training_scenes(seed), count)
    rows = [(scenes.draw(placed, scenes.random_background(rng)), scenes.caption(s)) for s, placed in drawn]
    return np.stack([row[0] for row in rows]), [row[1] for row in rows]


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 `[N, H, W, 3]` to float `[N, 3, H, W]` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then cosine decay to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * progress)))


def report(name: str, step: int, steps: int, loss: float, started: float) -> None:
    """One progress line."""
    left = (time.time() - started) / (step + 1) * (steps - step - 1)
    print(f"{name} {step + 1}/{steps} loss {loss:.4f}, {left / 60:.1f} min left", flush=True)


def autocast(device: str) -> torch.autocast:
    """bf16 on any device: half the time on CPUs and GPUs that have it."""
    return torch.autocast(device, torch.bfloat16)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray, device: str) -> Tensor:
    """Scaled posterior means `[N, 4, 16, 16]`."""
    parts = []
    for chunk in to_tensor(images).split(256):
        with autocast(device):
            parts.append(vae.encode(chunk.to(device)).latent_dist.mode().float().cpu())
    return torch.cat(parts) * vae.config.scaling_factor


def text_conditioning(encoders: list[torch.nn.Module], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """SDXL text states `[B, L, D1 + D2]` and pooled embedding `[B, P]` of token ids `[B, L]`."""
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    return torch.cat([o.hidden_states[-2] for o in outputs], -1), outputs[1][0]


def latents_and_captions(vae: AutoencoderKL, seed: int, count: int, device: str) -> tuple[Tensor, list[str]]:
    """Scaled latents `[N, 4, 16, 16]` and captions of `count` training pictures."""
    images, captions = pictures(seed, count)
    return encode_all(vae, images, device), captions


def tokenized(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token ids `[N, L]`, padded."""
    tokens: Tensor = tokenizer(
        captions, padding="max_length", max_length=architectures.MAX_TOKENS, return_tensors="pt"
    ).input_ids
    return tokens


def size_ids(count: int, device: torch.device | str) -> Tensor:
    """SDXL's size conditioning `[B, 6]` of whole 64 px pictures."""
    return torch.tensor([64.0, 64, 0, 0, 64, 64], device=device).expand(count, 6)


def save_folder(pipeline: Any, folder: Path) -> None:
    """Write a pipeline without the names of the folders its parts came from."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("*/config.json"):
        facts = json.loads(path.read_text())
        facts.pop("_name_or_path", None)
        path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
