"""Which image of each record is trained towards: labels, ties, and the controls for experiments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from diffalign.data.gaps import reward_gaps
from diffalign.data.records import TIE, Records
from diffalign.errors import DiffalignError
from diffalign.randomness import derive_seed


@dataclass(frozen=True)
class Pairs:
    """The trained pairs, one entry each.

    Fields:
        records: `[N]` index of the record.
        chosen: `[N]` 0 or 1, the preferred image of the record.
        preference: `[N]` probability that it is really preferred, in [0.5, 1].
        weight: `[N]` factor on the loss.
        ties_dropped: ties that were left out.
        gaps: by aspect `[N]`, reward of the chosen minus that of the rejected image; NaN where unknown (`gaps.py`).
    """

    records: np.ndarray
    chosen: np.ndarray
    preference: np.ndarray
    weight: np.ndarray
    ties_dropped: int = 0
    gaps: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def keep(self, mask: np.ndarray) -> Pairs:
        """The entries where `mask` `[N]` is true."""
        columns = (self.records[mask], self.chosen[mask], self.preference[mask], self.weight[mask])
        return Pairs(*columns, self.ties_dropped, {name: gap[mask] for name, gap in self.gaps.items()})


def choose_pairs(
    records: Records, labels: str = "given", ties: str = "drop", seed: int = 0, flipped: float = 0.0
) -> Pairs:
    """Orient every record by its label.

    Args:
        records: what people preferred.
        labels: `given`; `swapped` (every preference reversed) or `random` (a coin per record, from `seed`):
            controls that must make a model worse, and leave it about as it is. Ties stay ties.
        ties: `drop`, or `half`: kept with preference 0.5, never as a win of the first image.
        seed: run seed, for `random` and `flipped`.
        flipped: share of the preferences that is reversed, each by a coin from `seed`: label noise.

    Raises:
        DiffalignError: all records are ties and ties are dropped.
    """
    label_0 = np.asarray([row.label_0 for row in records.rows], np.float32)
    weight = np.asarray([row.weight for row in records.rows], np.float32)
    tie = label_0 == TIE
    reverse = _reversed(len(records), labels, seed) ^ label_noise(len(records), flipped, seed)
    label_0 = np.where(reverse, 1 - label_0, label_0)
    kept = ~tie if ties == "drop" else np.ones_like(tie)
    if not kept.any():
        raise DiffalignError(
            f"all {len(records)} labelled pairs of {records.description} are ties, and data.ties is drop: "
            "nothing is left to learn from. Set data.ties=half to keep them with preference 0.5, or use "
            "other data."
        )
    preference = np.maximum(label_0, 1 - label_0)
    chosen = (label_0 < TIE).astype(np.int64)
    gaps = reward_gaps(records.rows, chosen)
    pairs = Pairs(np.arange(len(records)), chosen, preference, weight, int((~kept).sum()), gaps)
    return pairs.keep(kept)


def _reversed(count: int, labels: str, seed: int) -> np.ndarray:
    if labels == "swapped":
        return np.ones(count, bool)
    if labels == "random":
        return np.asarray([derive_seed(seed, "labels", i) % 2 == 1 for i in range(count)], bool)
    return np.zeros(count, bool)


def label_noise(count: int, share: float, seed: int) -> np.ndarray:
    """Which labels `[N]` a share of random coins reverses; a larger share reverses the same ones, and more."""
    draws = [derive_seed(seed, "flipped label", i) / 2**63 if share else 1.0 for i in range(count)]
    return np.asarray(draws) < share
