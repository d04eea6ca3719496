"""What was lost: metrics, categories and prompts that got worse, and pictures that were right and are wrong now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diffalign.evaluation.compare import Comparison
from diffalign.evaluation.metric import Metric
from diffalign.evaluation.statistics import sign_test

SHOWN_PROMPTS = 10
FALSE_DISCOVERIES = 0.05


@dataclass(frozen=True)
class Fall:
    """A metric that got worse, over all prompts (`category` empty) or in a category."""

    metric: Metric
    category: str = ""

    def as_json(self) -> dict[str, Any]:
        """Name, category, difference and interval."""
        return {
            "metric": self.metric.name,
            "category": self.category,
            "difference": self.metric.difference,
            "interval": list(self.metric.interval),
        }


@dataclass(frozen=True)
class PromptFall:
    """A prompt whose pictures score lower in the main metric.

    Fields:
        difference: mean over its seeds. worse, seeds: how many of its seeds fell, of how many.
        significant: the exact sign test over its seeds holds after Benjamini and Hochberg (1995) at 5 % over all
            prompts. Fewer than six seeds can never show that.
    """

    prompt: str
    difference: float
    worse: int
    seeds: int
    significant: bool


@dataclass(frozen=True)
class Flips:
    """For a right/wrong metric: rows that were right and are wrong now (`lost`), and the other way round."""

    lost: list[int]
    gained: list[int]


@dataclass(frozen=True)
class Lost:
    """Everything that got worse.

    Fields:
        metrics: falls over all prompts. categories: falls within a category, of every reward's own score.
        prompts: largest falls of the main metric. flips: per right/wrong reward.
    """

    metrics: list[Fall]
    categories: list[Fall]
    prompts: list[PromptFall]
    flips: dict[str, Flips]

    def as_json(self, comparison: Comparison) -> dict[str, Any]:
        """The entry `lost` of `evaluation.json`; flipped pictures are named by prompt and seed."""
        return {
            "metrics": [fall.as_json() for fall in self.metrics],
            "categories": [fall.as_json() for fall in self.categories],
            "prompts": [asdict(fall) for fall in self.prompts],
            "flips": {
                name: {
                    "right_to_wrong": len(flips.lost),
                    "wrong_to_right": len(flips.gained),
                    "pictures": [_named(comparison, row) for row in flips.lost],
                }
                for name, flips in self.flips.items()
            },
        }


def find_lost(comparison: Comparison) -> Lost:
    """Look for losses: of metrics and categories by their 95 % intervals, of prompts by their seeds."""
    rewards = comparison.skipped
    metrics = [Fall(m) for m in comparison.metrics.values() if m.change == "worse"]
    categories = [
        Fall(m, category)
        for category, found in comparison.categories.items()
        for name, m in found.items()
        if name in rewards and m.change == "worse"
    ]
    flips = {name: _flips(comparison, name) for name in rewards if comparison.metrics[name].binary}
    return Lost(metrics, categories, _prompt_falls(comparison), flips)


def discoveries(p_values: Sequence[float], rate: float = FALSE_DISCOVERIES) -> list[bool]:
    """Which hypotheses to reject at a false discovery rate (Benjamini and Hochberg 1995)."""
    order = np.argsort(p_values, kind="stable")
    n = len(p_values)
    passing = [i for i, index in enumerate(order) if p_values[index] <= rate * (i + 1) / n]
    rejected = set(order[: passing[-1] + 1].tolist()) if passing else set()
    return [i in rejected for i in range(n)]


def _prompt_falls(comparison: Comparison) -> list[PromptFall]:
    """The prompts whose mean fell most, significant ones first."""
    scores = comparison.scores[comparison.main.name]
    rows: dict[str, list[float]] = {}
    for i in np.flatnonzero(scores.scored):
        rows.setdefault(comparison.prompts[i].text, []).append(float(scores.tuned[i] - scores.base[i]))
    significant = discoveries([sign_test(*_up_and_down(changes)) for changes in rows.values()])
    falls = [
        PromptFall(text, sum(changes) / len(changes), _up_and_down(changes)[1], len(changes), bool(marked))
        for (text, changes), marked in zip(rows.items(), significant, strict=True)
    ]
    worse = sorted((f for f in falls if f.difference < 0), key=lambda f: (not f.significant, f.difference))
    return worse[:SHOWN_PROMPTS]


def _up_and_down(changes: Sequence[float]) -> tuple[int, int]:
    return sum(c > 0 for c in changes), sum(c < 0 for c in changes)


def _flips(comparison: Comparison, name: str) -> Flips:
    scores = comparison.scores[name]
    difference = np.where(scores.scored, scores.tuned - scores.base, 0)
    return Flips(np.flatnonzero(difference < 0).tolist(), np.flatnonzero(difference > 0).tolist())


def _named(comparison: Comparison, row: int) -> dict[str, Any]:
    prompt = comparison.prompts[row]
    return {"prompt": prompt.text, "category": prompt.category, "seed": prompt.seed}
