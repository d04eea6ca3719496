"""Fills a cache: images to posterior means and deviations, prompts to embeddings, shard by shard.

A record holds S images, its slots: two of a pair, or one.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.conditioning import Conditioning
from diffalign.data.images import BrokenImage, Picture, load_picture
from diffalign.data.keys import CacheKey, Progress
from diffalign.data.records import LazyRecords, Row
from diffalign.data.shards import is_complete, read_metadata, remove_stale_partials, write_tensors, write_text
from diffalign.errors import DiffalignError
from diffalign.randomness import generator

if TYPE_CHECKING:
    from diffalign.backbones.base import Backbone
    from diffalign.config import DataConfig

INDEX = "index.json"
UNCONDITIONAL = "unconditional.safetensors"
# Pixels per VAE call: four images of 1024 px, about 8 GB of activations of the SDXL VAE in fp32.
PIXELS_PER_CALL = 4 * 1024**2
IMAGES_PER_CALL = 64
PROMPTS_PER_CALL = 32
DECODERS = min(8, os.cpu_count() or 1)

Broken = dict[str, Any]
"""An image that was left out: its record, its slot there, its source and the reason."""


@dataclass(frozen=True)
class CacheJob:
    """One cache to fill: where, from what, and how."""

    folder: Path
    records: LazyRecords[Any]
    config: DataConfig
    key: CacheKey
    dtype: torch.dtype
    progress: Progress | None = None

    @cached_property
    def prompts(self) -> dict[str, int]:
        """Number of each distinct prompt, in order of appearance."""
        found = dict.fromkeys(prompt for row in self.records.rows for prompt in row.prompts)
        return {prompt: number for number, prompt in enumerate(found)}

    @property
    def metadata(self) -> dict[str, str]:
        """What every file of the cache carries."""
        return {"key": self.key.digest}

    def ranges(self, count: int) -> list[range]:
        """Cut `count` items into shards."""
        size = self.config.shard_size
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def report(self, what: str, done: int, total: int) -> None:
        """Tell how far the work is."""
        if self.progress is not None:
            self.progress(what, done, total)


def shard_name(kind: str, number: int) -> str:
    """File name of a shard; kind is `records` or `prompts`."""
    return f"{kind}-{number:05d}.safetensors"


def file_names(records: int, prompts: int, shard_size: int) -> list[str]:
    """All safetensors files of a cache of this many records and distinct prompts."""
    counts = {"prompts": prompts, "records": records}
    shards = [shard_name(kind, i) for kind, count in counts.items() for i in range(-(-count // shard_size))]
    return [UNCONDITIONAL, *shards]


def fill(job: CacheJob, opener: Callable[[], Backbone]) -> None:
    """Write what is missing of a cache, then its index; the backbone is opened only if anything is.

    Raises:
        DiffalignError: no image can be used, the model gives non-finite numbers, or the disk is full.
    """
    remove_stale_partials(job.folder)
    names = file_names(len(job.records), len(job.prompts), job.config.shard_size)
    missing = {name for name in names if not is_complete(job.folder / name, job.key.digest)}
    if missing:
        with torch.no_grad():
            _encode_missing(job, opener(), missing)
    if missing or not (job.folder / INDEX).exists():
        _write_index(job)


def _encode_missing(job: CacheJob, backbone: Backbone, missing: set[str]) -> None:
    if UNCONDITIONAL in missing:
        write_tensors(job.folder / UNCONDITIONAL, _stored(backbone.unconditional(1), job.dtype), job.metadata)
    prompts = list(job.prompts)
    for number, shard in enumerate(job.ranges(len(prompts))):
        if (name := shard_name("prompts", number)) in missing:
            tensors = encode_prompts(prompts[shard.start : shard.stop], backbone, job.dtype)
            write_tensors(job.folder / name, tensors, job.metadata)
        job.report("encoding prompts", shard.stop, len(prompts))
    for number, shard in enumerate(job.ranges(len(job.records))):
        if (name := shard_name("records", number)) in missing:
            tensors, broken = encode_records(job, backbone, shard)
            write_tensors(job.folder / name, tensors, job.metadata | {"broken": json.dumps(broken)})


def encode_prompts(prompts: Sequence[str], backbone: Backbone, dtype: torch.dtype) -> dict[str, Tensor]:
    """Embeddings of prompts as stored: the fields of `Conditioning`, one row per prompt."""
    chunks = [prompts[start : start + PROMPTS_PER_CALL] for start in range(0, len(prompts), PROMPTS_PER_CALL)]
    encoded = [backbone.encode_prompts(list(chunk)).to("cpu") for chunk in chunks]
    return _stored(Conditioning.concat(encoded), dtype)


def encode_records(job: CacheJob, backbone: Backbone, shard: range) -> tuple[dict[str, Tensor], list[Broken]]:
    """The tensors of one shard of records, and the images that were left out.

    Tensors: `records` `[M]`; `prompts` `[M, S]` numbers of the images' prompts; `latents`
    `[M, V, S, 2, C, H, W]` (variant: as it is and, with `data.flip`, mirrored; slot; mean and deviation);
    `time_ids` `[M, V, S, 6]` float32 for families that are told sizes.
    """
    kept: list[int] = []
    broken: list[Broken] = []
    parts: list[dict[str, Tensor]] = []
    for loaded in loaded_pictures(job, shard):
        job.report("encoding images", loaded[-1][0] + 1, len(job.records))
        good = [(index, pictures) for index, pictures, faults in loaded if not faults]
        broken += [fault for _, _, faults in loaded for fault in faults]
        if good:
            kept += [index for index, _ in good]
            parts.append(_encode(backbone, [picture for _, pictures in good for picture in pictures], job))
    prompts = [[job.prompts[prompt] for prompt in job.records.rows[index].prompts] for index in kept]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}
    tensors["records"] = torch.tensor(kept, dtype=torch.int64)
    tensors["prompts"] = torch.tensor(prompts, dtype=torch.int64).reshape(-1, job.records.slots)
    return tensors, broken


def _encode(backbone: Backbone, pictures: Sequence[Picture], job: CacheJob) -> dict[str, Tensor]:
    """Encode pictures ordered by record, variant and slot in one VAE call."""
    variants, slots = 2 if job.config.flip else 1, job.records.slots
    pixels = torch.stack([picture.pixels for picture in pictures]).to(backbone.device)
    mean, std = backbone.encode(pixels)
    latents = torch.stack([mean, std], 1).float().cpu().unflatten(0, (-1, variants, slots))
    tensors = {"latents": _checked(latents, job.dtype, "VAE")}
    sizes = [
        torch.tensor([getattr(p, name) for p in pictures]).float() for name in ("original", "crop", "target")
    ]
    blank = Conditioning(torch.zeros(len(pictures), 1, 1))
    time_ids = backbone.with_sizes(blank, *sizes).time_ids
    if time_ids is not None:
        tensors["time_ids"] = time_ids.float().cpu().unflatten(0, (-1, variants, slots))
    return tensors


Loaded = tuple[int, list[Picture], list[Broken]]


def loaded_pictures(job: CacheJob, shard: range) -> Iterator[list[Loaded]]:
    """Decoded pictures of a shard in batches for the VAE; the next batch is decoded while one is encoded."""
    images = min(IMAGES_PER_CALL, max(1, PIXELS_PER_CALL // job.config.resolution**2))
    step = max(1, images // (job.records.slots * (2 if job.config.flip else 1)))
    ahead: deque[list[Future[Loaded]]] = deque()
    with ThreadPoolExecutor(DECODERS) as pool:
        for start in range(shard.start, shard.stop, step):
            indices = range(start, min(start + step, shard.stop))
            ahead.append([pool.submit(_load, index, job.records[index], job.config) for index in indices])
            if len(ahead) > 1:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]


def _load(index: int, record: Row, config: DataConfig) -> Loaded:
    """The images of a record, cropped at the same place, and mirrored copies after them with `data.flip`."""
    position = crop_position(index, config.crop)
    pictures: list[Picture] = []
    faults: list[Broken] = []
    for number, image in enumerate(record.images):
        try:
            pictures.append(load_picture(image, config.resolution, position, config.max_pixels))
        except BrokenImage as error:
            source = record.source if isinstance(image, bytes) else str(image)
            faults.append({"record": index, "image": number, "source": source, "reason": str(error)})
    if config.flip:
        pictures += [picture.flipped() for picture in pictures]
    return index, pictures, faults


def crop_position(record: int, crop: str) -> tuple[float, float]:
    """Where a record's crop lies (see `load_picture`); a random one is drawn once, since it is cached."""
    if crop == "center":
        return 0.5, 0.5
    top, left = torch.rand(2, generator=generator("crop", record)).tolist()
    return top, left


def _stored(conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Tensor]:
    """A conditioning's tensors as they are written; masks keep their format."""
    tensors = conditioning.to("cpu").tensors()
    return {
        name: (_checked(value, dtype, "text encoder") if value.is_floating_point() else value).clone()
        for name, value in tensors.items()
    }


def _checked(values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Values in the number format of the cache.

    Raises:
        DiffalignError: some are not finite.
    """
    values = values.to(dtype)
    if not values.isfinite().all():
        raise DiffalignError(
            f"the {what} gave numbers that are not finite in {str(dtype).removeprefix('torch.')}. The SDXL "
            "VAE overflows in fp16: set model.vae=madebyollin/sdxl-vae-fp16-fix, or model.precision=bf16 or "
            "fp32."
        )
    return values


def _write_index(job: CacheJob) -> None:
    """Write the index: its presence says that all shards are there."""
    broken: list[Broken] = []
    for number, _ in enumerate(job.ranges(len(job.records))):
        metadata = read_metadata(job.folder / shard_name("records", number), job.key.digest)
        broken += json.loads(metadata["broken"])
    index = {
        "key": job.key.digest,
        "settings": job.key.settings,
        "source": job.records.description,
        "records": len(job.records),
        "unlabelled": job.records.unlabelled,
        "prompts": len(job.prompts),
        "broken": broken,
    }
    write_text(job.folder / INDEX, json.dumps(index, indent=1))
