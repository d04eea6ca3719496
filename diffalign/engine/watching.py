"""The engine's side of the over-optimisation monitor: when it looks, what it writes, when it ends a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.config import MonitorConfig
from diffalign.engine.stopping import GoldRule


class Watch:
    """Takes the monitor's looks at a run and asks the stop rule; without a monitor it only makes sample pictures."""

    def __init__(
        self,
        monitor: Any,
        pictures: Callable[[], Any] | None,
        options: MonitorConfig,
        say: Callable[[str], None],
    ) -> None:
        self.monitor, self.pictures, self.options, self.say = monitor, pictures, options, say
        self.rule = GoldRule(options.patience, options.tolerance)
        self.reason: str | None = None

    @property
    def may_stop(self) -> bool:
        """Whether the stop rule is on."""
        return self.monitor is not None and self.options.stop != "off"

    def start(self, folder: Path, fresh: bool, write: bool) -> None:
        """Measure the base model, while it is there to be measured."""
        if self.monitor is not None:
            self.say("monitor: measuring the base model")
            self.monitor.prepare(folder, fresh=fresh, write=write)

    def first(self) -> tuple[dict[str, float], Any]:
        """Metrics and a grid of pictures (or None) of the base model."""
        return self._plain() if self.monitor is None else self._taken(0, self.monitor.first_look())

    def look(self, step: int) -> tuple[dict[str, float], Any]:
        """Metrics and a grid of pictures (or None) of the current weights."""
        return self._plain() if self.monitor is None else self._taken(step, self.monitor.look())

    def is_best(self, step: int) -> bool:
        """Whether a stop rule that is on would want the weights of this step back."""
        return self.may_stop and self.rule.best_step == step

    def best_steps(self) -> list[int]:
        """The step whose checkpoint the stop rule may ask for."""
        return [self.rule.best_step] if self.may_stop else []

    def _plain(self) -> tuple[dict[str, float], Any]:
        return {}, self.pictures() if self.pictures is not None else None

    def _taken(self, step: int, look: Any) -> tuple[dict[str, float], Any]:
        reason = self.rule.look(step, look.gold)
        if reason is not None and self.may_stop:
            self.reason = reason
        elif reason is not None:
            self.say(f"{reason}; evaluation.monitor.stop=when_gold_falls would stop here")
        return look.values, self.monitor.grid(look)
