"""Which pictures are trained on, and what each one is worth: labels, scores, places in groups, and the controls."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from diffalign.data.pairs import choose_pairs, label_noise
from diffalign.data.pictures import PictureRecords
from diffalign.data.records import Records
from diffalign.errors import DiffalignError
from diffalign.randomness import generator


@dataclass(frozen=True)
class Pictures:
    """The trained pictures, one entry each.

    Fields:
        records, slots: `[N]` which image of which record.
        label: `[N]` probability that the picture is desirable. score, rank: `[N]` reward, and place in the group
            from 1. NaN: not known.
        group: `[N]` number of the group the picture was compared in. weight: `[N]` factor on the loss.
    """

    records: np.ndarray
    slots: np.ndarray
    label: np.ndarray
    score: np.ndarray
    rank: np.ndarray
    group: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.records)

    def keep(self, rows: np.ndarray) -> Pictures:
        """The entries `rows`: a mask `[N]` or indices."""
        return Pictures(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def pictures_of(
    records: PictureRecords, labels: str = "given", seed: int = 0, flipped: float = 0.0
) -> Pictures:
    """One entry per picture.

    Args:
        labels: `given`; `swapped` (the worst becomes the best) or `random` (judgements are dealt out anew, from `seed`,
            inside each group, or among all pictures when no group holds two).
        flipped: share of the labels (not scores and ranks) that is reversed, each by a coin from `seed`: label noise.
    """
    rows = records.rows
    numbers: dict[str, int] = {}
    columns = {
        name: np.asarray(
            [np.nan if v is None else v for v in (getattr(row, name) for row in rows)], np.float64
        )
        for name in ("label", "score", "rank")
    }
    wrong = label_noise(len(rows), flipped, seed)
    columns["label"] = np.where(wrong, 1 - columns["label"], columns["label"])
    pictures = Pictures(
        np.arange(len(rows)),
        np.zeros(len(rows), np.int64),
        group=np.asarray([numbers.setdefault(row.group_name, len(numbers)) for row in rows], np.int64),
        weight=np.asarray([row.weight for row in rows], np.float32),
        **columns,
    )
    if labels == "swapped":
        return _swapped(pictures)
    return _shuffled(pictures, seed) if labels == "random" else pictures


def pictures_of_pairs(
    records: Records, labels: str = "given", ties: str = "drop", seed: int = 0, flipped: float = 0.0
) -> Pictures:
    """Pairs taken apart: of each pair the chosen picture, then the rejected one, as a group of two.

    With preference p the chosen picture is desirable with probability p and the other one with 1 - p; the same numbers
    are their scores.

    Raises:
        DiffalignError: all records are ties and ties are dropped.
    """
    pairs = choose_pairs(records, labels, ties, seed, flipped)
    both = np.stack([pairs.preference, 1 - pairs.preference], 1).reshape(-1).astype(np.float64)
    return Pictures(
        np.repeat(pairs.records, 2),
        np.stack([pairs.chosen, 1 - pairs.chosen], 1).reshape(-1),
        label=both,
        score=both.copy(),
        rank=np.full(len(both), np.nan),
        group=np.repeat(np.arange(len(pairs)), 2),
        weight=np.repeat(pairs.weight, 2),
    )


@dataclass(frozen=True)
class Groups:
    """The trained groups of N pictures.

    Fields:
        pictures: their entries, group after group. starts: `[G + 1]` first entry of each group, and N.
        value: `[N]` in [0, 1], 1 for the best picture of its group. weight: `[G]` mean weight of the group's pictures.
        size: pictures of a group that one step sees. left_out: groups that are too small, not fully judged, or
            all tied.
    """

    pictures: Pictures
    starts: np.ndarray
    value: np.ndarray
    weight: np.ndarray
    size: int
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.starts) - 1


def make_groups(pictures: Pictures, size: int | None = None, source: str = "the data") -> Groups:
    """Groups of at least `size` pictures that can be ordered; None: the most frequent size.

    Values come from ranks where all pictures of the group have one, else from scores, each stretched to [0, 1] inside
    the group, else from labels as they are. Groups whose values are all equal say nothing and are left out.

    Raises:
        DiffalignError: no group is left.
    """
    members = _members(pictures.group)
    valued = [(rows, group_values(pictures, rows)) for rows in members if len(rows) > 1]
    usable = [(rows, value) for rows, value in valued if value is not None and value.min() < value.max()]
    if size is None and usable:
        sizes, counts = np.unique([len(rows) for rows, _ in usable], return_counts=True)
        size = int(sizes[counts.argmax()])
    kept = [(rows, value) for rows, value in usable if len(rows) >= (size or 2)]
    if not kept:
        raise DiffalignError(
            f"{source}: none of {len(members)} groups has at least {size or 2} pictures with different ranks, scores "
            "or labels. Pictures of a group share `group`, or their prompt; give them `rank` or `score`, or set a "
            "smaller trainer.group_size."
        )
    rows = np.concatenate([rows for rows, _ in kept])
    return Groups(
        pictures.keep(rows),
        np.cumsum([0, *(len(rows) for rows, _ in kept)]),
        np.concatenate([value for _, value in kept]).astype(np.float32),
        np.asarray([pictures.weight[rows].mean() for rows, _ in kept], np.float32),
        size or 2,
        len(members) - len(kept),
    )


def group_values(pictures: Pictures, rows: np.ndarray) -> np.ndarray | None:
    """Values `[K]` in [0, 1] of one group's pictures, 1 for the best; None when they are not all judged alike."""
    for known in (-pictures.rank[rows], pictures.score[rows]):
        if not np.isnan(known).any():
            return stretched(known)
    label = pictures.label[rows]
    return None if np.isnan(label).any() else label


def stretched(values: np.ndarray) -> np.ndarray:
    """Values moved and scaled to [0, 1]; 0.5 where all are equal."""
    low, high = values.min(), values.max()
    return np.full(len(values), 0.5) if low == high else (values - low) / (high - low)


def _members(group: np.ndarray) -> list[np.ndarray]:
    """Rows of each group, groups by number, rows in order."""
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(order) else []


def _swapped(pictures: Pictures) -> Pictures:
    """Every judgement reversed; ranks stay places from 1."""
    rank = pictures.rank.copy()
    for rows in _members(pictures.group):
        rank[rows] = np.nanmax(rank[rows], initial=1.0) + 1 - rank[rows]
    return replace(pictures, label=1 - pictures.label, score=-pictures.score, rank=rank)


def _shuffled(pictures: Pictures, seed: int) -> Pictures:
    """Judgements dealt out anew inside each group; among all pictures when no group holds two."""
    members = _members(pictures.group)
    if len(members) == len(pictures):
        members = [np.arange(len(pictures))]
    order = np.arange(len(pictures))
    for number, rows in enumerate(members):
        order[rows] = rows[torch.randperm(len(rows), generator=generator(seed, "labels", number)).numpy()]
    return replace(
        pictures, label=pictures.label[order], score=pictures.score[order], rank=pictures.rank[order]
    )
