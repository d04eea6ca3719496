"""When to stop because the target that is not optimised has begun to fall (over-optimisation)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class GoldRule:
    """Compares the gold score at each look with the best look so far, prompt by prompt.

    A look counts as a fall when the mean paired difference to the best look is below minus `tolerance` standard
    errors; `patience` falls in a row end the run. Pairing by prompt and seed takes the spread between prompts out,
    so that a few dozen prompts suffice. Gao et al. 2022 (arXiv 2210.10760) show why: the proxy goes on rising.
    """

    def __init__(self, patience: int = 2, tolerance: float = 1.0) -> None:
        self.patience, self.tolerance = patience, tolerance
        self.best: list[float] = []
        self.best_step = 0
        self.falls = 0

    def look(self, step: int, scores: Sequence[float]) -> str | None:
        """Take the gold scores of the fixed prompts after `step` steps; the reason to stop, or None.

        Raises:
            ValueError: another number of scores than before.
        """
        values = [float(score) for score in scores]
        if not self.best:
            self.best, self.best_step = values, step
            return None
        if len(values) != len(self.best):
            raise ValueError(f"{len(values)} gold scores; the looks before had {len(self.best)}")
        mean, error = paired_change(self.best, values)
        if mean > 0:
            self.best, self.best_step, self.falls = values, step, 0
            return None
        self.falls = self.falls + 1 if mean < -self.tolerance * error else 0
        if self.falls < self.patience:
            return None
        return (
            f"the gold score fell in {self.falls} looks in a row: at step {step} it is {mean:+.4g} "
            f"(standard error {error:.2g}) against its best, at step {self.best_step}"
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"best": self.best, "best_step": self.best_step, "falls": self.falls}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self.best, self.best_step, self.falls = list(state["best"]), state["best_step"], state["falls"]


def paired_change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of `after - before` over pairs, and its standard error (0 for a single pair)."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    if n == 1:
        return mean, 0.0
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    return mean, math.sqrt(variance / n)
