"""What a person sees during long work: bars with the time left on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHOWN = ("loss", "implicit_accuracy", "accuracy", "grad_norm", "lr", "pairs_per_second")


class Reporter:
    """Messages and bars; silent when not `enabled`, so that only one of several processes talks.

    Call it as `reporter(label, done, total)`: a bar starts with its first call and ends at done = total.
    Close it (or use it as a context) to leave the terminal in order.
    """

    def __init__(self, console: Console | None = None, enabled: bool = True, seconds: float = 15.0):
        self.console, self.enabled, self._seconds = console or Console(), enabled, seconds
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._last_line = float("-inf")

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def say(self, message: str) -> None:
        """Print a message above the bars."""
        if self.enabled:
            self.console.print(escape(message), highlight=False, soft_wrap=True)

    def __call__(self, label: str, done: int, total: int, numbers: str = "") -> None:
        """Show that `done` of `total` units of the work `label` are done."""
        if not self.enabled:
            return
        self._began.setdefault(label, (time.monotonic(), done))
        if self.console.is_terminal:
            self._bar(label, done, total, numbers)
        elif done >= total or time.monotonic() - self._last_line >= self._seconds:
            self._last_line = time.monotonic()
            self.say(f"{label} {done}/{total}{self._time_left(label, done, total)}  {numbers}".rstrip())
        if done >= total:
            self._began.pop(label, None)

    def close(self) -> None:
        """Remove the bars."""
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._tasks = None, {}
        self._began.clear()

    def _bar(self, label: str, done: int, total: int, numbers: str) -> None:
        if self._bars is None:
            self._bars = _new_bars(self.console)
            self._bars.start()
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total, completed=done, numbers="")
        self._bars.update(self._tasks[label], completed=done, total=total, numbers=numbers)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(label))
            if not self._tasks:
                self._bars.stop()
                self._bars = None

    def _time_left(self, label: str, done: int, total: int) -> str:
        began, first = self._began[label]
        if done <= first or done >= total:
            return ""
        left = (time.monotonic() - began) / (done - first) * (total - done)
        return f"  {duration(left)} left"


def numbers_line(values: Mapping[str, float]) -> str:
    """The metrics a person watches, in one short line."""
    return "  ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours when there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _new_bars(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    return Progress(*columns, console=console, transient=True)
