"""Stored reference errors: K fixed draws of (time, noise) per pair, evaluated once by the reference.

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

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.data.cache import PairCache
from diffalign.data.shards import is_complete, read_tensors, write_tensors
from diffalign.elbo import NoisedPairs, reference_errors
from diffalign.errors import DiffalignError
from diffalign.randomness import Draw, derive_seed

BATCH = 32
WAIT_SECONDS = 24 * 3600.0
POLL_SECONDS = 0.5
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as a number format, to read its bit patterns."""

Noised = Callable[[Draw], NoisedPairs]
"""Fetches the pairs of a draw and noises them."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""


def silent(label: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class FixedDraws:
    """Pairs that are measured again and again at the draws (`seed`, 0) to (`seed`, `draws` - 1)."""

    cache: PairCache
    seed: int
    draws: int


@dataclass(frozen=True)
class ReferenceErrors:
    """Errors `[K, N, 2]` (draw, record, chosen and rejected) and the seed that the draws come from."""

    errors: Tensor
    seed: int

    @classmethod
    def build(
        cls,
        backbone: Backbone,
        pairs: FixedDraws,
        noised: Noised,
        *,
        noising: Sequence[object] = (),
        folder: Path | None = None,
        builder: bool = True,
        progress: Progress = silent,
    ) -> ReferenceErrors:
        """Evaluate the reference on all draws of every pair, or read what an earlier run left in `folder`.

        Must be called before the first training step: under full fine-tuning the network itself is the reference
        until then. A process that is not the `builder` waits for the files.

        Args:
            noised: makes the noised pairs of a draw. noising: the options it follows, as part of the key.

        Raises:
            DiffalignError: a full disk, or waiting for a file took more than a day.
        """
        key = reference_key(backbone, pairs, noising) if folder else ""
        rows = []
        for k in range(pairs.draws):
            path = folder / f"{key}-{k:03d}.safetensors" if folder else None
            if path and not builder:
                _wait_for(path, key)
            if path and is_complete(path, key):
                rows.append(read_tensors(path)["errors"])
            else:
                rows.append(_one_draw(backbone, pairs, noised, k))
                if path:
                    write_tensors(path, {"errors": rows[-1]}, {"key": key})
            progress("reference errors", k + 1, pairs.draws)
        return cls(torch.stack(rows), pairs.seed)

    def remap(self, draw: Draw) -> Draw:
        """The stored draw that stands for a training draw: which of the K is decided by the step.

        Stratification is over the whole data set, so that a record's time does not depend on its batch.
        """
        k = derive_seed(draw.seed, "which stored draw", draw.step) % len(self.errors)
        return replace(
            draw, seed=self.seed, step=k, positions=draw.records, global_batch=self.errors.shape[1]
        )

    def lookup(self, draw: Draw) -> Tensor:
        """Reference errors `[2B]` of a stored draw, chosen rows first.

        Raises:
            ValueError: the draw is not one of the stored ones.
        """
        if draw.seed != self.seed or draw.step >= len(self.errors):
            raise ValueError(
                f"draw {draw.step} of seed {draw.seed} is not stored; there are {len(self.errors)} draws of seed "
                f"{self.seed}"
            )
        rows = self.errors[draw.step, torch.as_tensor(list(draw.records))]
        return rows.T.reshape(-1)


def reference_key(backbone: Backbone, pairs: FixedDraws, noising: Sequence[object] = ()) -> str:
    """Hash of what stored errors depend on: encoded pairs and their order, network, process, precision, seed.

    Not of the number of draws: each draw is stored by itself.
    """
    process, cache = backbone.process, pairs.cache
    tables = [b"" if t is None else t.numpy().tobytes() for t in (process.alphas_cumprod, process.grid)]
    network = (str(backbone.dtype), process.prediction, process.time_scale, frozen_fingerprint(backbone))
    told = backbone.config.guidance_embedding
    facts = (cache.key, cache.mode, pairs.seed, told, *network, *noising)
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    for part in (cache.pairs.records.tobytes(), cache.pairs.chosen.tobytes(), *tables):
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


def _one_draw(backbone: Backbone, pairs: FixedDraws, noised: Noised, k: int) -> Tensor:
    """Reference errors `[N, 2]` of draw k for every record."""
    parts, size = [], len(pairs.cache)
    for start in range(0, size, BATCH):
        records = list(range(start, min(start + BATCH, size)))
        errors = reference_errors(backbone, noised(Draw(pairs.seed, k, records, records, size)))
        parts.append(errors.cpu().reshape(2, -1).T)
    return torch.cat(parts).contiguous()


def _wait_for(path: Path, key: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_complete(path, key):
        if time.monotonic() > deadline:
            raise DiffalignError(f"waited a day for {path}, which the first process should have written")
        time.sleep(POLL_SECONDS)
