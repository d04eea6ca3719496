"""Replacing one element of a set: the new Frechet distance or Vendi score, from scratch and by exchange.

    python -m benchmarks.set_swap --n 512 --d 512 --json result.json

From scratch is the fastest we know that needs only the value: the reference's factor is there already, and eigenvalues
come without eigenvectors. The exchange is asked for 64 replacements, one after the other and at once, and made to carry
one out. All times are per replacement.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import timing
from diffalign.rewards.sets import FrechetExchange, VendiExchange, frechet_distance, gaussian_of, vendi_score

BATCH = 64
ROWS = torch.arange(BATCH)
SCRATCH = "from scratch"


@dataclass(frozen=True)
class Work:
    """A way to get new values.

    Fields:
        values: a call's answers. count: replacements that a call judges.
    """

    values: Callable[[], Any]
    count: int = 1


def replaced(features: Tensor, row: int, vector: Tensor) -> Tensor:
    """A copy with another row."""
    copy = features.clone()
    copy[row] = vector
    return copy


def eigenvalue_distance(features: Tensor, mean: Tensor, factor: Tensor) -> float:
    """Frechet distance by the textbook's covariance and the eigenvalues of `R^T S R`."""
    centred = features - features.mean(0)
    covariance = centred.T @ centred / (len(features) - 1)
    roots = torch.linalg.eigvalsh(factor.T @ covariance @ factor).clamp(min=0).sqrt()
    shift = features.mean(0) - mean
    return float(shift @ shift + covariance.trace() + factor.square().sum() - 2 * roots.sum())


def eigenvalue_vendi(features: Tensor) -> float:
    """Vendi score by the kernel's eigenvalues."""
    rows = torch.nn.functional.normalize(features)
    values = torch.linalg.eigvalsh(rows @ rows.T / len(rows)).clamp(min=0)
    return float((-torch.xlogy(values, values)).sum().exp())


def one_by_one(exchange: FrechetExchange | VendiExchange, candidates: Tensor) -> Tensor:
    """Values `[m]` of replacing row j by candidate j, in a question each."""
    return torch.cat([exchange.swapped(row, one[None]) for row, one in enumerate(candidates)])


def frechet_works(n: int, d: int, device: torch.device) -> tuple[dict[str, Work], float]:
    """The ways for the Frechet distance, and the largest difference between exchange and recomputation."""
    features, candidates, reference = _sets(n, d, device)
    target = gaussian_of(reference)
    exchange, other = FrechetExchange(features, target), FrechetExchange(features, target)
    new = replaced(features, 0, candidates[0])
    works = {
        SCRATCH: Work(lambda: eigenvalue_distance(new, target.mean, target.factor)),
        f"exchange, {BATCH} one by one": Work(lambda: one_by_one(exchange, candidates), BATCH),
        f"exchange, {BATCH} at once": Work(lambda: exchange.swapped_pairs(ROWS, candidates), BATCH),
        "carried out": Work(lambda: other.swap(0, candidates[0])),
    }
    exact = torch.stack([frechet_distance(replaced(features, 0, one), target) for one in candidates[:8]])
    return works, float((exchange.swapped(0, candidates[:8]) - exact).abs().max())


def vendi_works(n: int, d: int, device: torch.device) -> tuple[dict[str, Work], float]:
    """The ways for the Vendi score of order 1, and the largest difference between exchange and recomputation."""
    features, candidates, _ = _sets(n, d, device)
    exchange, other = VendiExchange(features), VendiExchange(features)
    new = replaced(features, 0, candidates[0])
    works = {
        SCRATCH: Work(lambda: eigenvalue_vendi(new)),
        f"exchange, {BATCH} one by one": Work(lambda: one_by_one(exchange, candidates), BATCH),
        f"exchange, {BATCH} at once": Work(lambda: exchange.swapped_pairs(ROWS, candidates), BATCH),
        "carried out": Work(lambda: other.swap(0, candidates[0])),
    }
    exact = torch.stack([vendi_score(replaced(features, 0, one)) for one in candidates[:8]])
    return works, float((exchange.swapped(0, candidates[:8]) - exact).abs().max())


def _sets(n: int, d: int, device: torch.device) -> list[Tensor]:
    """A set `[n, d]`, candidates `[64, d]` and a reference `[4 d, d]`, normal with a spectrum that falls off."""
    random = torch.Generator().manual_seed(0)
    widths = torch.logspace(0, -2, d, dtype=torch.float64)
    return [
        (torch.randn(rows, d, generator=random, dtype=torch.float64) * widths).to(device)
        for rows in (n, BATCH, 4 * d)
    ]


def measure(n: int, d: int, repeats: int, warmup: int, device: torch.device) -> dict[str, Any]:
    """Time both metrics; seconds and ratios are per replacement."""
    rows, errors = [], {}
    for metric, works_of in (("frechet", frechet_works), ("vendi", vendi_works)):
        works, errors[metric] = works_of(n, d, device)
        calls = {name: work.values for name, work in works.items()}
        seconds = timing.interleaved(calls, repeats, warmup, device)
        each = {name: [s / works[name].count for s in values] for name, values in seconds.items()}
        ratios = timing.ratios(each, SCRATCH)
        rows += [
            {"metric": metric, "way": name, "seconds": statistics.median(each[name]), "ratio": ratios[name]}
            for name in works
        ]
    settings = {"n": n, "d": d, "repeats": repeats}
    return {"machine": timing.machine(device), "settings": settings, "errors": errors, "rows": rows}


def show(result: dict[str, Any], console: Console) -> None:
    """Print the machine, the table and the errors."""
    console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), soft_wrap=True)
    settings = result["settings"]
    table = Table(
        "metric",
        "way",
        "ms",
        "times as fast",
        title=f"One replacement, n = {settings['n']}, d = {settings['d']}",
    )
    for row in result["rows"]:
        table.add_row(row["metric"], row["way"], f"{row['seconds'] * 1e3:.3f}", f"{row['ratio']:.1f}")
    console.print(table)
    for metric, error in result["errors"].items():
        console.print(f"{metric}: largest difference to recomputation {error:.1e}")


def main(
    n: Annotated[int, typer.Option(min=BATCH, help="Elements of the set.")] = 512,
    d: Annotated[int, typer.Option(min=1, help="Numbers of a feature vector.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 15,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before timing.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all numbers here.")] = None,
) -> None:
    """Measure replacements by exchange against recomputation."""
    result = measure(n, d, repeats, warmup, torch.device(device))
    show(result, Console())
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
