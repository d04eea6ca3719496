"""Pictures of an evaluation as PNG files: a stopped evaluation goes on, a base is generated once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.evaluation.prompts import EvalPrompt
from diffalign.sampling.generate import generate_images

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how many are done, how many there are)."""


def silent(label: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Settings:
    """How pictures are generated; equal settings, prompts and weights give equal pictures."""

    steps: int
    guidance: float
    batch_size: int = 8


class Pictures:
    """PNG files read when asked for: `[i]` gives `[3, H, W]`, `[a:b]` gives `[b-a, 3, H, W]`, in [0, 1]."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, slice):
            return torch.stack([read_picture(path) for path in self.paths[index]])
        return read_picture(self.paths[index])


def generate_pictures(
    model: Any,
    prompts: Sequence[EvalPrompt],
    settings: Settings,
    folder: Path,
    *,
    fingerprint: str,
    label: str = "pictures",
    progress: Progress = silent,
) -> Pictures:
    """Pictures of a pipeline or backbone for prompts with seeds; those in `folder` are not made again.

    A subfolder is named by the model's fingerprint, steps and guidance, a file by prompt and seed.
    """
    place = folder / _key(fingerprint, settings.steps, settings.guidance)
    paths = [place / f"{_key(prompt.text, prompt.seed)}.png" for prompt in prompts]
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    if missing:
        place.mkdir(parents=True, exist_ok=True)
        _write_manifest(place, fingerprint, settings)
    done = len(paths) - len(missing)
    progress(label, done, len(paths))
    for start in range(0, len(missing), settings.batch_size):
        rows = missing[start : start + settings.batch_size]
        for row, image in zip(rows, generate_batch(model, [prompts[i] for i in rows], settings), strict=True):
            write_picture(image, paths[row])
        done += len(rows)
        progress(label, done, len(paths))
    return Pictures(paths)


def generate_batch(model: Any, prompts: Sequence[EvalPrompt], settings: Settings) -> Tensor:
    """Pictures `[B, 3, H, W]` in [0, 1] of prompts with seeds."""
    return generate_images(
        model,
        [prompt.text for prompt in prompts],
        [prompt.seed for prompt in prompts],
        steps=settings.steps,
        guidance=settings.guidance,
        batch_size=settings.batch_size,
    )


def pictures_in_memory(
    model: Any, rows: Sequence[EvalPrompt], settings: Settings, label: str, progress: Progress
) -> Tensor:
    """Pictures as a tensor, rounded to the 256 levels that a file would hold."""
    parts = []
    for start in range(0, len(rows), settings.batch_size):
        progress(label, start, len(rows))
        images = generate_batch(model, rows[start : start + settings.batch_size], settings)
        parts.append((images.clamp(0, 1) * 255).round().cpu() / 255)
    progress(label, len(rows), len(rows))
    return torch.cat(parts)


def weights_fingerprint(module: nn.Module, exclude: Sequence[str] = ()) -> str:
    """Content key of a network's weights without the parameters named in `exclude`.

    Built from each tensor's name, shape and sums, so that it costs one pass and no file is read.
    Sums may differ in the last bit between machines: then pictures are made anew, never wrongly reused.
    """
    digest = hashlib.blake2b(digest_size=12)
    left_out = set(exclude)
    for name, value in sorted(module.state_dict().items()):
        if name not in left_out and torch.is_tensor(value):
            v = value.detach().float()
            digest.update(f"{name}{tuple(v.shape)}{v.sum().item()!r}{v.square().sum().item()!r}".encode())
    return digest.hexdigest()


def write_picture(image: Tensor, path: Path) -> None:
    """Store `[3, H, W]` in [0, 1] as a PNG; the name appears only when the file is complete.

    Raises:
        DiffalignError: the picture holds NaN or infinite values.
    """
    if not bool(torch.isfinite(image).all()):
        raise DiffalignError(
            f"the model made a picture with NaN values ({path.name}); try fp32 or bf16 precision, "
            "or a VAE that is safe in fp16"
        )
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    Image.fromarray(to_uint8(image)).save(part, format="PNG")
    part.replace(path)


def read_picture(path: Path) -> Tensor:
    """A PNG as `[3, H, W]` in [0, 1]."""
    with Image.open(path) as file:
        return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_uint8(image: Tensor) -> np.ndarray:
    """`[3, H, W]` in [0, 1] as `[H, W, 3]` uint8."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte()
    return pixels.permute(1, 2, 0).cpu().numpy()


def _write_manifest(place: Path, fingerprint: str, settings: Settings) -> None:
    facts = {"model": fingerprint} | {k: v for k, v in asdict(settings).items() if k != "batch_size"}
    (place / "manifest.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")


def _key(*parts: object) -> str:
    return hashlib.blake2b(json.dumps([str(p) for p in parts]).encode(), digest_size=12).hexdigest()
