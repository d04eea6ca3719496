"""A tiny random CLIP in open_clip's folder format, and rendered scenes with labels as JSONL: a world for scorers."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import open_clip
import torch
from pair_world import png
from safetensors.torch import save_file

from diffalign.config import RunConfig
from diffalign.samples import scenes
from diffalign.yamls import apply_override

WIDTH = 32


def random_clip(folder: Path) -> Path:
    """An untrained CLIP with embeddings of `WIDTH` for 64 px pictures; returns its folder."""
    folder.mkdir(parents=True)
    for path in (Path(str(files("diffalign.samples"))) / "tiny-sdxl" / "tokenizer").iterdir():
        shutil.copy(path, folder / path.name)
    words = len(json.loads((folder / "vocab.json").read_text()))
    text = {
        "context_length": 16,
        "vocab_size": words,
        "hf_tokenizer_name": "here",
        "width": 32,
        "heads": 2,
        "layers": 1,
    }
    vision = {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    model = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": {"size": 64}})
    )
    torch.manual_seed(0)
    network = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(
        {k: v.contiguous() for k, v in network.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def write_pairs(folder: Path, count: int, first: int = 0) -> Path:
    """Pairs whose preferred picture is the redder one: a JSONL file with ties, users and a second aspect."""
    folder.mkdir(parents=True, exist_ok=True)
    world = scenes.training_scenes(first)
    lines = []
    for i in range(count):
        pictures = []
        for side in "ab":
            scene, placed = next(world)
            data = png(placed)
            path = folder / f"{i}-{side}.png"
            path.write_bytes(data)
            pictures.append((path.name, redness(path)))
        pictures.sort(key=lambda p: -p[1])
        line: dict[str, Any] = {
            "prompt": scenes.caption(scene),
            "chosen": pictures[0][0],
            "rejected": pictures[1][0],
            "user": f"user {i % 3}",
            "labels": {"darkness": 0.0 if i % 2 else None},
        }
        if i % 8 == 0:
            line["label"] = 0.5
        lines.append(json.dumps(line))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return path


def redness(path: Path) -> float:
    from PIL import Image

    red, green, blue = (
        channel.getextrema() and sum(channel.getdata()) for channel in Image.open(path).split()
    )
    return red - (green + blue) / 2


def scorer_config(folder: Path, clip: Path, pairs: Path, *overrides: str) -> RunConfig:
    """A reward-model run of a few steps."""
    values: dict[str, Any] = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "model": {"path": str(clip), "tune": "head", "precision": "fp32"},
        "data": {
            "source": str(pairs),
            "held_out": str(pairs),
            "resolution": 64,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {"method": "reward_model", "head": "mlp", "hidden": 16},
        "optim": {"lr": 3e-3, "steps": 12, "batch_size": 8},
        "checkpoint": {"every": 4},
        "evaluation": {"best_metric": "held_out/accuracy"},
    }
    for override in overrides:
        apply_override(values, override)
    return RunConfig.model_validate(values)
