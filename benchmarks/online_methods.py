"""Online methods on the embedded world at an equal number of generated samples: gain on held-out prompts, and curves.

    python -m benchmarks.online_methods run --folder runs/online --samples 4096 --jobs 2
    python -m benchmarks.online_methods table --folder runs/online --plot docs/images/online_methods.png

A cell is an ordinary `diffalign train` and `diffalign evaluate` in processes of their own. Finished cells are kept, and
unfinished ones are resumed. Curves are the gain on fixed held-out prompts over samples drawn and over seconds, at four
looks: the means of rounds scatter with their prompts by as much as is gained.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.processes import Threads, run_commands, shared_out
from diffalign.config import load_recipe, load_run_config, trainer_config
from diffalign.metrics import read_metrics

app = typer.Typer(help=__doc__, no_args_is_help=True)
console = Console()

RECIPES: Mapping[str, str] = {
    "PRDP": "scenes/prdp",
    "DRAGON": "scenes/dragon",
    "RAFT": "scenes/raft",
    "DDPO": "scenes/ddpo",
    "NFT": "scenes/nft",
    "online DPO": "scenes/online_dpo",
    "RLCM": "scenes/rlcm",
    "Flow-GRPO": "scenes/flow_grpo",
}
"""Rows of the table; RLCM tunes `tiny-lcm`, Flow-GRPO `tiny-sd3`, the others `tiny-sdxl`."""
REWARDS = ("scenes-judge", "scenes-preference")
"""What every evaluation measures."""
WATCHED = "scenes-judge-score"
"""What the curves show: the share of the judge's checks that hold."""
LOOKS = 4
"""Looks of a run after that at the base."""
COLUMNS: Mapping[str, tuple[str, float]] = {
    "right, points": ("scenes-judge", 100),
    "share of checks, points": ("scenes-judge/score", 100),
    "preference model": ("scenes-preference", 1),
}
"""Columns of gains: the metric of an evaluation, and its unit."""
OPTIMISED: Mapping[str, Mapping[str, object]] = {
    "judge": {},
    "preference": {"trainer.reward": "scenes-preference"},
    "ensemble": {
        "trainer.reward": {
            "reward": "uwo",
            "of": ["scenes-preference", "scenes-clip", "scenes-aesthetic"],
            "normalise": "calibrated",
        },
        "trainer.uncertainty": 1.0,
    },
}
"""What is optimised, as settings of the recipe: its own reward (the judge: right or wrong, or the share of its checks),
one weak proxy, or different scorers whose disagreement lowers the score and the weight of a sample."""


@dataclass(frozen=True)
class Run:
    """One run: a method, what it optimises (a key of `OPTIMISED`), a seed."""

    method: str
    reward: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.method.replace(' ', '-')}-{self.reward}-s{self.seed}"


def budget(recipe: str, samples: int) -> int:
    """Optimiser steps in which a recipe draws about this many samples."""
    options = trainer_config(load_recipe(recipe))
    return max(1, round(samples / round_size(options))) * int(options.updates * options.passes)


def round_size(options: Any) -> int:
    """Samples that a round of a trainer's options draws."""
    return int(options.prompts_per_round * options.samples)


def commands(run: Run, folder: Path, samples: int, prompts: int) -> list[list[str]]:
    """Training and evaluation of a cell."""
    program, recipe = [sys.executable, "-m", "diffalign"], RECIPES[run.method]
    steps = budget(recipe, samples)
    watched = [REWARDS[0], {"reward": REWARDS[0], "measure": "score"}]
    values: dict[str, object] = {
        "output_dir": folder,
        "data.cache_dir": folder / "cache",
        "seed": run.seed,
        "model.precision": "bf16",
        "optim.steps": steps,
        "checkpoint.every": max(1, steps // LOOKS),
        "evaluation.every": max(1, steps // LOOKS),
        "evaluation.rewards": watched,
        "evaluation.monitor.num_prompts": prompts // 2,
        "evaluation.num_prompts": prompts,
    }
    values |= OPTIMISED[run.reward]
    words = [f"{key}={json.dumps(v) if isinstance(v, dict | list) else v}" for key, v in values.items()]
    resume = ["--resume"] if (folder / run.name / "checkpoints").is_dir() else []
    return [
        [*program, "train", recipe, f"name={run.name}", *words, *resume],
        [*program, "evaluate", str(folder / run.name), "--rewards", ",".join(REWARDS)],
    ]


def run_cell(run: Run, folder: Path, samples: int, prompts: int, threads: int) -> str:
    """Train and evaluate a cell unless it is done; returns how it went in a line."""
    result = folder / run.name / "evaluation.json"
    if not result.is_file():
        work = commands(run, folder, samples, prompts)
        wrong = run_commands(work, folder / f"{run.name}.log", threads, "a")
        if wrong:
            return f"{run.name}: {wrong}"
    judge = json.loads(result.read_text(encoding="utf-8"))["metrics"][REWARDS[0]]
    return f"{run.name}: {judge['base']:.3f} to {judge['tuned']:.3f}"


def curve(folder: Path, run: Run) -> dict[str, list[float]]:
    """Gain of the watched reward in points at every look, over samples drawn before and seconds since the first."""
    options = trainer_config(load_run_config(folder / run.name))
    each = round_size(options)
    name = f"monitor/{WATCHED}"
    looks = [line for line in read_metrics(folder / run.name / "metrics.jsonl") if name in line]
    return {
        "samples": [line["step"] // (options.updates * options.passes) * each for line in looks],
        "seconds": [line["seconds"] - looks[0]["seconds"] for line in looks],
        "gain": [100 * (line[name] - looks[0][name]) for line in looks],
    }


def table(
    done: Mapping[Run, Mapping[str, Any]],
    samples: Mapping[Run, int],
    seconds: Mapping[Run, float],
) -> list[str]:
    """Markdown: gains in points or in the metric's units, distance, samples and seconds, one line per method."""
    lines = [
        f"| method | optimised | {' | '.join(COLUMNS)} | nats | samples | seconds |",
        f"|---|---|{'---|' * len(COLUMNS)}---|---|---|",
    ]
    for method, reward in dict.fromkeys((run.method, run.reward) for run in done):
        runs = [run for run in done if (run.method, run.reward) == (method, reward)]
        gains = [
            gain([done[run]["metrics"][name] for run in runs], factor) for name, factor in COLUMNS.values()
        ]
        nats = statistics.mean(done[run]["drift"]["kl"] for run in runs)
        drawn = samples[runs[0]]
        time = statistics.mean(seconds[run] for run in runs)
        lines.append(f"| {method} | {reward} | {' | '.join(gains)} | {nats:.1f} | {drawn:,} | {time:.0f} |")
    return lines


def drawn_samples(folder: Path, run: Run) -> int:
    """Samples of all rounds of a run, which need not be those of the recipe of today."""
    options = trainer_config(load_run_config(folder / run.name))
    rounds = [line for line in read_metrics(folder / run.name / "metrics.jsonl") if "round/reward" in line]
    return len(rounds) * round_size(options)


def duration(folder: Path, run: Run) -> float:
    """Seconds of training, to the last line that was written down."""
    return max(
        (line.get("seconds", 0.0) for line in read_metrics(folder / run.name / "metrics.jsonl")), default=0.0
    )


def gain(metrics: Sequence[Mapping[str, Any]], factor: float) -> str:
    """Difference to the base: one run with its interval, or the mean over seeds with their spread."""
    values = [factor * metric["difference"] for metric in metrics]
    if len(values) == 1:
        low, high = (factor * bound for bound in metrics[0]["interval"])
        return f"{values[0]:+.1f} ({low:+.1f} to {high:+.1f})"
    each = ", ".join(f"{value:+.1f}" for value in values)
    return f"{statistics.mean(values):+.1f} ± {statistics.stdev(values):.1f} ({each})"


def averaged(curves: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Mean of the curves of some seeds, look by look."""
    keys = curves[0].keys()
    return {key: [statistics.mean(v) for v in zip(*(c[key] for c in curves), strict=False)] for key in keys}


def draw(curves: Mapping[Run, Mapping[str, list[float]]], path: Path) -> None:
    """Gain over samples drawn (left) and over seconds (right), a line per method."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for number, method in enumerate(RECIPES):
        own = [found for run, found in curves.items() if run.method == method and found["gain"]]
        if not own:
            continue
        mean = averaged(own)
        label = f"{method}, {len(own)} seeds" if len(own) > 1 else method
        for axes, key in zip(panels, ("samples", "seconds"), strict=True):
            axes.plot(mean[key], mean["gain"], color=f"C{number}", label=label, lw=1.3, marker="o", ms=3)
    for axes, title in zip(panels, ("samples drawn", "seconds, looks included"), strict=True):
        axes.axhline(0, color="0.6", lw=0.8)
        axes.set_xlabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of the judge's checks that hold, points over the base")
    panels[0].legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


Folder = Annotated[Path, typer.Option(help="Where runs, caches and logs are kept.")]
Only = Annotated[list[str] | None, typer.Option(help="Methods; default all.")]


def chosen(only: Sequence[str] | None, rewards: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The runs in the order they are made: seeds last.

    Raises:
        ValueError: an unknown method or reward.
    """
    if unknown := set(rewards) - set(OPTIMISED):
        raise ValueError(f"{sorted(unknown)} should be of: {', '.join(OPTIMISED)}")
    if unknown := set(only or []) - set(RECIPES):
        raise ValueError(f"{sorted(unknown)} should be of: {', '.join(RECIPES)}")
    return [Run(m, r, s) for s in seeds for r in rewards for m in RECIPES if m in (only or RECIPES)]


@app.command("run")
def run_all(
    folder: Folder = Path("runs/online"),
    only: Only = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="judge, preference or ensemble; default judge.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; default 0.")] = None,
    samples: Annotated[int, typer.Option(help="Samples that each run draws, about.")] = 4096,
    prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 288,
    jobs: Annotated[int, typer.Option(help="Runs at once.")] = 1,
    threads: Threads = None,
) -> None:
    """Run the cells that are not done."""
    folder.mkdir(parents=True, exist_ok=True)
    each = threads or shared_out(jobs)
    with ThreadPoolExecutor(jobs) as pool:
        wanted = chosen(only, reward or ["judge"], seed or [0])
        for line in pool.map(lambda run: run_cell(run, folder, samples, prompts, each), wanted):
            console.print(line)


@app.command("table")
def write_table(
    folder: Folder = Path("runs/online"),
    out: Annotated[Path | None, typer.Option(help="Markdown file; default the screen.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the curves here.")] = None,
) -> None:
    """Write the table of all finished cells, and draw their curves."""
    done = {
        run: json.loads((folder / run.name / "evaluation.json").read_text(encoding="utf-8"))
        for run in chosen(None, list(OPTIMISED), range(10))
        if (folder / run.name / "evaluation.json").is_file()
    }
    samples = {run: drawn_samples(folder, run) for run in done}
    text = "\n".join(table(done, samples, {run: duration(folder, run) for run in done})) + "\n"
    if out is None:
        console.print(text, soft_wrap=True)
    else:
        out.write_text(text, encoding="utf-8")
    if plot is not None:
        draw({run: curve(folder, run) for run in done if run.reward == "judge"}, plot)


if __name__ == "__main__":
    app()
