"""Ctrl-C and SIGTERM: ask for a stop after the current step instead of dying in the middle of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopSignals:
    """Inside the block a first SIGINT or SIGTERM only sets `received`; a second Ctrl-C raises.

    Launchers of several processes repeat a terminal's Ctrl-C to their children at once, so there a repetition
    within a second is not a second Ctrl-C.
    """

    def __init__(self, notify: Callable[[str], None]):
        self.notify = notify
        self.received: int | None = None
        self._when = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python only lets the main thread install handlers; elsewhere the run is simply not interruptible.
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._when = number, time.monotonic()
            self.notify("stopping after this step; press Ctrl-C again to stop at once without saving")
            return
        echo = "LOCAL_RANK" in os.environ and time.monotonic() - self._when < 1.0
        if number == signal.SIGINT and not echo:
            raise KeyboardInterrupt
