"""The cache of encoded preference pairs: training reads it instead of running the VAE and the text encoders.

A cache is a folder `data.cache_dir/KEY` of memory-mapped safetensors shards with an index written last. KEY
hashes everything the encoded tensors depend on (`keys.py`). Labels and ties are applied here, so that another
treatment of them uses the same cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffalign import backbones
from diffalign.conditioning import Conditioning
from diffalign.data.batch import PairBatch
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
from diffalign.data.pairs import Pairs, choose_pairs
from diffalign.data.records import PreferenceRecord, as_records
from diffalign.data.shards import CorruptShard, read_metadata, read_tensors
from diffalign.errors import DiffalignError
from diffalign.randomness import Draw

if TYPE_CHECKING:
    from diffalign.backbones.base import Backbone
    from diffalign.config import DataConfig, ModelConfig

POLL_SECONDS = 0.5


def build_cache(
    records: Sequence[PreferenceRecord],
    opener: Callable[[], Backbone],
    config: DataConfig,
    model: ModelConfig,
    seed: int = 0,
    progress: Progress | None = None,
    builder: bool = True,
    timeout: float = 24 * 3600,
) -> PairCache:
    """Open the cache of these records, filling it first where it is incomplete.

    Args:
        records: the preference records; images are read only if something must be encoded or the source is
            new.
        opener: opens a backbone with VAE and text encoders; called at most once, and only when something is
            missing.
        config: image preparation, labels, ties, cache folder.
        model: whose encoders are used.
        seed: run seed (only `labels: random` uses it).
        progress: called with what is being done, how much is done, and how much there is.
        builder: whether this process fills the cache. Others wait for its files; nothing is communicated
            otherwise.
        timeout: seconds that a process which is not the builder waits.

    Raises:
        DiffalignError: all pairs are ties and dropped, no image can be used, the disk is full, or waiting
            took too long.
    """
    records = as_records(records)
    pairs = choose_pairs(records, config.labels, config.ties, seed)
    cache_dir = Path(config.cache_dir)
    note = digest_note(records, cache_dir)
    if not builder and note is not None:
        wait_for(note.exists, note, timeout)
    digest = records_digest(records, cache_dir, progress)
    precision = resolve_precision(model.precision)
    key = cache_key(config, backbones.model_fingerprint(model), precision, digest, len(records))
    folder = cache_dir / key.digest
    if builder:
        fill(CacheJob(folder, records, config, key, storage_dtype(precision), progress), opener)
    else:
        wait_for(lambda: _is_complete(folder, key), folder / INDEX, timeout)
    return PairCache.open(folder, key, pairs, mode=config.latents == "mode")


class PairCache:
    """Encoded preference pairs, fetched by index.

    Attributes:
        folder: where it lies. key: hash of all it depends on. pairs: what is trained on, in order.
        broken: images that were left out, each with record, image (0 or 1), source and reason.
    """

    def __init__(self, folder: Path, index: dict[str, Any], pairs: Pairs, mode: bool = False) -> None:
        self.folder = folder
        self.key: str = index["key"]
        self.broken: list[dict[str, Any]] = index["broken"]
        self.mode = mode
        self._shard_size: int = index["settings"]["shard_size"]
        self._flip: bool = index["settings"]["flip"]
        self._files: dict[str, dict[str, Tensor]] = {}
        usable = np.ones(index["records"], bool)
        usable[[fault["record"] for fault in self.broken]] = False
        self.pairs = pairs.keep(usable[pairs.records])
        self._rows = _rows_in_shards(usable, self._shard_size)
        self._chosen = torch.from_numpy(self.pairs.chosen)
        self._preference = torch.from_numpy(self.pairs.preference)
        self._weight = torch.from_numpy(self.pairs.weight)
        if len(self) == 0:
            raise DiffalignError(_nothing_left(index, pairs))

    @classmethod
    def open(cls, folder: Path, key: CacheKey, pairs: Pairs, mode: bool = False) -> PairCache:
        """Open a complete cache; no model is loaded and no image decoded.

        Args:
            folder: the cache's folder.
            key: what the cache must have been made from.
            pairs: labels of the records it was made from.
            mode: use posterior means instead of samples.

        Raises:
            DiffalignError: it is incomplete, damaged, or was made from something else (the message says what
                differs).
        """
        return cls(folder, read_index(folder, key), pairs, mode)

    def __len__(self) -> int:
        return len(self.pairs)

    def fetch(self, draw: Draw) -> PairBatch:
        """The pairs of a draw, on the CPU. Posterior noise and flips depend on (seed, step, record) only."""
        index = torch.as_tensor(list(draw.records))
        chosen = self._chosen[index]
        variants = self._variants(draw)
        entries = [self._entry(record) for record in draw.records]
        latents = self._latents(draw, entries, variants)
        prompts = torch.stack([tensors["prompts"][row] for tensors, row in entries])
        time_ids = None
        if "time_ids" in entries[0][0]:
            time_ids = torch.stack(
                [t["time_ids"][row, v] for (t, row), v in zip(entries, variants, strict=True)]
            )
        text_chosen, text_rejected = self._text(_of_slot(prompts, chosen)), None
        if (prompts[:, 0] != prompts[:, 1]).any():
            text_rejected = self._text(_of_slot(prompts, 1 - chosen))
        return PairBatch(
            chosen=_of_slot(latents, chosen),
            rejected=_of_slot(latents, 1 - chosen),
            conditioning_chosen=_with_ids(text_chosen, time_ids, chosen),
            conditioning_rejected=_with_ids(text_rejected or text_chosen, time_ids, 1 - chosen),
            preference=self._preference[index],
            weight=self._weight[index],
            draw=draw,
        )

    def unconditional(self, count: int) -> Conditioning:
        """The conditioning of no prompt, `count` rows, as the model's pipeline does it; without time ids."""
        stored = Conditioning(**self._tensors(UNCONDITIONAL))
        return _restored(stored.map(lambda x: x.expand(count, *x.shape[1:])))

    def _latents(
        self, draw: Draw, entries: list[tuple[dict[str, Tensor], int]], variants: list[int]
    ) -> Tensor:
        """Latents `[B, 2, C, H, W]` of both images of each record."""
        stored = torch.stack([t["latents"][row, v] for (t, row), v in zip(entries, variants, strict=True)])
        mean, std = stored.float().unbind(2)
        if self.mode:
            return mean
        shape = mean.shape[2:]
        noise = torch.stack([draw.normal(shape, "posterior", image) for image in (0, 1)], 1)
        return mean + std * noise

    def _variants(self, draw: Draw) -> list[int]:
        """0: the picture as it is, 1: mirrored."""
        return (draw.uniform("flip") < 0.5).long().tolist() if self._flip else [0] * len(draw)

    def _text(self, prompts: Tensor) -> Conditioning:
        """Text conditioning of prompts by number `[B]`."""
        rows: list[dict[str, Tensor]] = []
        for prompt in prompts.tolist():
            shard, row = divmod(prompt, self._shard_size)
            tensors = self._tensors(shard_name("prompts", shard))
            rows.append({name: value[row] for name, value in tensors.items()})
        return _restored(Conditioning(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}))

    def _entry(self, index: int) -> tuple[dict[str, Tensor], int]:
        """Tensors of the shard that holds a pair, and its row there."""
        record = int(self.pairs.records[index])
        shard = record // self._shard_size
        return self._tensors(shard_name("pairs", shard)), int(self._rows[record])

    def _tensors(self, name: str) -> dict[str, Tensor]:
        if name not in self._files:
            self._files[name] = read_tensors(self.folder / name)
        return self._files[name]


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


def _rows_in_shards(usable: np.ndarray, shard_size: int) -> np.ndarray:
    """Row of each record in its shard `[N]`: broken records take no row."""
    before = np.cumsum(usable) - usable
    starts = before[np.arange(len(usable)) // shard_size * shard_size]
    return before - starts


def _of_slot(values: Tensor, slot: Tensor) -> Tensor:
    """Pick one of the two images of each row: values `[B, 2, ...]`, slot `[B]`."""
    return values[torch.arange(len(slot)), slot]


def _with_ids(text: Conditioning, time_ids: Tensor | None, slot: Tensor) -> Conditioning:
    return text if time_ids is None else replace(text, time_ids=_of_slot(time_ids, slot))


def _restored(stored: Conditioning) -> Conditioning:
    """Stored embeddings in float32, in memory of their own."""
    return stored.map(lambda x: x.float().contiguous() if x.is_floating_point() else x.contiguous())


def _nothing_left(index: dict[str, Any], pairs: Pairs) -> str:
    reasons = "; ".join(f"record {b['record']} ({b['source']}): {b['reason']}" for b in index["broken"][:3])
    return (
        f"no usable pair is left of {index['records']} in {index['source']}: {len(index['broken'])} images "
        f"are broken or missing, {pairs.ties_dropped} ties dropped. First reasons: {reasons}. Run `diffalign "
        "data validate` on the source, and check image paths."
    )


def _is_complete(folder: Path, key: CacheKey) -> bool:
    try:
        read_index(folder, key)
    except CorruptShard:
        return False
    return True


def wait_for(condition: Callable[[], bool], path: Path, timeout: float) -> None:
    """Wait until another process has written a file."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise DiffalignError(
                f"waited {timeout:.0f} s for {path}, which the first process writes. Look at its output; all "
                "processes of a machine must share data.cache_dir. For large data run `diffalign cache` "
                "before training."
            )
        time.sleep(POLL_SECONDS)
