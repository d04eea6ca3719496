"""How far a preference model can be trusted: accuracy with interval, calibration, accuracy against margin.

A pair's answer is the image the model prefers, its confidence the probability the model gives to that answer.
Ties of the people are left out; a margin of exactly zero earns half a point.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.errors import DiffalignError
from diffalign.evaluation.statistics import Interval, wilson

Array = NDArray[np.float64]
BINS = 10


@dataclass(frozen=True)
class Share:
    """A share of right answers among `n`, with its 95 % interval (Wilson); NaN without any."""

    value: float
    interval: Interval
    n: int

    @classmethod
    def of(cls, right: Array) -> Share:
        """The share of right answers, each 0, one half or 1."""
        n = len(right)
        if n == 0:
            return cls(float("nan"), (0.0, 1.0), 0)
        return cls(float(right.mean()), wilson(float(right.sum()), n), n)


@dataclass(frozen=True)
class Bin:
    """Answers whose confidence or margin lies in `low..high`: their mean confidence and their accuracy."""

    low: float
    high: float
    confidence: float
    accuracy: Share


@dataclass(frozen=True)
class Halves:
    """Accuracy where the model is most certain, and where it is least, each on half of the pairs.

    `difference` comes with Newcombe's interval (1998, method 10), which needs no normal approximation.
    """

    certain: Share
    uncertain: Share
    difference: float
    interval: Interval

    @property
    def informative(self) -> bool:
        """Whether the certain half is better beyond chance."""
        return self.interval[0] > 0


def answers(probability: Array, preference: Array) -> tuple[Array, Array]:
    """Right answers (0, one half, 1) and confidences in [0.5, 1] of the decided pairs.

    Args:
        probability: `[N]` that the model gives to the first image. preference: `[N]` that people do; 0.5 is a tie,
            NaN not judged, and both are left out.

    Raises:
        DiffalignError: lengths differ, or no pair is decided.
    """
    p, q = np.asarray(probability, np.float64), np.asarray(preference, np.float64)
    if p.shape != q.shape:
        raise DiffalignError(f"{len(p)} predictions came with {len(q)} labels; expected one label each")
    decided = np.isfinite(q) & (q != 0.5)
    if not decided.any():
        raise DiffalignError(
            f"none of {len(q)} held-out pairs is decided; accuracy needs pairs with a preference"
        )
    p, q = p[decided], q[decided]
    right = (1 + np.sign(p - 0.5) * np.sign(q - 0.5)) / 2
    return right, np.maximum(p, 1 - p)


def reliability(right: Array, confidence: Array, bins: int = BINS) -> list[Bin]:
    """Accuracy per confidence, in equal bins over [0.5, 1]; empty bins are left out."""
    edges = np.linspace(0.5, 1.0, bins + 1)
    place = np.clip(np.digitize(confidence, edges[1:-1], right=False), 0, bins - 1)
    return [
        Bin(
            float(edges[i]),
            float(edges[i + 1]),
            float(confidence[place == i].mean()),
            Share.of(right[place == i]),
        )
        for i in range(bins)
        if (place == i).any()
    ]


def expected_calibration_error(bins: list[Bin]) -> float:
    """Mean over pairs of |accuracy - confidence| of their bin (Guo et al. 2017, eq. 3)."""
    total = sum(b.accuracy.n for b in bins)
    return sum(b.accuracy.n * abs(b.accuracy.value - b.confidence) for b in bins) / total


def accuracy_by_margin(right: Array, confidence: Array, margin: Array, bins: int = 5) -> list[Bin]:
    """Accuracy in bins of equal counts by |margin|, smallest first."""
    size = np.abs(margin)
    parts = np.array_split(np.argsort(size, kind="stable"), min(bins, len(size)))
    return [
        Bin(
            float(size[part].min()),
            float(size[part].max()),
            float(confidence[part].mean()),
            Share.of(right[part]),
        )
        for part in parts
    ]


def compare_halves(right: Array, uncertainty: Array) -> Halves | None:
    """Accuracy of the half with the smaller uncertainty against the other; None with fewer than two pairs."""
    if len(right) < 2:
        return None
    order = np.argsort(uncertainty, kind="stable")
    half = len(order) // 2
    certain, uncertain = Share.of(right[order[:half]]), Share.of(right[order[half:]])
    difference = certain.value - uncertain.value
    down = np.hypot(certain.value - certain.interval[0], uncertain.interval[1] - uncertain.value)
    up = np.hypot(certain.interval[1] - certain.value, uncertain.value - uncertain.interval[0])
    return Halves(certain, uncertain, difference, (float(difference - down), float(difference + up)))


def validate_preferences(
    margin: Array, probability: Array, preference: Array, uncertainty: dict[str, Array] | None = None
) -> dict[str, Any]:
    """Everything about one dimension of a preference model on held-out pairs, as plain data.

    Args:
        margin: `[N]` score of the first image minus that of the second. probability, preference: as for `answers`.
        uncertainty: `[N]` by name; each is tested for being informative.

    Returns:
        `accuracy`, `log_loss`, `ece`, `reliability`, `by_margin`, and `halves` per uncertainty (and by |margin|).
    """
    q = np.asarray(preference, np.float64)
    right, confidence = answers(probability, q)
    decided = np.isfinite(q) & (q != 0.5)
    size = np.abs(np.asarray(margin, np.float64))[decided]
    bins = reliability(right, confidence)
    p = np.clip(np.asarray(probability, np.float64)[decided], 1e-12, 1 - 1e-12)
    q = q[decided]
    sources = {"margin": -size, **{name: np.asarray(u)[decided] for name, u in (uncertainty or {}).items()}}
    halves = {name: compare_halves(right, values) for name, values in sources.items()}
    return {
        "accuracy": asdict(Share.of(right)),
        "ties": int((np.asarray(preference) == 0.5).sum()),
        "log_loss": float(-(q * np.log(p) + (1 - q) * np.log(1 - p)).mean()),
        "ece": expected_calibration_error(bins),
        "reliability": [asdict(b) for b in bins],
        "by_margin": [asdict(b) for b in accuracy_by_margin(right, confidence, size)],
        "halves": {
            name: {**asdict(found), "informative": found.informative}
            for name, found in halves.items()
            if found
        },
    }
