"""Stored reference errors: K fixed draws of (time, noise) per pair or group, evaluated once by the reference.

Training then only ever uses those draws, and the reference needs no forward and no memory. Each draw is a file
of its own, named by a hash of all that its errors depend on: a file made from other pairs or by another network
is never read, an interrupted computation continues, and more draws keep the ones there are.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.data.cache import PairCache
from diffalign.data.picture_cache import GroupCache
from diffalign.data.shards import is_complete, read_tensors, write_tensors
from diffalign.errors import DiffalignError
from diffalign.randomness import Draw, derive_seed

PICTURES = 64
"""Pictures that the reference sees at once."""
WAIT_SECONDS = 24 * 3600.0
POLL_SECONDS = 0.5
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as a number format, to read its bit patterns."""

Cache = TypeVar("Cache", PairCache, GroupCache)
Measured = Callable[[Draw], Tensor]
"""The reference's errors `[B, S]` of the records of a draw, S pictures each (of pairs the chosen one first)."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""


def silent(label: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class FixedDraws(Generic[Cache]):
    """Pairs or groups that are measured again and again at the draws (`seed`, 0) to (`seed`, `draws` - 1)."""

    cache: Cache
    seed: int
    draws: int


@dataclass(frozen=True)
class ReferenceErrors:
    """Errors `[K, N, S]` (draw, record, picture of it) and the seed that the draws come from.

    The pictures of a pair are chosen and rejected, those of a group as the cache fetches them for the draw.
    """

    errors: Tensor
    seed: int

    @classmethod
    def build(
        cls,
        backbone: Backbone,
        fixed: FixedDraws[Any],
        measured: Measured,
        *,
        noising: Sequence[object] = (),
        folder: Path | None = None,
        builder: bool = True,
        progress: Progress = silent,
    ) -> ReferenceErrors:
        """Evaluate the reference on all draws of every record, or read what an earlier run left in `folder`.

        Must be called before the first training step: under full fine-tuning the network itself is the reference
        until then. A process that is not the `builder` waits for the files.

        Args:
            measured: asks the reference. noising: the options by which records are noised, as part of the key.

        Raises:
            DiffalignError: a full disk, or waiting for a file took more than a day.
        """
        key = reference_key(backbone, fixed, noising) if folder else ""
        rows = []
        for k in range(fixed.draws):
            path = folder / f"{key}-{k:03d}.safetensors" if folder else None
            if path and not builder:
                _wait_for(path, key)
            if path and is_complete(path, key):
                rows.append(read_tensors(path)["errors"])
            else:
                rows.append(_one_draw(fixed, measured, k))
                if path:
                    write_tensors(path, {"errors": rows[-1]}, {"key": key})
            progress("reference errors", k + 1, fixed.draws)
        return cls(torch.stack(rows), fixed.seed)

    def remap(self, draw: Draw) -> Draw:
        """The stored draw that stands for a training draw: which of the K is decided by the step.

        Stratification is over the whole data set, so that a record's time does not depend on its batch.
        """
        k = derive_seed(draw.seed, "which stored draw", draw.step) % len(self.errors)
        return replace(
            draw, seed=self.seed, step=k, positions=draw.records, global_batch=self.errors.shape[1]
        )

    def lookup(self, draw: Draw) -> Tensor:
        """Reference errors `[B, S]` of a stored draw.

        Raises:
            ValueError: the draw is not one of the stored ones.
        """
        if draw.seed != self.seed or draw.step >= len(self.errors):
            raise ValueError(
                f"draw {draw.step} of seed {draw.seed} is not stored; there are {len(self.errors)} draws of seed "
                f"{self.seed}"
            )
        return self.errors[draw.step, torch.as_tensor(list(draw.records))]


def reference_key(backbone: Backbone, fixed: FixedDraws[Any], noising: Sequence[object] = ()) -> str:
    """Hash of what stored errors depend on: encoded pictures and their order, network, process, precision, seed.

    Not of the number of draws: each draw is stored by itself.
    """
    process, cache = backbone.process, fixed.cache
    tables = [b"" if t is None else t.numpy().tobytes() for t in (process.alphas_cumprod, process.grid)]
    network = (str(backbone.dtype), process.prediction, process.time_scale, frozen_fingerprint(backbone))
    told = backbone.config.guidance_embedding
    facts = (cache.key, cache.mode, fixed.seed, told, *network, *noising)
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    for part in (*(places.tobytes() for places in cache.places), *tables):
        digest.update(hashlib.blake2b(part).digest())
    return digest.hexdigest()


def frozen_fingerprint(backbone: Backbone) -> str:
    """Hash of the reference's weights: all but the adapters; all of them before full fine-tuning starts.

    Built from position-weighted sums of the weights' bit patterns. They are exact integers, so that processes
    on different devices agree, and cost one pass without copying the network off its device.
    """
    full = backbone.config.tune == "full"
    trained = {name for name, value in backbone.core.named_parameters() if value.requires_grad}
    digest = hashlib.blake2b(digest_size=16)
    # The state, unlike the parameters, holds the scales of weights in four bits.
    for name, value in sorted(backbone.core.state_dict().items()):
        if full or name not in trained:
            bits = value.detach().reshape(-1).view(BITS[value.element_size()]).long()
            total = (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum().item()
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}{total}".encode())
    return digest.hexdigest()


def _one_draw(fixed: FixedDraws[Any], measured: Measured, k: int) -> Tensor:
    """Reference errors `[N, S]` of draw k for every record."""
    parts, size = [], len(fixed.cache)
    rows = max(1, PICTURES // fixed.cache.slots)
    for start in range(0, size, rows):
        records = list(range(start, min(start + rows, size)))
        parts.append(measured(Draw(fixed.seed, k, records, records, size)).cpu())
    return torch.cat(parts).contiguous()


def _wait_for(path: Path, key: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_complete(path, key):
        if time.monotonic() > deadline:
            raise DiffalignError(f"waited a day for {path}, which the first process should have written")
        time.sleep(POLL_SECONDS)
