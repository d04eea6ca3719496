"""Cached single pictures and ranked groups: encoded records (`store.py`) with judgements applied, fetched by index.

The records may be pictures or pairs: pairs that are taken apart use the same encoded images as `PairCache`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diffalign.conditioning import Conditioning
from diffalign.data.batch import GroupBatch, UnpairedBatch
from diffalign.data.picture_labels import Groups, Pictures, make_groups
from diffalign.data.store import EncodedRecords, Gathered
from diffalign.errors import DiffalignError
from diffalign.randomness import Draw, generator


class PictureCache:
    """Encoded single pictures, fetched by index.

    Attributes:
        store: the encoded images; folder, key, broken, mode: its own. pictures: what is trained on, in order.

    Raises:
        DiffalignError: no usable picture is left.
    """

    unit: ClassVar[str] = "pictures"

    def __init__(self, store: EncodedRecords, pictures: Pictures) -> None:
        self.store = store
        self.folder, self.key, self.broken, self.mode = store.folder, store.key, store.broken, store.mode
        self.pictures = usable(store, pictures)
        self._label = torch.from_numpy(np.nan_to_num(self.pictures.label, nan=0.5)).float()
        self._weight = torch.from_numpy(self.pictures.weight)

    def __len__(self) -> int:
        return len(self.pictures)

    def fetch(self, draw: Draw) -> UnpairedBatch:
        """The pictures of a draw, on the CPU. Posterior noise and flips depend on (seed, step, record) only."""
        index = torch.as_tensor(list(draw.records))
        found = gathered(self.store, self.pictures, draw, index[:, None].numpy())
        return UnpairedBatch(
            found.latents[:, 0],
            conditioning(self.store, found),
            self._label[index],
            self._weight[index],
            draw,
        )

    def unconditional(self, count: int) -> Conditioning:
        """The conditioning of no prompt, `count` rows, as the model's pipeline does it; without time ids."""
        return self.store.unconditional(count)


class GroupCache:
    """Encoded groups of pictures, fetched by index; of larger groups another sample at each step.

    Attributes:
        store: the encoded images; folder, key, broken, mode: its own. groups: what is trained on, in order.

    Raises:
        DiffalignError: no usable picture, or no group of that size, is left.
    """

    unit: ClassVar[str] = "groups"

    def __init__(self, store: EncodedRecords, pictures: Pictures, size: int | None = None) -> None:
        self.store = store
        self.folder, self.key, self.broken, self.mode = store.folder, store.key, store.broken, store.mode
        self.groups: Groups = make_groups(usable(store, pictures), size, store.source)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def slots(self) -> int:
        """Pictures of a group that are fetched."""
        return self.groups.size

    @property
    def places(self) -> tuple[np.ndarray, ...]:
        """Which encoded images are fetched as what: equal places of one store are the same pictures in one order."""
        groups = self.groups
        return groups.pictures.records, groups.pictures.slots, groups.starts, np.array([groups.size])

    def fetch(self, draw: Draw) -> GroupBatch:
        """The groups of a draw, on the CPU, their pictures in an order drawn by (seed, step, record)."""
        groups = self.groups
        members = np.stack([self._members(draw, record) for record in draw.records])
        found = gathered(self.store, groups.pictures, draw, members)
        return GroupBatch(
            found.latents,
            conditioning(self.store, found),
            torch.from_numpy(groups.value[members]),
            torch.from_numpy(groups.weight[list(draw.records)]),
            draw,
        )

    def unconditional(self, count: int) -> Conditioning:
        """The conditioning of no prompt, `count` rows, as the model's pipeline does it; without time ids."""
        return self.store.unconditional(count)

    def _members(self, draw: Draw, group: int) -> np.ndarray:
        """Entries `[K]` of one group: a random sample in random order, so that ties have no fixed order either."""
        start, stop = self.groups.starts[group : group + 2]
        order = torch.randperm(int(stop - start), generator=generator(draw.seed, draw.step, group, "members"))
        members: np.ndarray = start + order[: self.groups.size].numpy()
        return members


def usable(store: EncodedRecords, pictures: Pictures) -> Pictures:
    """The pictures whose images could be encoded.

    Raises:
        DiffalignError: none is left.
    """
    kept = pictures.keep(store.usable[pictures.records])
    if len(kept) == 0:
        raise DiffalignError(
            f"no usable picture is left of {len(store)} in {store.source}: {len(store.broken)} images are broken or "
            f"missing. First reasons: {store.faults()}. Check image paths."
        )
    return kept


def gathered(store: EncodedRecords, pictures: Pictures, draw: Draw, entries: np.ndarray) -> Gathered:
    """The encoded images of `entries` `[B, K]`."""
    return store.gather(
        draw, torch.from_numpy(pictures.records[entries]), torch.from_numpy(pictures.slots[entries])
    )


def conditioning(store: EncodedRecords, found: Gathered) -> Conditioning:
    """What the network is told for each of the B K images."""
    text = store.captions(found.prompts.flatten())
    time_ids: Tensor | None = found.time_ids
    return text if time_ids is None else replace(text, time_ids=time_ids.flatten(0, 1))
