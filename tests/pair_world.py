"""Rendered scenes as preference pairs, cached for a tiny random model: real data for the trainer tests."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffalign.backbones import Backbone, open_backbone
from diffalign.config import DataConfig, ModelConfig
from diffalign.data.cache import PairCache, build_cache
from diffalign.data.records import PreferenceRecord
from diffalign.randomness import Draw
from diffalign.samples import scenes


def scene_records(count: int) -> list[PreferenceRecord]:
    """Captions with a right and a wrong picture; the right one comes first and second in turn."""
    world = scenes.training_scenes(0)
    records = []
    for i in range(count):
        scene, right = next(world)
        _, wrong = next(world)
        images = [png(right), png(wrong)][:: 1 if i % 2 == 0 else -1]
        records.append(PreferenceRecord(scenes.caption(scene), *images, float(i % 2 == 0), "scenes"))
    return records


def png(placed: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scenes.draw(placed)).save(buffer, "PNG")
    return buffer.getvalue()


def open_model(
    path: Path, *, precision: str = "fp32", tune: str = "lora", frozen_copy: bool = False
) -> Backbone:
    config = ModelConfig(path=str(path), precision=precision, tune=tune)  # type: ignore[arg-type]
    return open_backbone(config, device="cpu", resolution=64, frozen_copy=frozen_copy)


def open_pairs(backbone: Backbone, folder: Path, count: int = 6, **options: Any) -> PairCache:
    """The cached pairs; encoded by `backbone` on first use."""
    data = DataConfig(source="unused", resolution=64, cache_dir=str(folder), **options)
    return build_cache(scene_records(count), lambda: backbone, data, backbone.config)


def whole_draw(count: int = 4, step: int = 0, seed: int = 0) -> Draw:
    return Draw(seed, step, list(range(count)), list(range(count)), count)


@torch.no_grad()
def move_weights(backbone: Backbone, scale: float = 0.05) -> None:
    """Stands for some training: noise on every trained weight."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in backbone.trainable_parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator)


@contextmanager
def counted_forwards(backbone: Backbone) -> Iterator[list[dict[str, Any]]]:
    """Arguments of every `predict` inside the block."""
    calls: list[dict[str, Any]] = []
    predict = backbone.predict

    def counting(x_t: Any, t: Any, cond: Any, reference: bool = False) -> Any:
        calls.append({"x_t": x_t, "t": t, "cond": cond, "reference": reference})
        return predict(x_t, t, cond, reference)

    backbone.predict = counting  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        del backbone.predict
