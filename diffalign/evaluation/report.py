"""The report of a run: one HTML file with everything in it, which needs no other file and no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from diffalign import __version__
from diffalign.config import RunConfig, load_run_config
from diffalign.evaluation import wording
from diffalign.evaluation.charts import BASE, TUNED, Curve, Line, bars, curves, forest
from diffalign.evaluation.compare import Comparison, Metric
from diffalign.evaluation.examples import as_rows, biggest_gains, biggest_losses, random_rows
from diffalign.evaluation.grids import Row
from diffalign.evaluation.history import held_out_metrics, read_history, series
from diffalign.evaluation.pictures import to_uint8
from diffalign.evaluation.result import Evaluation, implicit_summary, write_text
from diffalign.versions import versions

EXAMPLES = 6
SAMPLE_GRIDS = 6
PICTURE_SIZE = 320
GRID_SIZE = 900


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


def write_report(run_folder: str | Path, evaluation: Evaluation | None = None) -> Path:
    """Write `report.html` into a run folder and return its path.

    Without an evaluation the report holds the training curves, sample grids and settings only.

    Raises:
        DiffalignError: the folder is not a run.
    """
    run = Path(run_folder)
    config = load_run_config(run)
    history = read_history(run)
    held_out = evaluation.held_out if evaluation else held_out_metrics(history)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffalign.evaluation"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": wording.share, "share_interval": wording.share_interval}
    html = environment.get_template("report.html.jinja").render(
        title=config.name,
        lead=_lead(config),
        version=__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        result=_result(evaluation.comparison) if evaluation else None,
        implicit=implicit_summary(held_out),
        galleries=_galleries(evaluation) if evaluation else [],
        curves=_curves(history),
        samples=_sample_grids(run),
        settings=_settings(config, evaluation),
        config_text=(run / "config.yaml").read_text(encoding="utf-8"),
    )
    path = run / "report.html"
    write_text(path, html)
    return path


def _lead(config: RunConfig) -> str:
    """What was done, in a sentence."""
    tune = f"LoRA of rank {config.model.lora.rank}" if config.model.tune == "lora" else "full fine-tuning"
    pairs = config.optim.batch_size * config.optim.accumulation
    return (
        f"{config.model.path}, {tune}, method {config.trainer.get('method', '?')}, "
        f"{config.optim.steps} steps of {pairs} pairs per process from {config.data.source}."
    )


def _result(comparison: Comparison) -> dict[str, Any]:
    """Everything the result section shows."""
    return {
        "verdict": wording.verdict(comparison),
        "change": comparison.main.change,
        "main": _numbers(comparison.main),
        "metrics": [_numbers(metric) for metric in comparison.metrics.values()],
        "panels": _panels(comparison),
    }


def _numbers(metric: Metric) -> dict[str, Any]:
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


def _curves(history: list[dict[str, Any]]) -> list[Panel]:
    """Training curves; a chart without data is left out."""
    plans: list[tuple[str, float | None, list[tuple[str, str, str, bool]], str]] = [
        ("Loss", None, [("training", "loss", TUNED, False)], "Diffusion losses are noisy: watch the trend."),
        (
            "Implicit accuracy",
            0.5,
            [
                ("training", "implicit_accuracy", BASE, False),
                ("held out", "held_out/implicit_accuracy", TUNED, True),
            ],
            "Share of pairs whose preferred picture the policy now explains better than the reference. A "
            "falling held-out curve beside a rising training curve is overfitting.",
        ),
        (
            "Margin",
            0.0,
            [("training", "margin", BASE, False), ("held out", "held_out/margin", TUNED, True)],
            "The logit of the loss: 0 at the start.",
        ),
        (
            "Error against the reference",
            0.0,
            [("chosen", "chosen_delta", TUNED, False), ("rejected", "rejected_delta", "#d1495b", False)],
            "Above 0: the policy fits these pictures worse than the reference did. When both rise, quality "
            "is being traded for margin.",
        ),
    ]
    panels = []
    for title, neutral, lines, caption in plans:
        drawn = [Curve(label, series(history, name), color, dashed) for label, name, color, dashed in lines]
        drawn = [curve for curve in drawn if curve.points]
        if drawn:
            panels.append(Panel(Markup(curves(drawn, title=title, neutral=neutral)), caption))
    return panels


def _galleries(evaluation: Evaluation) -> list[Gallery]:
    comparison = evaluation.comparison
    chosen = (
        ("Random pairs", "Drawn without looking at the scores.", random_rows(comparison, EXAMPLES)),
        ("Biggest gains", f"By {comparison.main.name}.", biggest_gains(comparison, EXAMPLES)),
        ("What was lost", f"Largest falls in {comparison.main.name}.", biggest_losses(comparison, EXAMPLES)),
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


def _sample_grids(run: Path) -> list[dict[str, str]]:
    """At most six sample grids of the training, evenly spaced, first and last among them."""
    paths = sorted((run / "samples").glob("step-*.png"))
    shown = [paths[i] for i in spread(len(paths), SAMPLE_GRIDS)]
    grids = []
    for path in shown:
        with Image.open(path) as image:
            grids.append(
                {
                    "step": path.stem.removeprefix("step-").lstrip("0") or "0",
                    "src": data_uri(image, GRID_SIZE),
                }
            )
    return grids


def spread(total: int, most: int) -> list[int]:
    """At most `most` indices of 0..total-1, evenly spaced, ends included."""
    if total <= most:
        return list(range(total))
    return [round(i * (total - 1) / (most - 1)) for i in range(most)]


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


def _settings(config: RunConfig, evaluation: Evaluation | None) -> list[tuple[str, str]]:
    """What is needed to do it again, as label and text."""
    facts: list[tuple[str, Any]] = [
        ("model", config.model.path + (f" at {config.model.revision}" if config.model.revision else "")),
        ("training pairs", f"{config.data.source}, {config.data.resolution} px, labels {config.data.labels}"),
        ("held-out pairs", config.data.held_out),
        ("method", _method(config)),
        (
            "optimiser",
            f"{config.optim.optimizer}, learning rate {config.optim.lr:g}, {config.optim.schedule}",
        ),
        ("run seed", config.seed),
    ]
    used = versions()
    if evaluation:
        settings = dict(evaluation.settings)
        used = settings.pop("versions", used)
        facts += [(f"evaluation: {key.replace('_', ' ')}", value) for key, value in settings.items()]
    facts.append(("versions", ", ".join(f"{name} {number}" for name, number in used.items())))
    return [(label, _plain(value)) for label, value in facts if value is not None]


def _method(config: RunConfig) -> str:
    """The method with beta and the reduction it belongs to."""
    options = dict(config.trainer)
    method = str(options.pop("method", "?"))
    if "beta" not in options:
        return method
    reduction = options.get("reduction", "mean")
    return f"{method}, beta {options['beta']:g} for errors that are a {reduction} over latent elements"


def _plain(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )
