"""Sections of the report: numbers and pictures of an evaluation as text and charts for the template."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from PIL import Image

from diffalign.evaluation import wording
from diffalign.evaluation.charts import Line, bars, forest
from diffalign.evaluation.compare import Comparison, Metric
from diffalign.evaluation.examples import as_rows, biggest_gains, biggest_losses, random_rows
from diffalign.evaluation.grids import Row
from diffalign.evaluation.metric import Shift
from diffalign.evaluation.pictures import to_uint8
from diffalign.evaluation.result import Evaluation
from diffalign.evaluation.set_metrics import SetMetric
from diffalign.evaluation.side_effects import SideEffect

EXAMPLES = 6
PICTURE_SIZE = 320


@dataclass(frozen=True)
class Panel:
    """A chart with the sentence that says how to read it."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Side-by-side pictures under a heading."""

    title: str
    text: str
    rows: list[dict[str, Any]]


def result_section(comparison: Comparison) -> dict[str, Any]:
    """Everything the result section shows."""
    return {
        "verdict": wording.verdict(comparison),
        "change": comparison.main.change,
        "main": _numbers(comparison.main, comparison),
        "metrics": [_numbers(metric, comparison) for metric in comparison.metrics.values()],
        "panels": _panels(comparison),
    }


def _numbers(metric: Metric, comparison: Comparison) -> dict[str, Any]:
    """A metric as text for the table."""
    wins = metric.wins
    return {
        "name": metric.name,
        "base": wording.amount(metric, metric.base),
        "tuned": wording.amount(metric, metric.tuned),
        "base_interval": wording.amount_interval(metric, metric.base_interval),
        "tuned_interval": wording.amount_interval(metric, metric.tuned_interval),
        "difference": wording.change(metric, metric.difference),
        "interval": wording.interval(metric, metric.interval),
        "change": metric.change,
        "n": metric.n,
        "prompts": metric.prompts,
        "win_rate": wording.share(wins.rate),
        "win_interval": wording.share_interval(wins.interval),
        "p": "below 0.0001" if wins.p_value < 1e-4 else f"{wins.p_value:.4f}",
        **{name: getattr(wins, name) for name in ("wins", "ties", "losses")},
        "part": metric.name not in comparison.skipped,
        "medians": None if metric.binary else [wording.amount(metric, m) for m in metric.medians],
        "median_difference": wording.change(metric, metric.median_difference),
        "skipped": metric.skipped,
        "std": metric.scorer_std and [f"{value:.3g}" for value in metric.scorer_std],
    }


def _panels(comparison: Comparison) -> list[Panel]:
    """Forest plots of the main metric and of all win rates, and bars per category."""
    main = comparison.main
    groups = {"all prompts": main} | {
        name: metrics[main.name] for name, metrics in comparison.categories.items()
    }
    scale = 100 if main.binary else 1
    unit = "percentage points" if main.binary else "score"
    differences = [
        Line(
            name.replace("_", " "),
            scale * m.difference,
            (scale * m.interval[0], scale * m.interval[1]),
            f"{wording.change(m, m.difference)}, n = {m.n}",
        )
        for name, m in groups.items()
    ]
    panels = [
        Panel(
            Markup(forest(differences, neutral=0, axis=f"{main.name}: tuned minus base, {unit}")),
            "Difference of the main metric with its 95 % interval. An interval that touches the dashed line "
            "is compatible with no difference.",
        )
    ]
    rates = [
        Line(
            m.name,
            100 * m.wins.rate,
            (100 * m.wins.interval[0], 100 * m.wins.interval[1]),
            f"{wording.share(m.wins.rate)}, {m.wins.ties} ties",
        )
        for m in comparison.metrics.values()
    ]
    panels.append(
        Panel(
            Markup(forest(rates, neutral=50, axis="win rate of tuned over base, %")),
            "How often the tuned picture scores higher than the base picture of the same prompt and seed; "
            "a tie counts as half a win.",
        )
    )
    return panels + _category_bars(comparison)


def _category_bars(comparison: Comparison) -> list[Panel]:
    main = comparison.main
    metrics = [found[main.name] for found in comparison.categories.values()]
    if not metrics:
        return []
    scale = 100 if main.binary else 1

    def scaled(value: float, bounds: tuple[float, float]) -> tuple[float, tuple[float, float]]:
        return scale * value, (scale * bounds[0], scale * bounds[1])

    chart = bars(
        [name.replace("_", " ") for name in comparison.categories],
        [scaled(m.base, m.base_interval) for m in metrics],
        [scaled(m.tuned, m.tuned_interval) for m in metrics],
        axis=f"{main.name}, %" if main.binary else main.name,
    )
    caption = (
        "Each model per category with its 95 % interval. Judge differences by the first plot: it is paired."
    )
    return [Panel(Markup(chart), caption)]


def side_effects_section(evaluation: Evaluation) -> dict[str, Any] | None:
    """Sharpness, saturation, diversity and drift as text; None when nothing was measured."""
    if not evaluation.side_effects and evaluation.drift is None:
        return None
    drift = evaluation.drift
    return {
        "rows": [_effect_numbers(effect) for effect in evaluation.side_effects.values()],
        "drift": drift and {
            "kl": f"{drift.kl:.3g} nats",
            "interval": f"{drift.interval[0]:.3g} to {drift.interval[1]:.3g}",
            "per_element": f"{drift.per_element:.2g} per latent element",
            "rms": wording.share(drift.rms),
            "pictures": drift.pictures,
            "times": drift.times,
        },
    }  # fmt: skip


def sets_section(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Rewards of whole sets as text; empty when none was measured."""
    return [_set_numbers(metric) for metric in evaluation.sets.values()]


def _set_numbers(metric: SetMetric) -> dict[str, Any]:
    return _change_numbers(metric) | {"n": f"{metric.n} pictures"}


def _effect_numbers(effect: SideEffect) -> dict[str, Any]:
    return _change_numbers(effect) | {
        "relative": f"{100 * effect.difference / effect.base:+.1f} %" if effect.base else "",
        "n": f"{effect.n} {effect.unit}",
    }


def _change_numbers(effect: Shift) -> dict[str, Any]:
    low, high = effect.interval
    return {
        "name": effect.name,
        "meaning": effect.meaning,
        "base": f"{effect.base:.4g}",
        "tuned": f"{effect.tuned:.4g}",
        "difference": f"{effect.difference:+.3g}",
        "interval": f"{low:+.3g} to {high:+.3g}",
        "change": effect.change,
    }


def lost_section(evaluation: Evaluation) -> dict[str, Any]:
    """What got worse as text, with the pictures of the largest falls."""
    comparison, lost = evaluation.comparison, evaluation.lost
    main = comparison.main
    rows = biggest_losses(comparison, EXAMPLES)
    return {
        "falls": [
            {
                "metric": fall.metric.name,
                "where": fall.category.replace("_", " ") or "all prompts",
                "difference": wording.change(fall.metric, fall.metric.difference),
                "interval": wording.interval(fall.metric, fall.metric.interval),
                "n": fall.metric.n,
            }
            for fall in (*lost.metrics, *lost.categories)
        ],
        "flips": [
            {"metric": name, "lost": len(flips.lost), "gained": len(flips.gained)}
            for name, flips in lost.flips.items()
        ],
        "prompts": [
            {
                "prompt": fall.prompt,
                "difference": wording.change(main, fall.difference),
                "seeds": f"{fall.worse} of {fall.seeds}",
                "significant": fall.significant,
            }
            for fall in lost.prompts
            if fall.seeds > 1
        ],
        "metric": main.name,
        "rows": [_shown(r) for r in as_rows(comparison, evaluation.base, evaluation.tuned, rows)],
    }


def galleries(evaluation: Evaluation) -> list[Gallery]:
    """Random pairs, and the biggest gains; losses have a section of their own."""
    comparison = evaluation.comparison
    chosen = (
        ("Random pairs", "Drawn without looking at the scores.", random_rows(comparison, EXAMPLES)),
        ("Biggest gains", f"By {comparison.main.name}.", biggest_gains(comparison, EXAMPLES)),
    )
    return [
        Gallery(
            title, text, [_shown(r) for r in as_rows(comparison, evaluation.base, evaluation.tuned, rows)]
        )
        for title, text, rows in chosen
        if rows
    ]


def _shown(row: Row) -> dict[str, Any]:
    images = [Image.fromarray(to_uint8(image)) for image in (row.base, row.tuned)]
    sides = [
        {
            "name": name,
            "src": data_uri(image),
            "mark": mark,
            "note": note,
            "tiny": max(image.size) < PICTURE_SIZE // 2,
        }
        for name, image, mark, note in zip(("base", "tuned"), images, row.marks, row.notes, strict=True)
    ]
    return {"prompt": row.prompt, "sides": sides}


def data_uri(image: Image.Image, size: int = PICTURE_SIZE) -> str:
    """An image inside a URL: PNG when it is small, else reduced to `size` pixels as JPEG."""
    image = image.convert("RGB")
    buffer = io.BytesIO()
    if max(image.size) <= size:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
