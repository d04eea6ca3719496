"""The report of a run: one HTML file with everything in it, which needs no other file and no network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from diffalign import __version__
from diffalign.config import RunConfig, load_run_config
from diffalign.evaluation import wording
from diffalign.evaluation.charts import BASE, TUNED, Curve, curves
from diffalign.evaluation.history import (
    held_out_metrics,
    monitored_rewards,
    paired_series,
    read_history,
    relative_series,
    series,
)
from diffalign.evaluation.result import Evaluation, implicit_summary, write_text
from diffalign.evaluation.sections import (
    Panel,
    data_uri,
    galleries,
    lost_section,
    result_section,
    sets_section,
)
from diffalign.evaluation.sections import side_effects_section as side_section
from diffalign.versions import versions

SAMPLE_GRIDS = 6
GRID_SIZE = 900
MONITOR_COLORS = (TUNED, "#d1495b", "#d9a21b", BASE)


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
        warnings=evaluation.warnings if evaluation else [],
        result=result_section(evaluation.comparison) if evaluation else None,
        implicit=implicit_summary(held_out),
        sets=sets_section(evaluation) if evaluation else [],
        side_effects=side_section(evaluation) if evaluation else None,
        lost=lost_section(evaluation) if evaluation else None,
        galleries=galleries(evaluation) if evaluation else [],
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
    return panels + _monitor_panels(history)


def _monitor_panels(history: list[dict[str, Any]]) -> list[Panel]:
    """What the over-optimisation monitor saw: scores over drift, and what tuning costs."""
    panels = []
    over_drift = [
        Curve(name, paired_series(history, "monitor/drift", f"monitor/{name}/win_rate"), color)
        for name, color in zip(monitored_rewards(history), cycle(MONITOR_COLORS), strict=False)
    ]
    over_drift = [curve for curve in over_drift if len(curve.points) > 1]
    if over_drift:
        title = "Win rate against the base, over drift"
        chart = curves(over_drift, title=title, neutral=0.5, axis="distance from the base, sqrt(KL) in nats")
        caption = (
            "Fixed prompts and seeds. A reward that training does not optimise and that turns down while the distance "
            "grows is over-optimisation: stop there."
        )
        panels.append(Panel(Markup(chart), caption))
    costs = [
        Curve(name, relative_series(history, f"monitor/{name}"), color)
        for name, color in zip(("diversity", "sharpness", "saturation"), MONITOR_COLORS, strict=False)
    ]
    costs = [curve for curve in costs if len(curve.points) > 1]
    if costs:
        chart = curves(costs, title="Side effects, relative to the base", neutral=1.0)
        caption = "Diversity that falls is collapse; sharpness or saturation that rises is often a cheat."
        panels.append(Panel(Markup(chart), caption))
    return panels


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
