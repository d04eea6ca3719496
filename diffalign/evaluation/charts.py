"""Charts as inline SVG with text and axes in the colour of the page, so that they read on light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffalign.evaluation.history import Series
from diffalign.evaluation.statistics import Interval

BASE, TUNED = "#7a8fa6", "#0f8b8d"
GOOD, BAD, NEUTRAL = "#2a9d5c", "#d1495b", "#7a8fa6"
WIDE, NARROW = 9.4, 4.9  # inches
INK = "#010203"  # stands for the page's text colour until the SVG is written
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diffalign",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
}


@dataclass(frozen=True)
class Line:
    """An estimate with its interval in a forest plot."""

    label: str
    value: float
    interval: Interval
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A named series of a chart over steps."""

    label: str
    points: Series
    color: str
    dashed: bool = False


def forest(lines: Sequence[Line], *, neutral: float, axis: str) -> str:
    """Estimates with intervals against a neutral value; those that leave it out are coloured."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(WIDE, 0.6 + 0.38 * len(lines))
        for row, line in enumerate(lines):
            low, high = line.interval
            color = GOOD if low > neutral else BAD if high < neutral else NEUTRAL
            axes.plot([low, high], [row, row], color=color, linewidth=2.2, solid_capstyle="round")
            axes.plot([line.value], [row], marker="o", markersize=6.5, color=color)
            axes.annotate(
                line.note, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK
            )
        axes.axvline(neutral, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7)
        axes.set_yticks(range(len(lines)), [line.label for line in lines])
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xlabel(axis)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        _grid(axes, "x")
        return _svg(figure, "forest plot")


def bars(
    labels: Sequence[str],
    base: Sequence[tuple[float, Interval]],
    tuned: Sequence[tuple[float, Interval]],
    *,
    axis: str,
    names: tuple[str, str] = ("base", "tuned"),
) -> str:
    """Base and tuned value per label with intervals."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(WIDE, 0.8 + 0.52 * len(labels))
        for offset, values, color, name in ((-0.2, base, BASE, names[0]), (0.2, tuned, TUNED, names[1])):
            y = [i + offset for i in range(len(labels))]
            lengths = [value for value, _ in values]
            errors = [
                [max(0.0, value - low) for value, (low, _) in values],
                [max(0.0, high - value) for value, (_, high) in values],
            ]
            axes.barh(y, lengths, 0.36, color=color, label=name)
            axes.errorbar(
                lengths, y, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5, alpha=0.75
            )
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel(axis)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
        _grid(axes, "x")
        return _svg(figure, "values per category")


def curves(lines: Sequence[Curve], *, title: str, neutral: float | None = None, axis: str = "step") -> str:
    """Series over steps (or what `axis` names); long noisy ones are drawn pale with their running mean on top."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(NARROW, 3.0)
        for line in lines:
            x, y = [step for step, _ in line.points], [value for _, value in line.points]
            smooth = _running_mean(y)
            if smooth != y:
                axes.plot(x, y, color=line.color, alpha=0.25, linewidth=0.9)
            marker = "o" if len(x) <= 12 else None
            style = "--" if line.dashed else "-"
            axes.plot(
                x,
                smooth,
                style,
                color=line.color,
                label=line.label,
                linewidth=1.8,
                marker=marker,
                markersize=3.5,
            )
        if neutral is not None:
            axes.axhline(neutral, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel(axis)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
        _grid(axes, "y")
        return _svg(figure, title)


def _running_mean(values: list[float]) -> list[float]:
    """Centred mean over about a twentieth of the series; short series stay as they are."""
    half = len(values) // 40
    if half == 0:
        return values
    return [
        sum(window) / len(window)
        for window in (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    ]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _grid(axes: Axes, direction: str) -> None:
    axes.grid(axis=direction, color=INK, alpha=0.14, linewidth=0.6)  # type: ignore[arg-type]


def _svg(figure: Figure, description: str) -> str:
    """The bare `<svg>` element, scalable, without prolog and metadata."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
    width = figure.get_figwidth() * 72
    text = text.replace("<svg ", f'<svg style="max-width:{width * 1.5:.0f}px" ', 1)
    return text.replace(INK, "currentColor")
