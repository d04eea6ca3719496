"""What a cache depends on, as a hash: a cache made from other things is never used by mistake.

The contents of records (prompts and image bytes) are hashed once; the result is remembered beside the caches
under the paths, sizes and modification times of the source's files, so that later runs do not read the images
again. A file changed in place with its size and modification time kept would go unnoticed (as it would for
make or rsync). Labels, weights and ties are not part of the key: they are applied when pairs are fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffalign.data.images import FORMATS
from diffalign.data.records import ImageSource, LazyRecords, read_image
from diffalign.data.shards import write_text

if TYPE_CHECKING:
    from diffalign.config import DataConfig

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""

# Raise this when images.py or encode.py would give other latents or sizes for the same input.
PREPROCESSING_VERSION = 1


@dataclass(frozen=True)
class CacheKey:
    """Everything the encoded part of a cache depends on."""

    settings: dict[str, Any]

    @property
    def digest(self) -> str:
        """32 hexadecimal digits: the name of the cache's folder."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def differences(self, other: dict[str, Any]) -> list[str]:
        """In words, where the settings of another cache differ from these."""
        names = sorted({*self.settings, *other})
        return [
            f"{name} is {other.get(name)!r} in the cache and {self.settings.get(name)!r} now"
            for name in names
            if other.get(name) != self.settings.get(name)
        ]


def cache_key(
    config: DataConfig, model: str, precision: str, records: str, count: int, slots: int = 2
) -> CacheKey:
    """The key of a cache.

    Args:
        config: image preparation and shard size.
        model: fingerprint of the model's VAE and text encoders.
        precision: number format the encoders run in (`fp32`, `bf16`, `fp16`).
        records: digest of the records (`records_digest`).
        count: number of records. slots: images of each.
    """
    return CacheKey(
        {
            "model": model,
            "precision": precision,
            "resolution": config.resolution,
            "crop": config.crop,
            "flip": config.flip,
            "max_pixels": config.max_pixels,
            "formats": list(FORMATS),
            "shard_size": config.shard_size,
            "preprocessing": PREPROCESSING_VERSION,
            "records": records,
            "count": count,
            "slots": slots,
        }
    )


def resolve_precision(precision: str) -> str:
    """The number format that `auto` stands for on this machine."""
    if precision != "auto":
        return precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "fp32"


def storage_dtype(precision: str) -> torch.dtype:
    """The number format of a cache: float32 for fp32 models; float16 otherwise, which halves it.

    float16 and not bfloat16: encoded values are far below its range limit of 65504, and it keeps 11 bits
        instead of 8.
    """
    return torch.float32 if precision == "fp32" else torch.float16


def records_digest(records: LazyRecords[Any], cache_dir: Path, progress: Progress | None = None) -> str:
    """Hash of the prompts and image bytes of all records, read from its note when the source is unchanged."""
    note = digest_note(records, cache_dir)
    if note is not None and note.exists():
        return note.read_text(encoding="ascii").strip()
    digest = _hash_records(records, progress)
    if note is not None:
        write_text(note, digest)
    return digest


def digest_note(records: LazyRecords[Any], cache_dir: Path) -> Path | None:
    """The file that remembers a source's digest; None when nothing vouches for the source's contents."""
    return None if records.identity is None else cache_dir / "digests" / f"{records.identity}.txt"


def _hash_records(records: LazyRecords[Any], progress: Progress | None) -> str:
    total = hashlib.blake2b(digest_size=16)
    for i, record in enumerate(records):
        for prompt in record.prompts:
            total.update(hashlib.blake2b(prompt.encode(), digest_size=16).digest())
        for image in record.images:
            total.update(image_hash(image))
        if progress is not None:
            progress("reading records", i + 1, len(records))
    return total.hexdigest()


def image_hash(image: ImageSource) -> bytes:
    """16-byte hash of an image's encoded bytes; that of no bytes when it cannot be read."""
    try:
        data = read_image(image)
    except OSError:
        data = b""
    return hashlib.blake2b(data, digest_size=16).digest()
