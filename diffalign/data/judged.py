"""Pairs with everything people said about them: labels by aspect, weights, and who judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffalign.data.pairs import choose_pairs
from diffalign.data.records import TIE, Records
from diffalign.errors import DiffalignError, did_you_mean
from diffalign.randomness import Draw

if TYPE_CHECKING:
    from diffalign.config import DataConfig

OVERALL = "overall"
"""The dimension of a record's own label."""
ANYBODY = -1
"""The user of a record that names none, or one that is not known."""


@dataclass(frozen=True)
class Judgements:
    """Labels of N pairs.

    Fields:
        records: `[N]` index of the record. chosen: `[N]` 0 or 1, the image that is preferred overall.
        preference: `[N, K]` probability that the chosen image is preferred in each dimension; NaN: not judged.
        weight: `[N]` factor on the loss. users: `[N]` index into `names`, `ANYBODY` for others.
        dimensions: K names. names: the known users.
    """

    records: np.ndarray
    chosen: Tensor
    preference: Tensor
    weight: Tensor
    users: Tensor
    dimensions: tuple[str, ...]
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def keep(self, usable: np.ndarray) -> Judgements:
        """Only pairs of usable records; `usable` `[R]` is over all records."""
        mask = usable[self.records]
        rows = torch.from_numpy(mask)
        return replace(
            self,
            records=self.records[mask],
            chosen=self.chosen[rows],
            preference=self.preference[rows],
            weight=self.weight[rows],
            users=self.users[rows],
        )


@dataclass(frozen=True)
class JudgedBatch:
    """Pairs for a reward model; of the two images of a pair the chosen one comes first.

    Fields:
        images: `[B, 2, D]` embeddings, or `[B, 2, 3, H, W]` pictures in [0, 1]. texts: `[B, 2, D]` embeddings, or None.
        prompts: the captions of both images of each pair, 2 B of them, where there are pictures.
        preference: `[B, K]`, NaN where not judged. weight, users: `[B]`. draw: which pairs these are.
    """

    images: Tensor
    texts: Tensor | None
    prompts: Sequence[str]
    preference: Tensor
    weight: Tensor
    users: Tensor
    draw: Draw

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> JudgedBatch:
        """The same batch on a device."""
        return replace(
            self,
            images=self.images.to(device),
            texts=None if self.texts is None else self.texts.to(device),
            preference=self.preference.to(device),
            weight=self.weight.to(device),
            users=self.users.to(device),
        )


def judgements(
    records: Records,
    config: DataConfig,
    dimensions: Sequence[str] = (OVERALL,),
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Judgements:
    """Orient every record by its overall label, and read its other labels and its user.

    Args:
        config: ties and label controls, as for `choose_pairs`.
        dimensions: `overall`, or names of `labels`.
        names: the known users; None: all users of these records.

    Raises:
        DiffalignError: all records are ties and ties are dropped, or nobody judged one of the dimensions.
    """
    pairs = choose_pairs(records, config.labels, config.ties, seed, config.flipped)
    rows = [records.rows[record] for record in pairs.records]
    _check_dimensions(records, dimensions)
    if names is None:
        names = sorted({row.user for row in rows if row.user is not None})
    index = {name: number for number, name in enumerate(names)}
    first = np.asarray([row.label_0 for row in rows], np.float32)
    given = np.where(pairs.chosen == 0, first, 1 - first)
    # Where a control reversed the overall label, the other labels are reversed too.
    reverse = ~np.isclose(given, pairs.preference) & (first != TIE)
    columns = [_column(rows, name, pairs.chosen, reverse) for name in dimensions]
    overall = [
        pairs.preference if name == OVERALL else c for name, c in zip(dimensions, columns, strict=True)
    ]
    return Judgements(
        pairs.records,
        torch.from_numpy(pairs.chosen),
        torch.from_numpy(np.stack(overall, 1).astype(np.float32)),
        torch.from_numpy(pairs.weight),
        torch.tensor([index.get(row.user, ANYBODY) if row.user else ANYBODY for row in rows]),
        tuple(dimensions),
        tuple(names),
    )


def of_slot(values: Tensor, slot: Tensor) -> Tensor:
    """Values `[B, 2, ...]` with the image `slot` `[B]` first."""
    rows = torch.arange(len(slot))[:, None]
    return values[rows, torch.stack([slot, 1 - slot], 1)]


def _column(rows: Sequence, name: str, chosen: np.ndarray, reverse: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Probability `[N]` that the chosen image is preferred in a dimension, NaN where nobody judged it."""
    first = np.asarray([row.labels.get(name, np.nan) for row in rows], np.float32)
    oriented = np.where(chosen == 0, first, 1 - first)
    return np.where(reverse, 1 - oriented, oriented)


def _check_dimensions(records: Records, dimensions: Sequence[str]) -> None:
    known = {OVERALL, *(name for row in records.rows for name in row.labels)}
    for name in dimensions:
        if name not in known:
            raise DiffalignError(
                f"no record of {records.description} has a label for dimension {name!r}; it has: "
                f"{', '.join(sorted(known))}.{did_you_mean(name, sorted(known))} Give `labels` in JSONL, or "
                "change trainer.dimensions."
            )
