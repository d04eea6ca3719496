"""Encoded records on disk: the part of every cache that knows no labels. Training reads it instead of running the
VAE and the text encoders.

A cache is a folder `data.cache_dir/KEY` of memory-mapped safetensors shards with an index written last. KEY
hashes everything the encoded tensors depend on (`keys.py`). Labels, ties, ranks and scores are applied above it
(`cache.py`, `picture_cache.py`), so that another treatment of them uses the same cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffalign import backbones
from diffalign.conditioning import Conditioning
from diffalign.data.encode import INDEX, UNCONDITIONAL, CacheJob, file_names, fill, shard_name
from diffalign.data.keys import (
    CacheKey,
    Progress,
    cache_key,
    digest_note,
    records_digest,
    resolve_precision,
    storage_dtype,
)
from diffalign.data.records import LazyRecords
from diffalign.data.shards import CorruptShard, read_metadata, read_tensors
from diffalign.errors import DiffalignError
from diffalign.randomness import Draw

if TYPE_CHECKING:
    from diffalign.backbones.base import Backbone
    from diffalign.config import DataConfig, ModelConfig

POLL_SECONDS = 0.5


def open_encoded(
    records: LazyRecords[Any],
    opener: Callable[[], Backbone],
    config: DataConfig,
    model: ModelConfig,
    progress: Progress | None = None,
    builder: bool = True,
    timeout: float = 24 * 3600,
) -> EncodedRecords:
    """Open the encoded form of these records, filling it first where it is incomplete.

    Args:
        records: images are read only if something must be encoded or the source is new.
        opener: opens a backbone with VAE and text encoders; called at most once, and only when something is
            missing.
        config: image preparation and cache folder.
        model: whose encoders are used.
        progress: called with what is being done, how much is done, and how much there is.
        builder: whether this process fills the cache. Others wait for its files; nothing is communicated
            otherwise.
        timeout: seconds that a process which is not the builder waits.

    Raises:
        DiffalignError: the disk is full, the model gives non-finite numbers, or waiting took too long.
    """
    cache_dir = Path(config.cache_dir)
    note = digest_note(records, cache_dir)
    if not builder and note is not None:
        wait_for(note.exists, note, timeout)
    digest = records_digest(records, cache_dir, progress)
    precision = resolve_precision(model.precision)
    fingerprint = backbones.model_fingerprint(model)
    key = cache_key(config, fingerprint, precision, digest, len(records), records.slots)
    folder = cache_dir / key.digest
    if builder:
        fill(CacheJob(folder, records, config, key, storage_dtype(precision), progress), opener)
    else:
        wait_for(lambda: _is_complete(folder, key), folder / INDEX, timeout)
    return EncodedRecords.open(folder, key, mode=config.latents == "mode")


class EncodedRecords:
    """Latents, sizes and captions of R records of S images each, by record and slot.

    Attributes:
        folder: where it lies. key: hash of all it depends on. source: the data in words. mode: whether latents are
            posterior means instead of samples.
        broken: images that were left out, each with record, image (its slot), source and reason.
        usable: `[R]` whether all images of a record are there.
    """

    def __init__(self, folder: Path, index: dict[str, Any], mode: bool = False) -> None:
        self.folder, self.mode = folder, mode
        self.key: str = index["key"]
        self.source: str = index["source"]
        self.broken: list[dict[str, Any]] = index["broken"]
        self.usable = np.ones(index["records"], bool)
        self.usable[[fault["record"] for fault in self.broken]] = False
        self._shard_size: int = index["settings"]["shard_size"]
        self._flip: bool = index["settings"]["flip"]
        self._rows = _rows_in_shards(self.usable, self._shard_size)
        self._files: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def open(cls, folder: Path, key: CacheKey, mode: bool = False) -> EncodedRecords:
        """Open a complete cache; no model is loaded and no image decoded.

        Raises:
            DiffalignError: it is incomplete, damaged, or was made from something else (the message says what
                differs).
        """
        return cls(folder, read_index(folder, key), mode)

    def __len__(self) -> int:
        return len(self.usable)

    def gather(self, draw: Draw, records: Tensor, slots: Tensor) -> Gathered:
        """K images for each of the B rows of a draw, on the CPU.

        Posterior noise and flips depend on (seed, step, row's record, place in the row) only; all images of a row are
        flipped alike.

        Args:
            records, slots: `[B, K]` which images.
        """
        variants = (draw.uniform("flip") < 0.5).long().tolist() if self._flip else [0] * len(draw)
        places = [
            [(*self._entry(int(record)), variant, int(slot)) for record, slot in zip(*row, strict=True)]
            for *row, variant in zip(records, slots, variants, strict=True)
        ]

        def stacked(name: str) -> Tensor:
            return torch.stack(
                [torch.stack([tensors[name][row, v, slot] for tensors, row, v, slot in r]) for r in places]
            )

        prompts = [[int(tensors["prompts"][row, slot]) for tensors, row, _, slot in r] for r in places]
        time_ids = stacked("time_ids") if "time_ids" in places[0][0][0] else None
        return Gathered(self._sampled(draw, stacked("latents")), torch.tensor(prompts), time_ids)

    def captions(self, numbers: Tensor) -> Conditioning:
        """Text conditioning of prompts by number `[N]`."""
        rows: list[dict[str, Tensor]] = []
        for prompt in numbers.tolist():
            shard, row = divmod(prompt, self._shard_size)
            tensors = self._tensors(shard_name("prompts", shard))
            rows.append({name: value[row] for name, value in tensors.items()})
        return _restored(Conditioning(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}))

    def unconditional(self, count: int) -> Conditioning:
        """The conditioning of no prompt, `count` rows, as the model's pipeline does it; without time ids."""
        stored = Conditioning(**self._tensors(UNCONDITIONAL))
        return _restored(stored.map(lambda x: x.expand(count, *x.shape[1:])))

    def faults(self, count: int = 3) -> str:
        """The first reasons why images were left out."""
        shown = (f"record {b['record']} ({b['source']}): {b['reason']}" for b in self.broken[:count])
        return "; ".join(shown) or "none"

    def _sampled(self, draw: Draw, stored: Tensor) -> Tensor:
        """Latents `[B, K, C, H, W]` from means and deviations `[B, K, 2, C, H, W]`."""
        mean, std = stored.float().unbind(2)
        if self.mode:
            return mean
        shape = mean.shape[2:]
        noise = torch.stack([draw.normal(shape, "posterior", k) for k in range(mean.shape[1])], 1)
        return mean + std * noise

    def _entry(self, record: int) -> tuple[dict[str, Tensor], int]:
        """Tensors of the shard that holds a record, and its row there."""
        return self._tensors(shard_name("records", record // self._shard_size)), int(self._rows[record])

    def _tensors(self, name: str) -> dict[str, Tensor]:
        if name not in self._files:
            self._files[name] = read_tensors(self.folder / name)
        return self._files[name]


class Gathered:
    """What `EncodedRecords.gather` finds.

    Attributes:
        latents: `[B, K, C, H, W]` float32. prompts: `[B, K]` numbers of the captions. time_ids: `[B, K, 6]` or None.
    """

    def __init__(self, latents: Tensor, prompts: Tensor, time_ids: Tensor | None) -> None:
        self.latents, self.prompts, self.time_ids = latents, prompts, time_ids


def read_index(folder: Path, key: CacheKey) -> dict[str, Any]:
    """The index of a complete cache made from what `key` says, after a look at every file's header.

    Raises:
        CorruptShard: there is none, or a file is missing or damaged.
        DiffalignError: the cache was made from something else.
    """
    path = folder / INDEX
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings = index["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptShard(
            f"{folder} is not a complete cache ({type(error).__name__} in {INDEX}). Run the caching again: "
            "it continues where it stopped."
        ) from error
    if index.get("key") != key.digest:
        reasons = "; ".join(key.differences(settings)) or "its index was edited"
        raise DiffalignError(
            f"the cache in {folder} is stale: {reasons}. Delete the folder, or build another cache."
        )
    for name in file_names(index["records"], index["prompts"], settings["shard_size"]):
        read_metadata(folder / name, key.digest)
    return index


def wait_for(condition: Callable[[], bool], path: Path, timeout: float) -> None:
    """Wait until another process has written a file.

    Raises:
        DiffalignError: it took longer than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise DiffalignError(
                f"waited {timeout:.0f} s for {path}, which the first process writes. Look at its output; all "
                "processes of a machine must share data.cache_dir. For large data run `diffalign cache` "
                "before training."
            )
        time.sleep(POLL_SECONDS)


def _rows_in_shards(usable: np.ndarray, shard_size: int) -> np.ndarray:
    """Row of each record in its shard `[N]`: broken records take no row."""
    before = np.cumsum(usable) - usable
    starts = before[np.arange(len(usable)) // shard_size * shard_size]
    return before - starts


def _restored(stored: Conditioning) -> Conditioning:
    """Stored embeddings in float32, in memory of their own."""
    return stored.map(lambda x: x.float().contiguous() if x.is_floating_point() else x.contiguous())


def _is_complete(folder: Path, key: CacheKey) -> bool:
    try:
        read_index(folder, key)
    except CorruptShard:
        return False
    return True
