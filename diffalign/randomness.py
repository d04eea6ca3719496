"""Random draws that belong to a record and a step, not to a global stream.

A record's noise and time depend on (run seed, step, record) only, so results do not change with the number
of processes, the batch split, or an interruption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed from a tuple of keys, stable across machines and Python versions."""
    digest = hashlib.blake2b("/".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*keys: int | str) -> torch.Generator:
    """A CPU generator seeded from keys."""
    return torch.Generator("cpu").manual_seed(derive_seed(*keys))


@dataclass(frozen=True)
class Draw:
    """Which records a (micro-)batch holds and where it stands in the run.

    Fields:
        seed: run seed. step: cumulative optimiser step, from 0.
        records: record index of each row. positions: place of each row in the global batch of the step.
        global_batch: rows over all processes and accumulation steps.
    """

    seed: int
    step: int
    records: Sequence[int]
    positions: Sequence[int]
    global_batch: int

    def __len__(self) -> int:
        return len(self.records)

    def slice(self, start: int, stop: int) -> Draw:
        """The rows start..stop as a draw of their own."""
        return Draw(
            self.seed, self.step, self.records[start:stop], self.positions[start:stop], self.global_batch
        )

    def normal(self, shape: Sequence[int], *keys: int | str) -> Tensor:
        """Standard normal noise `[B, *shape]`, one generator per row; `keys` name the use."""
        rows = [
            torch.randn(*shape, generator=generator(self.seed, self.step, record, *keys))
            for record in self.records
        ]
        return torch.stack(rows)

    def uniform(self, *keys: int | str, stratified: bool = False) -> Tensor:
        """Uniform draws in [0, 1) `[B]`.

        Stratified: the global batch covers [0, 1) evenly, one stratum per row in an order drawn per step, so the
        draw of a row does not depend on how the batch was split.
        """
        rows = [
            torch.rand((), generator=generator(self.seed, self.step, record, "u", *keys))
            for record in self.records
        ]
        values = torch.stack(rows)
        if not stratified:
            return values
        order = torch.randperm(self.global_batch, generator=generator(self.seed, self.step, "strata", *keys))
        strata = order[torch.as_tensor(list(self.positions))]
        return ((strata + values) / self.global_batch).clamp(max=1 - 1e-7)


def batch_records(seed: int, step: int, global_batch: int, size: int) -> list[int]:
    """Record indices of a step's global batch: consecutive slices of seeded epoch permutations of `size` records."""
    start = step * global_batch
    records: list[int] = []
    while len(records) < global_batch:
        epoch, offset = divmod(start + len(records), size)
        order = torch.randperm(size, generator=generator(seed, "epoch", epoch))
        records += order[offset : offset + global_batch - len(records)].tolist()
    return records
