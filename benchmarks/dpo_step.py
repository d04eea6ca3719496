"""Pairs per second and peak memory of a Diffusion-DPO step: ours against a reference-style one.

    python -m benchmarks.dpo_step --repeats 30 --json result.json

What the two kinds of step do, and how they are timed, stands in README.md beside this file.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import timing
from benchmarks.reference_style import ReferenceStyleStep
from diffalign.backbones import open_backbone
from diffalign.config import RunConfig, load_recipe, trainer_class, trainer_config
from diffalign.data.cache import build_cache
from diffalign.data.sources import open_records
from diffalign.engine.parallel import Parallel
from diffalign.engine.run import Run
from diffalign.metrics import log_every

RECIPE = "scenes/dpo"
REFERENCE_STYLE = "reference-style, fp32"
MEMORY_STEPS = 3
DATA_BATCHES = 8
REFERENCE_DRAWS = 2


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Fields:
        model, data: as in a recipe. targets: which layers get adapters. pairs: batch size. device: cpu or cuda.
        folder: where caches are kept.
    """

    model: str
    data: str
    targets: str
    pairs: int
    device: str
    folder: str


@dataclass(frozen=True)
class Mode:
    """A way to take a step; `reference` None is the reference-style step."""

    name: str
    precision: str
    reference: str | None
    compiled: bool = False


def modes(precisions: Sequence[str], compiled: bool = False) -> list[Mode]:
    """The reference-style step, then ours in each precision, without and with stored reference errors.

    With `compiled` each of ours also with `model.compile`.
    """
    references = {"adapters_off": "", "cached": ", cached reference"}
    ours = [
        Mode(f"ours, {p}{words}{', compiled' if compile else ''}", p, reference, compile)
        for compile in (False, *([True] if compiled else []))
        for reference, words in references.items()
        for p in precisions
    ]
    return [Mode(REFERENCE_STYLE, "fp32", None), *ours]


def run_config(mode: Mode, settings: Settings) -> RunConfig:
    """The recipe of the embedded world in a mode."""
    return load_recipe(
        RECIPE,
        [
            f"model.path={settings.model}",
            f"model.precision={mode.precision}",
            f"model.compile={str(mode.compiled).lower()}",
            f"model.lora.targets={settings.targets}",
            f"data.source={settings.data}",
            "data.held_out=null",
            f"data.limit={DATA_BATCHES * settings.pairs}",
            f"data.cache_dir={settings.folder}",
            f"trainer.reference={mode.reference or 'adapters_off'}",
            f"trainer.reference_draws={REFERENCE_DRAWS}",
            f"optim.batch_size={settings.pairs}",
        ],
    )


def open_step(mode: Mode, settings: Settings) -> Callable[[], Any]:
    """A function that takes one training step in a mode."""
    config = run_config(mode, settings)
    if mode.reference is None:
        return ReferenceStyleStep(config, open_records(config.data), torch.device(settings.device))
    return our_step(config, Path(settings.folder) / f"reference-{mode.precision}")


def our_step(config: RunConfig, folder: Path) -> Callable[[], Any]:
    """Our step of any method on pairs as the engine takes it: fetch, loss, backward, checks, clipping, update, metrics.

    The engine fetches on another thread; here fetching waits its turn, so that all of it is timed.
    """
    parallel, kind, options = Parallel(), trainer_class(config), trainer_config(config)
    backbone = open_backbone(
        config.model,
        device=parallel.device,
        resolution=config.data.resolution,
        frozen_copy=kind.needs_frozen_copy(options, config.model.tune),
    )
    cache = build_cache(open_records(config.data), lambda: backbone, config.data, config.model, config.seed)
    backbone.release_encoders()
    trainer = kind(options, backbone, config.seed)
    trainer.prepare(cache, folder)
    run = Run(config, parallel, backbone, trainer)
    batches = (trainer.fetch(draw) for draw in run.draws(len(cache)))
    every = log_every(config.optim.steps)

    def step() -> None:
        run.step(batches)
        if run.counters.step % every == 0:
            run.mean_metrics()

    return step


def peak_memory(mode: Mode, settings: Settings) -> float:
    """Peak MB of a few steps in a mode, opening it included.

    On a GPU what its allocator gave out; on a CPU the growth of the resident set since Python and the libraries
    were loaded.
    """
    before = timing.resident_memory()
    step = open_step(mode, settings)
    for _ in range(MEMORY_STEPS):
        step()
    if settings.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return timing.peak_resident_memory() - before


def measure(
    settings: Settings, chosen: Sequence[Mode], repeats: int, warmup: int, memory: bool
) -> dict[str, Any]:
    """Time all modes in this process in turns, then take the memory of each in a process of its own."""
    device = torch.device(settings.device)
    machine = timing.machine(device)
    steps = {mode.name: open_step(mode, settings) for mode in chosen}
    seconds = timing.interleaved(steps, repeats, warmup, device)
    ratios = timing.ratios(seconds, REFERENCE_STYLE)
    rows = []
    for mode in chosen:
        median = statistics.median(seconds[mode.name])
        row = {"mode": mode.name, "seconds": median, "pairs_per_second": settings.pairs / median}
        row |= {"ratio": ratios[mode.name], "all_seconds": seconds[mode.name]}
        row["peak_memory_mb"] = timing.in_fresh_process(peak_memory, mode, settings) if memory else None
        rows.append(row)
    described = {key: value for key, value in asdict(settings).items() if key != "folder"}
    return {"machine": machine, "settings": {**described, "repeats": repeats, "warmup": warmup}, "rows": rows}


def show(result: dict[str, Any], console: Console) -> None:
    """Print the machine and the table."""
    console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), soft_wrap=True)
    settings = result["settings"]
    title = f"Diffusion-DPO step, {settings['pairs']} pairs, LoRA on {settings['targets']}"
    table = Table("step", *(("seconds", "pairs/s", "times as fast", "peak MB")), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in result["rows"]:
        memory = "" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}"
        table.add_row(
            row["mode"],
            f"{row['seconds']:.4f}",
            f"{row['pairs_per_second']:.1f}",
            f"{row['ratio']:.2f}",
            memory,
        )
    console.print(table)


def main(
    pairs: Annotated[int, typer.Option(min=1, help="Pairs per step.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each mode.")] = 30,
    warmup: Annotated[int, typer.Option(min=0, help="Steps of each mode before timing.")] = 3,
    precision: Annotated[
        str, typer.Option(help="Our precisions, comma-separated: fp32, bf16, fp16.")
    ] = "fp32,bf16",
    model: Annotated[str, typer.Option(help="An SDXL-type model, as in a recipe.")] = "scenes:tiny-sdxl",
    data: Annotated[str, typer.Option(help="Preference pairs, as in a recipe.")] = "scenes:preferences",
    targets: Annotated[
        str,
        typer.Option(help="Adapted layers: attention (as the public scripts), attention+conv, all-linear."),
    ] = "attention",
    compiled: Annotated[
        bool, typer.Option(help="Measure model.compile too; needs a C++ compiler, and minutes to compile.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in a process per mode.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all numbers here.")] = None,
) -> None:
    """Measure our Diffusion-DPO step against a reference-style one."""
    device = timing.chosen_device(device)
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(model, data, targets, pairs, device, folder)
        result = measure(settings, modes(precision.split(","), compiled), repeats, warmup, memory)
    show(result, Console())
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
