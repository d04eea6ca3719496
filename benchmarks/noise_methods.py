"""Methods on the noise at an equal budget on the embedded world: optimised reward, and rewards that were not optimised.

    python -m benchmarks.noise_methods run --folder runs/noise
    python -m benchmarks.noise_methods table --folder runs/noise

A row is an ordinary `diffalign optimize` in a process of its own. Finished rows are kept. Groups:

- `methods`: every method that fits a multi-step model, on `tiny-sdxl` in eight steps with noise, for as much as 32
  pictures; a backward pass counts as two network evaluations.
- `caution`: ReNO on `tiny-lcm` for 50 iterations, on single scorers and on the lower bound of an ensemble; the judge is
  gold.
- `diversity`: the archive of QDHF on `tiny-lcm` against as many independent noises.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.processes import Threads, run_commands, shared_out
from diffalign.evaluation.statistics import paired_difference

app = typer.Typer(help=__doc__, no_args_is_help=True)
console = Console()

COST = 16
"""Network evaluations of a picture: eight steps with guidance."""
EVALUATIONS = 32 * COST
BEST_OF_N = "best-of-N"
JUDGE = "scenes-judge"
WORST_OF_THREE = (
    "{reward: wco, of: [scenes-clip, {reward: augmented, of: scenes-preference, noise: 0.1, crop: 0.2}, "
    "scenes-aesthetic], normalise: calibrated}"
)
"""The lowest of three scorers that learned different things, each with mean 0 and std 1 on the base's pictures."""


@dataclass(frozen=True)
class Group:
    """Rows that are compared.

    Fields:
        recipe: of `configs/`. prompts: how many of the held-out ones. common: overrides of all rows.
        rows: method and further overrides by name.
    """

    recipe: str
    prompts: int
    common: Mapping[str, object]
    rows: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def with_gradients(method: str, **options: object) -> dict[str, object]:
    """A gradient method whose forward and backward passes cost what the budget is: 1 + 2 evaluations a step."""
    pictures = EVALUATIONS // (3 * COST)
    limit: dict[str, object] = {"budget.evaluations": None, "method.iterations": pictures}
    if method in ("universal_guidance", "noisy_reward"):
        limit = {"budget.evaluations": pictures * COST}
    return {**without_gradients(method, **options), **limit}


def without_gradients(method: str, **options: object) -> dict[str, object]:
    """A method that may spend the whole budget on pictures."""
    return {"method.method": method, **{f"method.{name}": value for name, value in options.items()}}


GROUPS: Mapping[str, Group] = {
    "methods": Group(
        "optimize/tiny_sdxl",
        32,
        {
            "generation.steps": 8,
            "generation.kernel": "ddim",
            "generation.noise": 1,
            "generation.guidance": 4,
            "generation.batch_size": 16,
            "reward": "scenes-preference",
            "held_out": f"[{JUDGE}, scenes-clip]",
            "budget.evaluations": EVALUATIONS,
        },
        {
            BEST_OF_N: without_gradients("best_of_n"),
            "random search with pivots": without_gradients("random_search"),
            "zero-order": without_gradients("zero_order"),
            "CMA-ES": without_gradients("evolution", candidates=8),
            "ZO-RankSGD": without_gradients("rank_sgd"),
            "search over paths": without_gradients("paths", start=0.7),
            "DNO, all noises": with_gradients("dno", lr=0.05),
            "ReNO, initial noise": with_gradients("reno"),
            "FK": without_gradients("fk", particles=8, strength=2, every=1),
            "SVDD": without_gradients("svdd"),
            "Demon": without_gradients("demon", candidates=8),
            "universal guidance": with_gradients("universal_guidance"),
            # Its reward reads the network up to the middle and back, which is not counted as an evaluation.
            "guidance by a reward of noisy latents": with_gradients(
                "noisy_reward", scorer="scenes-latent", strength=10
            ),
        },
    ),
    "caution": Group(
        "optimize/tiny_lcm",
        100,
        {"generation.batch_size": 20, "held_out": f"[{JUDGE}, scenes-clip, scenes-aesthetic]"},
        {
            "scenes-preference": {"reward": "scenes-preference"},
            "scenes-clip": {"reward": "scenes-clip"},
            "scenes-ensemble, mean - 1 std": {"reward": "scenes-ensemble", "caution": 1},
            "worst of three kinds": {"reward": WORST_OF_THREE, "caution": 0},
        },
    ),
    "diversity": Group(
        "optimize/tiny_lcm",
        12,
        {"method.method": "qd", "reward": "scenes-preference", "held_out": f"[{JUDGE}]"},
        {"640 pictures": {"budget.evaluations": 640}},
    ),
}


def folder_name(group: str, row: str) -> str:
    """Name of a row's folder."""
    return f"{group}-{''.join(c if c.isalnum() else '-' for c in row)}"


def command(group: str, row: str, folder: Path, prompts: int | None) -> list[str]:
    """The command of a row."""
    setting = GROUPS[group]
    overrides = {**setting.common, "baseline": "none", "shown": 0, **setting.rows[row]}
    # The name of the method comes first, since it drops the options of another.
    words = sorted(
        (f"{key}={'null' if value is None else value}" for key, value in overrides.items()),
        key=lambda word: not word.startswith("method.method="),
    )
    program = [sys.executable, "-m", "diffalign", "optimize", setting.recipe, *words]
    return [
        *program,
        "--num-prompts",
        str(prompts or setting.prompts),
        "--out",
        str(folder / folder_name(group, row)),
    ]


def results(folder: Path, group: str) -> dict[str, dict[str, Any]]:
    """Rows that are done, with their `result.json`."""
    files = {row: folder / folder_name(group, row) / "result.json" for row in GROUPS[group].rows}
    return {row: json.loads(file.read_text("utf-8")) for row, file in files.items() if file.is_file()}


def values(result: Mapping[str, Any], name: str, when: str) -> list[float]:
    """A reward of each prompt, `before` or `after`."""
    optimised = result["reward"] == name
    return [(one["reward"] if optimised else one["held_out"][name])[when] for one in result["prompts"]]


def table(done: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown: what a row cost, the optimised reward, its lead over best-of-N, and the judge in points."""
    lines = [
        "| | evaluations + backward | seconds a prompt | reward | change | over best-of-N | judge | change, points |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, result in done.items():
        cost, count, name = result["cost"], len(result["prompts"]), result["reward"]
        after = values(result, name, "after")
        reference = done.get(BEST_OF_N)
        lead = "" if reference is None or row == BEST_OF_N else gain(values(reference, name, "after"), after)
        judged = [values(result, JUDGE, when) for when in ("before", "after")]
        cells = [
            row,
            f"{cost['evaluations']} + {cost['backwards']}",
            f"{cost['seconds'] / count:.1f}",
            f"{statistics.mean(after):.2f}",
            gain(values(result, name, "before"), after),
            lead,
            f"{100 * statistics.mean(judged[1]):.0f} %",
            gain(*judged, factor=100, digits=0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = next(iter(done.values()), None)
    if first is not None:
        before = statistics.mean(values(first, first["reward"], "before"))
        judged_before = 100 * statistics.mean(values(first, JUDGE, "before"))
        lines += ["", f"Before: {before:.2f} (of the first row's reward), judge {judged_before:.0f} %."]
    return lines


def gain(before: Sequence[float], after: Sequence[float], factor: float = 1.0, digits: int = 2) -> str:
    """Mean difference with its 95 % interval over prompts."""
    found = paired_difference([factor * x for x in before], [factor * x for x in after])
    low, high = found.interval
    return f"{found.difference:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def diversity_table(done: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown: coverage and QD score of archives against independent noises, means over prompts with intervals."""
    lines = ["| | prompts | | search | independent | difference |", "|---|---|---|---|---|---|"]
    for row, result in done.items():
        notes = [one["notes"] for one in result["prompts"]]
        for name, digits in (("coverage", 2), ("qd_score", 0)):
            own, other = ([note[key] for note in notes] for key in (name, f"{name}_independent"))
            means = [f"{statistics.mean(v):.{digits}f}" for v in (own, other)]
            lines.append(
                f"| {row} | {len(notes)} | {name} | {means[0]} | {means[1]} | {gain(other, own, digits=digits)} |"
            )
    return lines


Folder = Annotated[Path, typer.Option(help="Where runs and logs are kept.")]


@app.command("run")
def run_all(
    folder: Folder = Path("runs/noise"),
    group: Annotated[list[str] | None, typer.Option(help="methods, caution, diversity; default all.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rows; default all.")] = None,
    prompts: Annotated[
        int | None, typer.Option(help="Held-out prompts; default the group's own number.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Run the rows that are not done."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in group or GROUPS:
        for row in GROUPS[name].rows:
            done = folder / folder_name(name, row)
            if (only and row not in only) or (done / "result.json").is_file():
                continue
            wrong = run_commands(
                [command(name, row, folder, prompts)], done.with_suffix(".log"), threads or shared_out(1)
            )
            console.print(f"{name}, {row}: {wrong or 'done'}")


@app.command("table")
def write_table(
    folder: Folder = Path("runs/noise"),
    out: Annotated[Path | None, typer.Option(help="Markdown file; default the screen.")] = None,
) -> None:
    """Write the tables of all finished rows."""
    lines: list[str] = []
    for name in GROUPS:
        done = results(folder, name)
        if done:
            lines += [f"### {name}", "", *(diversity_table(done) if name == "diversity" else table(done)), ""]
    text = "\n".join(lines) + "\n"
    if out is None:
        console.print(text, soft_wrap=True)
    else:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app()
