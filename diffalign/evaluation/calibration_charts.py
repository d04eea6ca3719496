"""Pictures of a preference model's validation: reliability diagram, accuracy against margin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, GREY = "#0f8b8d", "#7a8fa6"
DPI = 150


def reliability_diagram(validation: dict[str, Any], path: Path, title: str = "reliability") -> Path:
    """Accuracy against confidence with 95 % intervals, and how many pairs each bin holds; a PNG file."""
    bins = validation["reliability"]
    figure = Figure(figsize=(4.6, 5.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    upper.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, linestyle="--", label="perfect")
    _points(upper, [b["confidence"] for b in bins], bins)
    accuracy = validation["accuracy"]
    upper.set_title(
        f"{title}: accuracy {100 * accuracy['value']:.1f} % of {accuracy['n']}, ECE {validation['ece']:.3f}",
        fontsize=10,
    )
    upper.set_ylabel("share of right answers")
    upper.set_ylim(min([0.4, *(b["accuracy"]["interval"][0] for b in bins)]), 1.02)
    lower.bar(
        [(b["low"] + b["high"]) / 2 for b in bins],
        [b["accuracy"]["n"] for b in bins],
        width=[0.9 * (b["high"] - b["low"]) for b in bins],
        color=GREY,
    )
    lower.set_ylabel("pairs")
    lower.set_xlabel("confidence")
    return _write(figure, path)


def margin_chart(validation: dict[str, Any], path: Path, title: str = "accuracy against margin") -> Path:
    """Accuracy per bin of |margin| with 95 % intervals, and the confidence stated there; a PNG file."""
    bins = validation["by_margin"]
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    centers = [(b["low"] + b["high"]) / 2 for b in bins]
    _points(axes, centers, bins)
    axes.plot(centers, [b["confidence"] for b in bins], color=GREY, linestyle="--", label="stated confidence")
    axes.axhline(0.5, color=GREY, linewidth=0.8)
    axes.set_xlabel("|margin|, bins of equal counts")
    axes.set_ylabel("share of right answers")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    return _write(figure, path)


def _points(axes: Axes, places: list[float], bins: list[dict[str, Any]]) -> None:
    shares = [b["accuracy"] for b in bins]
    lengths = [
        [max(0.0, s["value"] - s["interval"][0]) for s in shares],
        [max(0.0, s["interval"][1] - s["value"]) for s in shares],
    ]
    axes.errorbar(
        places,
        [s["value"] for s in shares],
        yerr=lengths,
        color=BLUE,
        marker="o",
        linewidth=1.4,
        capsize=3,
        label="measured",
    )
    axes.grid(alpha=0.2)


def _write(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path
