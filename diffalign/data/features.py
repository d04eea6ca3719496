"""Judged pairs as a reward model needs them: embeddings of a frozen CLIP, or small pictures for a trained one.

Both are made once and kept beside the latent caches, in `data.cache_dir/KEY`, as safetensors shards. KEY hashes the
model, the records and the picture preparation; labels, ties and users are applied when pairs are fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from diffalign.data.encode import Broken, CacheJob, loaded_pictures, shard_name
from diffalign.data.judged import JudgedBatch, Judgements, of_slot
from diffalign.data.keys import Progress, cache_key, records_digest
from diffalign.data.records import PreferenceRecord, as_records
from diffalign.data.shards import (
    is_complete,
    read_metadata,
    read_tensors,
    remove_stale_partials,
    write_tensors,
)
from diffalign.data.store import wait_for
from diffalign.errors import DiffalignError
from diffalign.randomness import Draw

if TYPE_CHECKING:
    from diffalign.config import DataConfig

SCALE = "scale.safetensors"
PROMPTS_PER_CALL = 64
PICTURES = "pictures"
"""The model of a cache that keeps pictures instead of embeddings."""


class Embedder(Protocol):
    """What embeds pictures and prompts; a `ClipModel` is one."""

    logit_scale: Any

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors `[B, D]` of pictures `[B, 3, H, W]` in [0, 1]."""

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors `[B, D]`."""


@dataclass(frozen=True)
class Store:
    """The images of R records as a model takes them.

    Fields:
        folder: where they lie. broken: images that were left out. usable: `[R]`. prompts: `[R, 2]` numbers of captions.
        captions: the distinct captions. texts: their embeddings `[P, D]`, None for pictures.
        images: per shard `[M, 2, ...]`. places: `[R, 2]` shard and row of each usable record.
        logit_scale: the CLIP's (its logarithm), 0 for pictures.
    """

    folder: Path
    broken: list[Broken]
    usable: np.ndarray
    prompts: Tensor
    captions: tuple[str, ...]
    texts: Tensor | None
    images: list[Tensor]
    places: np.ndarray
    logit_scale: float

    @property
    def width(self) -> int:
        """Size of the embeddings; 0 for pictures."""
        return 0 if self.texts is None else int(self.texts.shape[-1])

    def of(self, records: np.ndarray) -> Tensor:
        """The two images of each record `[B, 2, ...]`, pictures as numbers in [0, 1]."""
        rows = torch.stack([self.images[shard][row] for shard, row in self.places[records]])
        return rows.float() / 255 if rows.dtype == torch.uint8 else rows


class JudgedPairs:
    """Training or held-out pairs, fetched by index.

    Attributes:
        judgements: their labels. folder, broken: of the store.
    """

    unit: ClassVar[str] = "pairs"

    def __init__(self, store: Store, judgements: Judgements) -> None:
        self.store, self.judgements = store, judgements.keep(store.usable)
        self.folder, self.broken = store.folder, store.broken
        if len(self) == 0:
            reasons = "; ".join(
                f"record {b['record']} ({b['source']}): {b['reason']}" for b in store.broken[:3]
            )
            raise DiffalignError(
                f"no usable pair is left: {len(store.broken)} images are broken or missing. First reasons: {reasons}. "
                "Run `diffalign data validate` on the source, and check image paths."
            )

    def __len__(self) -> int:
        return len(self.judgements)

    def fetch(self, draw: Draw) -> JudgedBatch:
        """The pairs of a draw, on the CPU, the chosen image first."""
        judged, index = self.judgements, torch.as_tensor(list(draw.records))
        records, chosen = judged.records[index.numpy()], judged.chosen[index]
        prompts = of_slot(self.store.prompts[torch.from_numpy(records)], chosen)
        texts = None if self.store.texts is None else self.store.texts[prompts]
        captions = [] if texts is not None else [self.store.captions[i] for i in prompts.flatten().tolist()]
        return JudgedBatch(
            images=of_slot(self.store.of(records), chosen),
            texts=texts,
            prompts=captions,
            preference=judged.preference[index],
            weight=judged.weight[index],
            users=judged.users[index],
            draw=draw,
        )


def open_store(
    records: Sequence[PreferenceRecord],
    config: DataConfig,
    model: str = PICTURES,
    opener: Callable[[], Embedder] | None = None,
    progress: Progress | None = None,
    builder: bool = True,
    timeout: float = 24 * 3600,
) -> Store:
    """Open the store of these records, filling it first where it is incomplete; an interrupted run continues.

    Args:
        config: picture preparation and cache folder.
        model: identity of the CLIP. opener: loads it; called at most once, and only when something is missing.
            Without it, pictures are kept.
        progress: called with what is being done, how much is done, and how much there is.
        builder: whether this process fills the store; others wait for its files, `timeout` seconds at most.

    Raises:
        DiffalignError: the disk is full, the model gives non-finite numbers, or waiting took too long.
    """
    records = as_records(records)
    cache_dir = Path(config.cache_dir)
    plain = config.model_copy(update={"flip": False})
    digest = records_digest(records, cache_dir, progress)
    key = cache_key(plain, f"embeddings of {model}", "fp32", digest, len(records))
    job = CacheJob(cache_dir / key.digest, records, plain, key, torch.float32, progress)
    names = _names(job, texts=opener is not None)
    missing = partial(_missing, job, names)
    if not builder:
        wait_for(lambda: not missing(), job.folder, timeout)
    elif missing():
        remove_stale_partials(job.folder)
        with torch.no_grad():
            _fill(job, missing(), None if opener is None else opener())
    return _read(job, texts=opener is not None)


def _names(job: CacheJob, texts: bool) -> list[str]:
    counts = {"images": len(job.records), **({"texts": len(job.prompts)} if texts else {})}
    names = [shard_name(kind, i) for kind, count in counts.items() for i, _ in enumerate(job.ranges(count))]
    return [SCALE, *names] if texts else names


def _missing(job: CacheJob, names: Sequence[str]) -> set[str]:
    return {name for name in names if not is_complete(job.folder / name, job.key.digest)}


def _fill(job: CacheJob, missing: set[str], model: Embedder | None) -> None:
    prompts = list(job.prompts)
    for number, shard in enumerate(job.ranges(len(prompts)) if model else []):
        if (name := shard_name("texts", number)) in missing:
            texts = _embed_texts(prompts[shard.start : shard.stop], model)
            write_tensors(job.folder / name, {"texts": texts}, job.metadata)
        job.report("embedding prompts", shard.stop, len(prompts))
    for number, shard in enumerate(job.ranges(len(job.records))):
        if (name := shard_name("images", number)) in missing:
            tensors, broken = _embed_images(job, shard, model)
            write_tensors(job.folder / name, tensors, job.metadata | {"broken": json.dumps(broken)})
    if model and SCALE in missing:
        scale = torch.as_tensor(model.logit_scale).detach().float().cpu().reshape(1)
        write_tensors(job.folder / SCALE, {"logit_scale": scale}, job.metadata)


def _embed_texts(prompts: Sequence[str], model: Any) -> Tensor:
    chunks = [prompts[start : start + PROMPTS_PER_CALL] for start in range(0, len(prompts), PROMPTS_PER_CALL)]
    return _checked(torch.cat([model.embed_texts(chunk).float().cpu() for chunk in chunks]), "text")


def _embed_images(
    job: CacheJob, shard: range, model: Embedder | None
) -> tuple[dict[str, Tensor], list[Broken]]:
    """`records` `[M]` and `images` `[M, 2, ...]` of a shard, and what was left out."""
    kept: list[int] = []
    broken: list[Broken] = []
    parts: list[Tensor] = []
    for loaded in loaded_pictures(job, shard):
        job.report("embedding images" if model else "preparing images", loaded[-1][0] + 1, len(job.records))
        broken += [fault for _, _, faults in loaded for fault in faults]
        good = [(index, pictures) for index, pictures, faults in loaded if not faults]
        if good:
            kept += [index for index, _ in good]
            pixels = torch.stack([picture.pixels for _, pictures in good for picture in pictures])
            parts.append(_stored(pixels / 2 + 0.5, model).unflatten(0, (-1, 2)))
    images = torch.cat(parts) if parts else torch.zeros(0, 2, 1)
    return {"records": torch.tensor(kept, dtype=torch.int64), "images": images}, broken


def _stored(pixels: Tensor, model: Embedder | None) -> Tensor:
    """Embeddings of pictures in [0, 1], or the pictures as bytes, which is what decoded files hold."""
    if model is None:
        return (pixels * 255).round().clamp(0, 255).byte()
    return _checked(model.embed_images(pixels).float().cpu(), "image")


def _read(job: CacheJob, texts: bool) -> Store:
    images: list[Tensor] = []
    broken: list[Broken] = []
    usable = np.zeros(len(job.records), bool)
    places = np.zeros((len(job.records), 2), np.int64)
    for number, _ in enumerate(job.ranges(len(job.records))):
        path = job.folder / shard_name("images", number)
        tensors = read_tensors(path)
        kept = tensors["records"].numpy()
        usable[kept] = True
        places[kept] = np.stack([np.full(len(kept), number), np.arange(len(kept))], 1)
        images.append(tensors["images"])
        broken += json.loads(read_metadata(path, job.key.digest)["broken"])
    prompts = [[job.prompts[prompt] for prompt in row.prompts] for row in job.records.rows]
    names = [shard_name("texts", i) for i, _ in enumerate(job.ranges(len(job.prompts)))]
    return Store(
        job.folder,
        broken,
        usable,
        torch.tensor(prompts, dtype=torch.int64).reshape(-1, 2),
        tuple(job.prompts),
        torch.cat([read_tensors(job.folder / name)["texts"] for name in names]) if texts else None,
        images,
        places,
        float(read_tensors(job.folder / SCALE)["logit_scale"]) if texts else 0.0,
    )


def _checked(embeddings: Tensor, what: str) -> Tensor:
    if not embeddings.isfinite().all():
        raise DiffalignError(
            f"the CLIP gave {what} embeddings that are not finite; its weights are broken or overflow in its precision"
        )
    return embeddings
