"""Which pictures a reader should look at: biggest gains, biggest losses, and an honest random choice."""

from __future__ import annotations

import numpy as np

from diffalign.evaluation.compare import Comparison, Images
from diffalign.evaluation.grids import Mark, Row


def biggest_gains(comparison: Comparison, most: int) -> list[int]:
    """Rows where the main metric rose, largest rise first."""
    difference = _difference(comparison)
    return [int(i) for i in np.argsort(-difference, kind="stable")[:most] if difference[i] > 0]


def biggest_losses(comparison: Comparison, most: int) -> list[int]:
    """Rows where the main metric fell, largest fall first."""
    difference = _difference(comparison)
    return [int(i) for i in np.argsort(difference, kind="stable")[:most] if difference[i] < 0]


def random_rows(comparison: Comparison, most: int, seed: int = 0) -> list[int]:
    """Rows drawn without looking at the scores, in file order."""
    n = len(comparison.prompts)
    chosen = np.random.default_rng(seed).choice(n, size=min(most, n), replace=False)
    return sorted(int(i) for i in chosen)


def as_rows(comparison: Comparison, base: Images, tuned: Images, indices: list[int]) -> list[Row]:
    """Pictures, prompt, marks (right/wrong metrics) or scores (others) of the given rows."""
    return [_row(comparison, base, tuned, i) for i in indices]


def _row(comparison: Comparison, base: Images, tuned: Images, i: int) -> Row:
    scores = comparison.scores[comparison.main.name]
    before, after = float(scores.base[i]), float(scores.tuned[i])
    pictures = base[i : i + 1][0], tuned[i : i + 1][0]
    if not scores.scored[i]:
        return Row(comparison.prompts[i].text, *pictures, notes=("not scored", "not scored"))
    if comparison.main.binary:
        return Row(comparison.prompts[i].text, *pictures, marks=(_mark(before), _mark(after)))
    return Row(comparison.prompts[i].text, *pictures, notes=(f"{before:.4g}", f"{after:.4g}"))


def _mark(score: float) -> Mark:
    return "right" if score else "wrong"


def _difference(comparison: Comparison) -> np.ndarray:
    """Change of the main metric `[N]`, 0 for pairs that were skipped."""
    scores = comparison.scores[comparison.main.name]
    return np.where(scores.scored, scores.tuned - scores.base, 0.0)
