"""What a loop of curation and retraining does: exactly, on a finite model, and measured, from a run's metrics.

    python -m benchmarks.self_consuming --out DIRECTORY
    python -m benchmarks.self_consuming --out DIRECTORY --runs runs/scenes-self-consuming ...

A generator draws K samples, somebody picks one with probability softmax(reward), and the generator is trained anew on
the picked ones, mixed with real data. Ferbach et al. 2024 (arXiv 2407.09499) show what that converges to. On a model
with finitely many outcomes and unlimited capacity every round is a formula, so their statements can be checked to
rounding; `Law` holds them. A run of `trainer.method=raft` with `form: choice` is the same loop on pictures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

from diffalign.errors import DiffalignError

ROUNDS = 30
# Choices and share of real data of the loops that are compared.
SETTINGS = ((4, 0.0), (4, 0.5), (4, 0.8), (16, 0.0))


# A model with M outcomes


def curated(p: Tensor, rewards: Tensor, choices: int) -> Tensor:
    """Law `[M]` of the sample that is picked out of `choices` drawn from p: one round without real data.

    `K p(x) E[e^r(x) / (e^r(x) + sum of K - 1 others)]`. With `1 / a = integral of e^(-s a) ds` the expectation over
    the others factorises, `K p w integral of e^(-s w) phi(s)^(K-1) ds` with `w = e^r` and `phi(s) = E[e^(-s w)]`, so
    that the cost does not grow with K. The trapezoid rule in log s is exact to rounding there.

    Args:
        p: probabilities `[M]`. rewards: `[M]`.
    """
    if choices == 1:
        return p.clone()
    log_weight = rewards - rewards.max()
    step, weight = 0.02, log_weight.exp()
    s = torch.arange(-40.0, math.log(750.0) - float(log_weight.min()), step, dtype=torch.float64).exp()
    laplace = torch.exp(-s[:, None] * weight[None])
    others = (laplace @ p) ** (choices - 1)
    integral = (laplace * others[:, None] * s[:, None]).sum(0) * step
    law = choices * p * weight * integral
    # An error of the sum would grow by the factor K in every round.
    return law / law.sum()


def curated_by_the_best(p: Tensor, rewards: Tensor, choices: int) -> Tensor:
    """Law `[M]` of the best of `choices` draws, ties broken at random: RAFT's round, temperature 0."""
    below = torch.stack([p[rewards < r].sum() for r in rewards])
    level = torch.stack([p[rewards == r].sum() for r in rewards])
    chance = (below + level) ** choices - below**choices
    return torch.where(level > 0, p / level * chance, 0.0)


def curated_without_end(p: Tensor, rewards: Tensor) -> Tensor:
    """Law `[M]` for infinitely many choices: `p e^r / E[e^r]` (Lemma 2.1)."""
    tilted = p * (rewards - rewards.max()).exp()
    return tilted / tilted.sum()


def next_law(p: Tensor, real: Tensor, rewards: Tensor, choices: int, share: float) -> Tensor:
    """One round: `share` of real data, the rest curated from p. `share = 1 / (1 + lambda)` of the paper."""
    return share * real + (1 - share) * curated(p, rewards, choices)


def laws(p: Tensor, rewards: Tensor, choices: int, share: float = 0.0, rounds: int = ROUNDS) -> Tensor:
    """The laws `[rounds + 1, M]` of all rounds, from p, which is also the real data's."""
    found = [p]
    for _ in range(rounds):
        found.append(next_law(found[-1], p, rewards, choices, share))
    return torch.stack(found)


# What is known about it


def moments(p: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of values `[M]` under laws `[..., M]`."""
    mean = (p * values).sum(-1)
    return mean, (p * (values - mean[..., None]).square()).sum(-1)


def least_gain(p: Tensor, rewards: Tensor, choices: int) -> float:
    """Lower bound on the growth of `E[e^r]` in a round without real data: `(K - 1) / K Var[e^r] / e^r*` (Lemma 2.2)."""
    worth = rewards.exp()
    return float((choices - 1) / choices * moments(p, worth)[1] / worth[p > 0].max())


def least_gain_mixed(p: Tensor, rewards: Tensor, choices: int, share: float) -> float:
    """Lower bound on `E_t[e^r] - E_0[e^r]` at every round t >= 1 with real data (Theorem 2.3)."""
    weight = 1 / share - 1
    return weight / (1 + weight) ** 3 * least_gain(p, rewards, choices)


def drift_ceiling(choices: int, share: float) -> float:
    """Upper bound on `KL(p_t || real)` at every round: `-log(1 - lambda (K - 1))` (Theorem 2.4).

    It follows from `curated(p) <= K p`: the density ratio to the real data is at most `rho`, which goes to
    `(1 + lambda K rho) / (1 + lambda)`.
    Infinite unless `lambda < 1 / (K - 1)`, that is unless the share of real data is above `(K - 1) / K`.
    """
    slack = 1 - (1 / share - 1) * (choices - 1) if share > 0 else 0.0
    return -math.log(slack) if slack > 0 else math.inf


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """`KL(p || q)` of laws `[..., M]`; infinite where q lacks an outcome of p."""
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.log()), 0.0).sum(-1)


@dataclass(frozen=True)
class Course:
    """How one loop went, by round: mean reward, its variance, share of the favoured style, distance to the real law."""

    choices: int
    share: float
    reward: list[float]
    variance: list[float]
    favoured: list[float]
    divergence: list[float]

    @property
    def name(self) -> str:
        """For a legend."""
        return f"K = {self.choices}, {self.share:.0%} real"


def biased_world(levels: int = 5, step: float = 0.25, bias: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """Real law, rewards and mask `[2 levels]` of the favoured style: qualities in two styles of equal worth.

    The scorer gives quality times `step`, and `bias` to one style. Good pictures are rare in the real data: each
    level is half as likely as the one below.
    """
    quality = torch.arange(levels, dtype=torch.float64).repeat(2)
    favoured = torch.arange(2 * levels) >= levels
    p = 0.5**quality
    return p / p.sum(), step * quality + bias * favoured, favoured


def course(choices: int, share: float, rounds: int = ROUNDS) -> Course:
    """The loop in the biased world."""
    p, rewards, favoured = biased_world()
    found = laws(p, rewards, choices, share, rounds)
    mean, variance = moments(found, rewards)
    style, distance = found[:, favoured].sum(1), divergence(found, p)
    return Course(choices, share, *(x.tolist() for x in (mean, variance, style, distance)))


# A run


def run_rounds(run: Path, parts: Sequence[str] = ()) -> dict[str, list[float]]:
    """What a run wrote down of its rounds: mean and variance of the reward, of what was kept, and of parts, by round.

    Args:
        parts: names of what the reward is made of.

    Raises:
        DiffalignError: it is no online run, or its reward has no such part.
    """
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    rounds = [line for line in lines if "round/reward" in line]
    if not rounds:
        raise DiffalignError(f"{run} has no rounds in metrics.jsonl; expected the folder of an online run.")
    # A run that was resumed in the middle of a round writes it down again.
    by_number = {int(line["round/number"]): line for line in rounds}
    ordered = [by_number[number] for number in sorted(by_number)]
    found = {
        "round": [float(line["round/number"]) for line in ordered],
        "reward": [line["round/reward"] for line in ordered],
        "variance": [line["round/reward_std"] ** 2 for line in ordered],
    }
    if all("round/kept_reward" in line for line in ordered):
        found["kept_reward"] = [line["round/kept_reward"] for line in ordered]
    for part in parts:
        if f"round/part/{part}" not in ordered[0]:
            known = [
                name.removeprefix("round/part/") for name in ordered[0] if name.startswith("round/part/")
            ]
            raise DiffalignError(
                f"{run} wrote down no part {part!r} of its reward; it has: {', '.join(known) or 'none'}."
            )
        found[part] = [line[f"round/part/{part}"] for line in ordered]
    return found


def trend(values: Sequence[float]) -> float:
    """Change from the first to the last round of the straight line through all rounds."""
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.linspace(-0.5, 0.5, len(y), dtype=torch.float64)
    return float((x * y).sum() / x.square().sum().clamp(min=1e-12))


# Figures


def draw_theory(courses: Sequence[Course], path: Path) -> None:
    """Mean reward, variance, favoured style and distance by round."""
    panels = {
        "reward": "mean reward",
        "variance": "variance of the reward",
        "favoured": "share of the favoured style",
        "divergence": "KL to the real data, nats",
    }
    figure = Figure(figsize=(15, 3.4), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for each in courses:
            (line,) = axis.plot(getattr(each, name), label=each.name)
            ceiling = drift_ceiling(each.choices, each.share)
            if name == "divergence" and math.isfinite(ceiling):
                axis.axhline(ceiling, color=line.get_color(), linestyle=":", linewidth=1)
        axis.set_xlabel("round")
        axis.set_title(label, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_runs(runs: dict[str, dict[str, list[float]]], path: Path, parts: Sequence[str] = ()) -> None:
    """Mean and variance of the reward and of its parts by round, of what was drawn (lines) and was kept (dots)."""
    figure = Figure(figsize=(4.5 * (2 + len(parts)), 3.4), layout="constrained")
    axes = figure.subplots(1, 2 + len(parts))
    for name, found in runs.items():
        (line,) = axes[0].plot(found["round"], found["reward"], label=name)
        if "kept_reward" in found:
            axes[0].plot(found["round"], found["kept_reward"], ".", color=line.get_color(), markersize=3)
        axes[1].plot(found["round"], found["variance"], color=line.get_color())
        for axis, part in zip(axes[2:], parts, strict=True):
            axis.plot(found["round"], found[part], color=line.get_color())
    labels = ("mean reward", "variance of the reward", *(f"mean {part}" for part in parts))
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel("round")
        axis.set_title(label, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(
    out: Annotated[Path, typer.Option(help="Folder for figures and numbers.")],
    runs: Annotated[list[Path] | None, typer.Option(help="Folders of runs to read.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the finite model.")] = ROUNDS,
    part: Annotated[
        list[str] | None, typer.Option(help="Parts of the runs' reward that are drawn, too.")
    ] = None,
) -> None:
    """Work out the theory's loops, and read those of runs."""
    out.mkdir(parents=True, exist_ok=True)
    courses = [course(choices, share, rounds) for choices, share in SETTINGS]
    draw_theory(courses, out / "theory.png")
    parts = part or []
    found = {run.name: run_rounds(run, parts) for run in runs or []}
    if found:
        draw_runs(found, out / "runs.png", parts)
    numbers: dict[str, Any] = {"theory": [asdict(each) for each in courses], "runs": found}
    (out / "self_consuming.json").write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    for each in courses:
        typer.echo(
            f"{each.name}: reward {each.reward[0]:.3f} -> {each.reward[-1]:.3f}, variance {each.variance[0]:.3f} -> "
            f"{each.variance[-1]:.3f}, favoured style {each.favoured[0]:.2f} -> {each.favoured[-1]:.2f}, "
            f"KL {each.divergence[-1]:.2f} (ceiling {drift_ceiling(each.choices, each.share):.2f})"
        )
    for name, values in found.items():
        typer.echo(
            f"{name}: {len(values['round'])} rounds, trend of the reward {trend(values['reward']):+.4f}, of its "
            f"variance {trend(values['variance']):+.5f}"
            + "".join(f", of {name} {trend(values[name]):+.4f}" for name in parts)
        )


if __name__ == "__main__":
    typer.run(main)
