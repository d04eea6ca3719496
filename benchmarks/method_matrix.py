"""Every method on every embedded backbone with an equal budget: what each gains over the base on held-out prompts.

    python -m benchmarks.method_matrix run --folder runs/matrix --jobs 2
    python -m benchmarks.method_matrix table --folder runs/matrix --out docs/method_matrix.md

A cell is an ordinary `diffalign train` and `diffalign evaluate` in processes of their own. Finished cells are kept, so
an interrupted matrix goes on where it stopped. What is in the matrix stands in `method_cells.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.method_cells import (
    BACKBONES,
    RELABELLED,
    WRONG_ATTRIBUTES,
    Cell,
    Result,
    cells,
    table,
    table_of_settings,
)
from benchmarks.processes import Threads, run_commands, shared_out
from benchmarks.relabelled import relabelled_name, write_relabelled
from benchmarks.wrong_attributes import write_pairs

app = typer.Typer(help=__doc__, no_args_is_help=True)
console = Console()


def commands(cell: Cell, folder: Path, steps: int, prompts: int) -> list[list[str]]:
    """The two commands of a cell: training and evaluation."""
    program = [sys.executable, "-m", "diffalign"]
    fixed = {
        "output_dir": folder,
        "data.cache_dir": folder / "cache",
        "seed": cell.seed,
        "optim.steps": steps,
        "checkpoint.every": steps,
        "evaluation.every": 0,
        "evaluation.monitor.num_prompts": 0,
        "evaluation.num_prompts": prompts,
    }
    values = [f"{key}={value}" for key, value in {**in_folder(cell.overrides, folder), **fixed}.items()]
    return [
        [*program, "train", cell.recipe, f"name={cell.name}", *values],
        [*program, "evaluate", str(folder / cell.name), "--rewards", "scenes-judge"],
    ]


def in_folder(overrides: Mapping[str, object], folder: Path) -> Mapping[str, object]:
    """Overrides with a data source that was made beside the runs as its path."""
    source = str(overrides.get("data.source", ""))
    made = source == WRONG_ATTRIBUTES or source.startswith(relabelled_name(0)[:-1])
    return {**overrides, "data.source": folder / source} if made else overrides


def make_data(chosen: Sequence[Cell], folder: Path) -> None:
    """Write the data sets that cells need and nobody ships."""
    for source in {str(cell.overrides.get("data.source", "")) for cell in chosen}:
        if source == WRONG_ATTRIBUTES:
            write_pairs(folder / source)
    for share in {cell.flipped for cell in chosen if cell.method == RELABELLED}:
        write_relabelled(folder, share)


def run_cell(cell: Cell, folder: Path, steps: int, prompts: int, threads: int) -> str:
    """Train and evaluate a cell unless it is done; returns how it went in a line."""
    result = folder / cell.name / "evaluation.json"
    if result.is_file():
        return f"{cell.name}: done before"
    wrong = run_commands(commands(cell, folder, steps, prompts), folder / f"{cell.name}.log", threads)
    if wrong:
        return f"{cell.name}: {wrong}"
    judge = json.loads(result.read_text(encoding="utf-8"))["metrics"]["scenes-judge"]
    return f"{cell.name}: {judge['base']:.3f} to {judge['tuned']:.3f}"


@app.command()
def run(
    folder: Annotated[Path, typer.Option(help="Where runs, caches and logs are kept.")] = Path("runs/matrix"),
    only: Annotated[list[str] | None, typer.Option(help="Methods; default all.")] = None,
    backbone: Annotated[list[str] | None, typer.Option(help="Backbones; default all.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; default 0.")] = None,
    group: Annotated[str, typer.Option(help="matrix, label_noise or dual_captions.")] = "matrix",
    share: Annotated[list[float] | None, typer.Option(help="Shares of flipped labels; default all.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps of 16 pairs.")] = 200,
    prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 288,
    jobs: Annotated[int, typer.Option(help="Cells at once.")] = 1,
    threads: Threads = None,
) -> None:
    """Run the cells that are not done."""
    known = cells(group, only, backbone or list(BACKBONES), seed or [0])
    chosen = [cell for cell in known if not share or cell.flipped in share]
    folder.mkdir(parents=True, exist_ok=True)
    make_data(chosen, folder)
    each = threads or shared_out(jobs)
    with ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(lambda cell: run_cell(cell, folder, steps, prompts, each), chosen):
            console.print(line)


@app.command("table")
def write_table(
    folder: Annotated[Path, typer.Option(help="Where the runs are.")] = Path("runs/matrix"),
    group: Annotated[str, typer.Option(help="matrix, label_noise or dual_captions.")] = "matrix",
    out: Annotated[Path | None, typer.Option(help="Markdown file; default the screen.")] = None,
) -> None:
    """Write the table of all finished cells."""
    done = results(folder, cells(group, None, list(BACKBONES), list(range(10))))
    text = "\n".join([*table(done, group), "", *table_of_settings(done)]) + "\n"
    if out is None:
        console.print(text, soft_wrap=True)
    else:
        out.write_text(text, encoding="utf-8")


def results(folder: Path, wanted: Sequence[Cell]) -> list[Result]:
    """Cells that are done, with their evaluations."""
    found = []
    for cell in wanted:
        path = folder / cell.name / "evaluation.json"
        if path.is_file():
            found.append((cell, json.loads(path.read_text(encoding="utf-8"))))
    return found


if __name__ == "__main__":
    app()
