"""Judge accuracy on held-out prompts over optimiser steps, for some methods of the matrix.

    python -m benchmarks.learning_curves --method dpo --method inpo --plot docs/images/inpo_curves.png

Each run is watched by the monitor every few steps: the same prompts and seeds throughout, compared with the base.
Finished runs are kept, so more methods can be added to a plot.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.method_cells import BACKBONES, METHODS, cell
from benchmarks.processes import Threads, run_commands, shared_out
from diffalign.metrics import read_metrics

NAME = "monitor/scenes-judge"


def command(method: str, backbone: str, folder: Path, steps: int, every: int, prompts: int) -> list[str]:
    """Training of one method with looks every few steps."""
    chosen = cell(method, backbone, 0)
    values: Mapping[str, Any] = {
        **chosen.overrides,
        "output_dir": folder,
        "data.cache_dir": folder / "cache",
        "optim.steps": steps,
        "checkpoint.every": steps,
        "evaluation.every": every,
        "evaluation.rewards": "[scenes-judge]",
        "evaluation.monitor.num_prompts": prompts,
    }
    words = [f"{key}={value}" for key, value in values.items()]
    return [sys.executable, "-m", "diffalign", "train", chosen.recipe, f"name={chosen.name}", *words]


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """Step, judge accuracy and KL proxy in nats of every look."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if NAME in line]
    return [(line["step"], line[NAME], line["monitor/kl"]) for line in lines]


def draw(curves: Mapping[str, list[tuple[int, float, float]]], prompts: int, path: Path) -> None:
    """Accuracy over steps (left) and over the distance from the base (right)."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, found in curves.items():
        steps, values, nats = (list(column) for column in zip(*found, strict=True))
        shown = [100 * value for value in values]
        panels[0].plot(steps, shown, marker="o", ms=3, label=name)
        panels[1].plot([math.sqrt(max(0.0, value)) for value in nats], shown, marker="o", ms=3)
    for axes, title in zip(panels, ("optimiser steps", "square root of nats from the base"), strict=True):
        axes.set_xlabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"judge, % right of {prompts} prompts")
    panels[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    method: Annotated[list[str], typer.Option(help=f"Of: {', '.join(METHODS)}.")],
    backbone: Annotated[str, typer.Option(help=f"Of: {', '.join(BACKBONES)}.")] = "tiny-sdxl",
    folder: Annotated[Path, typer.Option(help="Where runs, caches and logs are kept.")] = Path("runs/curves"),
    steps: Annotated[int, typer.Option(min=1)] = 200,
    every: Annotated[int, typer.Option(min=1, help="Steps between looks.")] = 25,
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts of a look.")] = 288,
    threads: Threads = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves here.")] = None,
) -> None:
    """Train what is not done, and show the curves."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = {}
    for name in method:
        run = folder / cell(name, backbone, 0).name
        if not (run / "final").is_dir():
            words = command(name, backbone, folder, steps, every, prompts)
            wrong = run_commands([words], folder / f"{run.name}.log", threads or shared_out(1))
            if wrong:
                raise RuntimeError(f"{run.name}: {wrong}")
        curves[name] = curve(run)
    table = Table(title=f"Judge, % right of {prompts} held-out prompts")
    for heading in ("method", *(str(step) for step, *_ in next(iter(curves.values())))):
        table.add_column(heading, justify="right")
    for name, found in curves.items():
        table.add_row(name, *(f"{100 * value:.1f}" for _, value, _ in found))
    Console(width=120).print(table)
    if plot is not None:
        draw(curves, prompts, plot)


if __name__ == "__main__":
    typer.run(main)
