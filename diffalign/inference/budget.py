"""What a method may spend on a picture, and what it has spent: network evaluations, backward passes and seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

from diffalign.errors import DiffalignError

PLENTY = 10**9
"""Pictures that a budget without a limit allows."""


@dataclass(frozen=True)
class Budget:
    """Limits per picture; a method stops at the first that it reaches, None is no limit.

    Fields:
        evaluations: network evaluations, one per step and branch of guidance.
        seconds: of the clock. A group of pictures that are optimised at once has as many times more.

    Raises:
        DiffalignError: a limit that is not positive.
    """

    evaluations: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("evaluations", self.evaluations), ("seconds", self.seconds)):
            if limit is not None and limit <= 0:
                raise DiffalignError(
                    f"budget.{name} is {limit}; expected a number above 0, or null for no limit."
                )

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return self.evaluations is not None or self.seconds is not None


class Meter:
    """What a group of pictures has cost so far, per picture but for the seconds, which are the group's.

    Args:
        budget: limits. pictures: how many are worked on at once. running: whether the clock does.
    """

    def __init__(self, budget: Budget, pictures: int, running: bool = False) -> None:
        self.budget, self.pictures = budget, pictures
        self.evaluations, self.backwards = 0, 0
        self._spent, self._began = 0.0, None if not running else time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds that the clock has run."""
        return self._spent + (0.0 if self._began is None else time.perf_counter() - self._began)

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        limit = self.budget.seconds
        return limit is not None and self.seconds >= limit * self.pictures

    def start(self) -> None:
        """Let the clock run."""
        self._spent, self._began = self.seconds, time.perf_counter()

    def stop(self) -> None:
        """Stop the clock."""
        self._spent, self._began = self.seconds, None

    def resume(self, evaluations: int, seconds: float) -> None:
        """Take over what an earlier session spent; the clock goes on if it runs."""
        self.evaluations, self._spent = evaluations, seconds
        self._began = None if self._began is None else time.perf_counter()

    def spend(self, evaluations: int, backwards: int = 0) -> None:
        """Add network evaluations and backward passes per picture."""
        self.evaluations += evaluations
        self.backwards += backwards

    def affordable(self, cost: int) -> int:
        """How many pictures more, of `cost` evaluations each, every prompt may have; 0 when time is up."""
        if self.late:
            return 0
        limit = self.budget.evaluations
        return PLENTY if limit is None else max(0, (limit - self.evaluations) // cost)
