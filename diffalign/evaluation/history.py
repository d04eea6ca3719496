"""The recorded course of a run (`metrics.jsonl`), as series over steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from diffalign.metrics import read_metrics

Series = list[tuple[float, float]]


def read_history(run_folder: Path) -> list[dict[str, Any]]:
    """Records of a run's `metrics.jsonl` that carry a step; empty when there is none."""
    return [record for record in read_metrics(run_folder / "metrics.jsonl") if "step" in record]


def series(history: list[dict[str, Any]], name: str) -> Series:
    """(step, value) of a metric sorted by step; of a repeated step the last counts, gaps are skipped."""
    points = {
        float(record["step"]): float(record[name])
        for record in history
        if isinstance(record.get(name), int | float) and math.isfinite(record[name])
    }
    return sorted(points.items())


def held_out_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """The last finite value of every `held_out/…` metric, without the prefix."""
    prefix = "held_out/"
    names = {name for record in history for name in record if name.startswith(prefix)}
    last = {name.removeprefix(prefix): series(history, name)[-1:] for name in sorted(names)}
    return {name: points[0][1] for name, points in last.items() if points}


def paired_series(history: list[dict[str, Any]], x: str, y: str) -> Series:
    """(x, y) of two metrics at the steps that have both, in the order of steps."""
    across, up = dict(series(history, x)), dict(series(history, y))
    return [(across[step], up[step]) for step in sorted(across.keys() & up.keys())]


def monitored_rewards(history: list[dict[str, Any]]) -> list[str]:
    """Names of the rewards that the over-optimisation monitor scored, in order of appearance."""
    start, end = "monitor/", "/win_rate"
    names = (name for record in history for name in record if name.startswith(start) and name.endswith(end))
    return list(dict.fromkeys(name.removeprefix(start).removesuffix(end) for name in names))


def relative_series(history: list[dict[str, Any]], name: str) -> Series:
    """(step, value over the first value) of a metric; empty when the first is 0."""
    points = series(history, name)
    return [(step, value / points[0][1]) for step, value in points] if points and points[0][1] else []
