"""One metric of two models on the same prompts and seeds, with its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diffalign.evaluation.prompts import EvalPrompt
from diffalign.evaluation.scoring import Array
from diffalign.evaluation.statistics import (
    Interval,
    WinRate,
    cluster_bootstrap,
    paired_difference,
    proportion_interval,
    win_rate,
)

Change = Literal["better", "worse", "no difference"]


def better_or_worse(interval: Interval) -> Change:
    """Of a difference where higher is better: better or worse only when its interval leaves out 0."""
    low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "no difference"


@dataclass(frozen=True)
class Shift:
    """A number of each model that is no mean of scores, and its change.

    Fields:
        name, meaning: what it is. base, tuned: its values. difference, interval: tuned minus base, 95 %. n: how many it
        is from.
    """

    name: str
    meaning: str
    base: float
    tuned: float
    difference: float
    interval: Interval
    n: int

    @property
    def change(self) -> str:
        """What the interval says."""
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        """The numbers as they stand in `evaluation.json`."""
        return {
            "base": self.base,
            "tuned": self.tuned,
            "difference": self.difference,
            "interval": list(self.interval),
            "verdict": self.change,
            "n": self.n,
        }


@dataclass(frozen=True)
class Scores:
    """One metric of every picture `[N]`, NaN where it does not apply; `std`: the scorer's own uncertainty."""

    base: Array
    tuned: Array
    base_std: Array | None = None
    tuned_std: Array | None = None

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Which pairs have both scores."""
        return np.isfinite(self.base) & np.isfinite(self.tuned)

    @property
    def binary(self) -> bool:
        """Whether every score is 0 or 1."""
        values = np.concatenate([self.base[self.scored], self.tuned[self.scored]])
        return bool(np.isin(values, (0.0, 1.0)).all())


@dataclass(frozen=True)
class Metric:
    """One metric of two models; all intervals are 95 % over prompts. `binary`: every score is 0 or 1.

    Medians stand beside the means because scores of preference models are skewed; `median_difference` is the
    median of the pairs' differences. `skipped`: pairs without both scores, left out of everything else.
    """

    name: str
    binary: bool
    base: float
    tuned: float
    base_interval: Interval
    tuned_interval: Interval
    difference: float
    interval: Interval
    n: int
    prompts: int
    wins: WinRate
    scorer_std: tuple[float, float] | None = None
    medians: tuple[float, float] = (float("nan"), float("nan"))
    median_difference: float = float("nan")
    skipped: int = 0

    @property
    def change(self) -> Change:
        """Better or worse only when the interval of the difference leaves out 0."""
        return better_or_worse(self.interval)

    def as_json(self) -> dict[str, Any]:
        """Numbers of the metric as they stand in `evaluation.json`."""
        wins = self.wins
        facts: dict[str, Any] = {
            "base": self.base,
            "tuned": self.tuned,
            "difference": self.difference,
            "interval": list(self.interval),
            "n": self.n,
            "prompts": self.prompts,
            "skipped": self.skipped,
            "verdict": self.change,
            "binary": self.binary,
            "base_interval": list(self.base_interval),
            "tuned_interval": list(self.tuned_interval),
            "base_median": self.medians[0],
            "tuned_median": self.medians[1],
            "median_difference": self.median_difference,
            "win_rate": wins.rate,
            "win_rate_interval": list(wins.interval),
            "wins": wins.wins,
            "ties": wins.ties,
            "losses": wins.losses,
            "sign_test_p": wins.p_value,
        }
        if self.scorer_std:
            facts["scorer_std"] = {"base": self.scorer_std[0], "tuned": self.scorer_std[1]}
        return facts


def measure(
    name: str, scores: Scores, prompts: Sequence[EvalPrompt], rows: NDArray[np.int64] | None = None
) -> Metric | None:
    """The metric of the given rows (all by default); None with fewer than two different prompts scored."""
    rows = np.arange(len(prompts)) if rows is None else rows
    kept = rows[scores.scored[rows]]
    clusters = [prompts[i].text for i in kept]
    if len(set(clusters)) < 2:
        return None
    base, tuned = scores.base[kept], scores.tuned[kept]
    interval_of = proportion_interval if scores.binary else cluster_bootstrap
    paired = paired_difference(base, tuned, clusters)
    return Metric(
        name,
        scores.binary,
        paired.base,
        paired.tuned,
        interval_of(base, clusters),
        interval_of(tuned, clusters),
        paired.difference,
        paired.interval,
        paired.n,
        paired.prompts,
        win_rate(base, tuned, clusters),
        _uncertainty(scores, kept),
        (float(np.median(base)), float(np.median(tuned))),
        float(np.median(tuned - base)),
        len(rows) - len(kept),
    )


def _uncertainty(scores: Scores, rows: NDArray[np.int64]) -> tuple[float, float] | None:
    """Mean of the scorer's own standard deviations."""
    if scores.base_std is None or scores.tuned_std is None:
        return None
    return float(scores.base_std[rows].mean()), float(scores.tuned_std[rows].mean())
