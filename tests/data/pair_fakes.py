"""Small stand-ins for the data tests: encoded pictures, records, a backbone of plain arithmetic."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from diffalign.conditioning import Conditioning
from diffalign.config import DataConfig, ModelConfig
from diffalign.data.cache import PairCache, build_cache
from diffalign.data.records import PreferenceRecord
from diffalign.randomness import Draw

MODEL = ModelConfig(path="fake", precision="fp32")


def encoded(
    color: tuple[int, int, int], size: tuple[int, int] = (16, 16), format: str = "PNG", **options: Any
) -> bytes:
    """A plain picture of `size` (width, height) as a file's bytes."""
    return encoded_array(np.full((size[1], size[0], 3), color, np.uint8), format, **options)


def encoded_array(array: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **options)
    return buffer.getvalue()


def ramp(width: int, height: int) -> np.ndarray:
    """`[H, W, 3]` picture whose red is the column, green the row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)


def records(count: int, labels: Sequence[float] = (1.0,)) -> list[PreferenceRecord]:
    """Records `i` with a first image of red 4 i, a second of red 4 i + 2, and two prompts in turn."""
    return [
        PreferenceRecord(
            prompt=f"prompt {i % 2}",
            image_0=encoded((4 * i, 0, 0)),
            image_1=encoded((4 * i + 2, 0, 0)),
            label_0=labels[i % len(labels)],
            source="test",
        )
        for i in range(count)
    ]


def red(latents: Tensor) -> list[int]:
    """The red level 0..255 that latents `[B, C, H, W]` of `FakeBackbone` (posterior mean) stand for."""
    return ((latents[:, 0].mean((1, 2)) + 1) * 127.5).round().int().tolist()


def write_pickapic(path: Path, rows: list[dict[str, Any]], row_group_size: int = 2) -> Path:
    """A parquet file in the Pick-a-Pic schema; rows may lack optional columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def pickapic_row(
    caption: str, label_0: float | None, jpg_0: bytes, jpg_1: bytes, **more: Any
) -> dict[str, Any]:
    label_1 = None if label_0 is None else 1 - label_0
    row = {"caption": caption, "jpg_0": jpg_0, "jpg_1": jpg_1, "label_0": label_0, "label_1": label_1}
    return row | {"has_label": label_0 is not None, "are_different": label_0 != 0.5, "user_id": 7} | more


class FakeBackbone:
    """Encodes by 4x4 mean pooling with deviation `std`, a prompt as its length; time ids like SDXL's."""

    device = torch.device("cpu")

    def __init__(self, std: float = 0.0, sizes: bool = True, fail_after: int | None = None) -> None:
        self.std, self.sizes, self.fail_after = std, sizes, fail_after
        self.encoded = 0
        self.prompts: list[str] = []

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.fail_after is not None and self.encoded >= self.fail_after:
            raise KeyboardInterrupt
        self.encoded += len(images)
        mean = torch.nn.functional.avg_pool2d(images, 4)
        return mean, torch.full_like(mean, self.std)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.prompts += prompts
        length = torch.tensor([float(len(prompt)) for prompt in prompts])
        last = torch.tensor([float(ord(prompt[-1])) if prompt else 0.0 for prompt in prompts])
        return Conditioning(length.reshape(-1, 1, 1).repeat(1, 3, 2), last.reshape(-1, 1))

    def unconditional(self, n: int) -> Conditioning:
        return Conditioning(torch.full((n, 3, 2), -1.0), torch.full((n, 1), -2.0))

    def with_sizes(self, cond: Conditioning, original: Tensor, crop: Tensor, target: Tensor) -> Conditioning:
        if not self.sizes:
            return cond
        return Conditioning(cond.embeddings, cond.pooled, torch.cat([original, crop, target], 1))


def data_config(folder: Path, **options: Any) -> DataConfig:
    values: dict[str, Any] = {"source": "unused", "resolution": 16, "cache_dir": str(folder), "shard_size": 2}
    return DataConfig(**(values | options))


def never_opened() -> Any:
    raise AssertionError("the backbone was opened although the cache is complete")


def draw(*indices: int, step: int = 0, seed: int = 0) -> Draw:
    return Draw(seed, step, list(indices), list(range(len(indices))), len(indices))


def build(folder: Path, source: Any, backbone: FakeBackbone | None = None, **options: Any) -> PairCache:
    fake = FakeBackbone() if backbone is None else backbone
    return build_cache(source, lambda: fake, data_config(folder, **options), MODEL)  # type: ignore[arg-type, return-value]


def reopen(folder: Path, source: Any, **options: Any) -> PairCache:
    return build_cache(source, never_opened, data_config(folder, **options), MODEL)
