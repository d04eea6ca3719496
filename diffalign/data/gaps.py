"""How much better the chosen picture is by each aspect that people or rewards judged: reward gaps of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diffalign.data.records import PreferenceRecord
from diffalign.errors import DiffalignError, did_you_mean

# A certain label states no finite gap; this one stands for it. Under Bradley-Terry it means 99.3 %.
LARGEST = 5.0


def reward_gaps(rows: Sequence[PreferenceRecord], chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Gaps `[N]` by aspect, reward of the chosen image minus that of the other, NaN where nobody judged it.

    A label p of an aspect (`labels` of a record) is read as `sigmoid(gap)`, so a reward that wrote it gets its own gap
    back; gaps are limited to -5 to 5, which is what certain labels count as. `chosen` `[N]` is 0 or 1. Aspects are not
    touched by the controls of `data.labels`: a reversed pair has the negative gap of the same two images.
    """
    names = sorted({name for row in rows for name in row.labels})
    sign = np.where(chosen == 0, 1.0, -1.0)
    return {name: sign * _first_gap(rows, name) for name in names}


def known_gaps(gaps: Mapping[str, np.ndarray], name: str, option: str) -> np.ndarray:
    """The gaps `[N]` of an aspect.

    Args:
        option: the configuration key that asks for them, for the message.

    Raises:
        DiffalignError: no pair has a label for this aspect.
    """
    if name not in gaps or np.isnan(gaps[name]).all():
        found = ", ".join(sorted(gaps)) or "none"
        raise DiffalignError(
            f"{option} names {name!r}, but no pair has a label for it; aspects of the data: {found}."
            f"{did_you_mean(name, sorted(gaps))} Give `labels` in JSONL: per aspect the probability that the first "
            "picture is better, sigmoid(reward gap) for rewards."
        )
    return gaps[name]


def _first_gap(rows: Sequence[PreferenceRecord], name: str) -> np.ndarray:
    """Gap `[N]` of the first image over the second one."""
    share = np.asarray([row.labels.get(name, np.nan) for row in rows], np.float64)
    with np.errstate(divide="ignore"):
        gap = np.log(share) - np.log1p(-share)
    return np.clip(gap, -LARGEST, LARGEST)
