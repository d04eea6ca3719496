"""Cached preference pairs: encoded records (`store.py`) with labels and ties applied, fetched by index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffalign.conditioning import Conditioning
from diffalign.data.batch import PairBatch
from diffalign.data.keys import CacheKey, Progress
from diffalign.data.pairs import Pairs, choose_pairs
from diffalign.data.records import PreferenceRecord, as_records
from diffalign.data.store import EncodedRecords, open_encoded
from diffalign.errors import DiffalignError
from diffalign.randomness import Draw

if TYPE_CHECKING:
    from diffalign.backbones.base import Backbone
    from diffalign.config import DataConfig, ModelConfig


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
        records: the preference records. config: also labels and ties.
        seed: run seed (only `labels: random` and `flipped` use it).
        opener, model, progress, builder, timeout: as for `open_encoded`.

    Raises:
        DiffalignError: all pairs are ties and dropped, no image can be used, the disk is full, or waiting
            took too long.
    """
    records = as_records(records)
    pairs = choose_pairs(records, config.labels, config.ties, seed, config.flipped)
    return PairCache(open_encoded(records, opener, config, model, progress, builder, timeout), pairs)


class PairCache:
    """Encoded preference pairs, fetched by index.

    Attributes:
        store: the encoded images; folder, key, broken, mode: its own. pairs: what is trained on, in order.
    """

    unit: ClassVar[str] = "pairs"
    slots: ClassVar[int] = 2
    """Pictures of a record."""

    def __init__(self, store: EncodedRecords, pairs: Pairs) -> None:
        self.store = store
        self.folder, self.key, self.broken, self.mode = store.folder, store.key, store.broken, store.mode
        self.pairs = pairs.keep(store.usable[pairs.records])
        self._records = torch.from_numpy(self.pairs.records)
        self._chosen = torch.from_numpy(self.pairs.chosen)
        self._preference = torch.from_numpy(self.pairs.preference)
        self._weight = torch.from_numpy(self.pairs.weight)
        if len(self) == 0:
            raise DiffalignError(_nothing_left(store, pairs))

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
        return cls(EncodedRecords.open(folder, key, mode), pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def places(self) -> tuple[np.ndarray, ...]:
        """Which encoded images are fetched as what: equal places of one store are the same pictures in one order."""
        return self.pairs.records, self.pairs.chosen

    def fetch(self, draw: Draw) -> PairBatch:
        """The pairs of a draw, on the CPU. Posterior noise and flips depend on (seed, step, record) only."""
        index = torch.as_tensor(list(draw.records))
        chosen, records = self._chosen[index], self._records[index]
        found = self.store.gather(draw, records[:, None].expand(-1, 2), torch.tensor([[0, 1]] * len(draw)))
        prompts = found.prompts
        text_chosen, text_rejected = self.store.captions(_of_slot(prompts, chosen)), None
        if (prompts[:, 0] != prompts[:, 1]).any():
            text_rejected = self.store.captions(_of_slot(prompts, 1 - chosen))
        return PairBatch(
            chosen=_of_slot(found.latents, chosen),
            rejected=_of_slot(found.latents, 1 - chosen),
            conditioning_chosen=_with_ids(text_chosen, found.time_ids, chosen),
            conditioning_rejected=_with_ids(text_rejected or text_chosen, found.time_ids, 1 - chosen),
            preference=self._preference[index],
            weight=self._weight[index],
            draw=draw,
        )

    def unconditional(self, count: int) -> Conditioning:
        """The conditioning of no prompt, `count` rows, as the model's pipeline does it; without time ids."""
        return self.store.unconditional(count)


def _of_slot(values: Tensor, slot: Tensor) -> Tensor:
    """Pick one of the two images of each row: values `[B, 2, ...]`, slot `[B]`."""
    return values[torch.arange(len(slot)), slot]


def _with_ids(text: Conditioning, time_ids: Tensor | None, slot: Tensor) -> Conditioning:
    return text if time_ids is None else replace(text, time_ids=_of_slot(time_ids, slot))


def _nothing_left(store: EncodedRecords, pairs: Pairs) -> str:
    return (
        f"no usable pair is left of {len(store)} in {store.source}: {len(store.broken)} images "
        f"are broken or missing, {pairs.ties_dropped} ties dropped. First reasons: {store.faults()}. Run "
        "`diffalign data validate` on the source, and check image paths."
    )
