"""What a run found, for all of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffalign.evaluation.prompts import EvalPrompt
from diffalign.evaluation.scoring import score_pictures
from diffalign.inference.baseline import Baseline
from diffalign.inference.gaussianity import Gaussianity, gaussianity
from diffalign.inference.problem import Problem
from diffalign.inference.sheet import Sheet
from diffalign.inference.trace import Point, Trace
from diffalign.rewards import Reward

BEFORE, AFTER = "before", "after"
Scores = dict[str, dict[str, NDArray[np.float64]]]
"""Reward, then stage (before, after, the baselines), then a score per prompt."""


@dataclass
class Group:
    """Prompts that are worked on at once.

    Fields:
        prompts: B. problem: what was given. before: a trace that saw the first pictures alone. trace: the method's.
        baselines: by name of the comparison. held_out: scores that were not optimised.
    """

    prompts: Sequence[EvalPrompt]
    problem: Problem
    before: Trace
    trace: Trace
    baselines: dict[str, Baseline] = field(default_factory=dict)
    held_out: Scores = field(default_factory=dict)

    def stages(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Rewards `[B]` and media `[B, 3, H, W]` by stage."""
        own: dict[str, Trace | Baseline] = {BEFORE: self.before, AFTER: self.trace}
        return {name: (stage.rewards, stage.media) for name, stage in {**own, **self.baselines}.items()}

    def measure(self, rewards: Sequence[Reward]) -> None:
        """Score the pictures of all stages by rewards that were not optimised."""
        for reward in rewards:
            self.held_out[reward.name] = {
                name: score_pictures(reward, media, self.problem.texts, label=reward.name).mean
                for name, (_, media) in self.stages().items()
            }


@dataclass(frozen=True)
class Optimized:
    """What a run found for P prompts.

    Fields:
        prompts: with the seeds of their first noises. method: its options. reward: name of what was optimised.
        settings: how pictures are made: steps, guidance, solver, kernel, and whether `diffalign generate` makes
            the same ones (`exact`).
        rewards: scores `[P]` by stage: before, after, baselines. media: their pictures `[P, 3, H, W]`.
        held_out: scores by reward and stage.
        noises: full noises `[P, S, C, h, w]` of the pictures after; NaN where none give them again.
        first: those before. trajectory: looks at all P prompts.
        evaluations, backwards: per picture. seconds: of the whole run, without baselines and held-out rewards.
        baseline_cost: evaluations per picture and seconds by baseline.
        gaussianity: of the noises before and after, per prompt; only of those that were changed.
        frames: pictures `[shown, 3, H, W]` as bytes along the way. failures: what went wrong, by prompt.
        stopped: why the run ended early, else empty. notes: figures of the method's own `[P, ...]`, by name.
        sheets: several pictures of a prompt, by prompt.
    """

    prompts: tuple[EvalPrompt, ...]
    method: dict[str, Any]
    reward: str
    settings: dict[str, Any]
    rewards: dict[str, Tensor]
    media: dict[str, Tensor]
    held_out: Scores
    noises: Tensor
    first: Tensor
    trajectory: list[Point]
    evaluations: int
    backwards: int
    seconds: float
    baseline_cost: dict[str, tuple[int, float]]
    gaussianity: dict[str, list[Gaussianity | None]]
    frames: list[Tensor]
    failures: dict[int, str]
    stopped: str
    notes: dict[str, Tensor] = field(default_factory=dict)
    sheets: dict[int, Sheet] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """What a person has to be told about prompts that were given up, or about an early end; else empty."""
        found = [f"prompt {row} ({self.prompts[row].text!r}): {text}" for row, text in self.failures.items()]
        more = f" ({len(found) - 1} more prompts failed as well)" if len(found) > 1 else ""
        return self.stopped or (found[0] + more if found else "")


def joined(
    groups: Sequence[Group], method: dict[str, Any], reward: str, settings: dict[str, Any], stopped: str
) -> Optimized:
    """The groups of a run as one result. Stages and rewards that some group lacks, cut short, are left out."""
    stages = [name for name in groups[0].stages() if all(name in group.stages() for group in groups)]
    traces = [group.trace for group in groups]
    noises, first = (
        torch.cat([trace.noises for trace in found]) for found in (traces, [g.before for g in groups])
    )
    changed = slice(None) if groups[0].problem.variables == "all" else slice(0, 1)
    offsets = np.cumsum([0, *(len(group.prompts) for group in groups)])
    return Optimized(
        prompts=tuple(prompt for group in groups for prompt in group.prompts),
        method=method,
        reward=reward,
        settings=settings,
        rewards={name: torch.cat([group.stages()[name][0] for group in groups]) for name in stages},
        media={name: torch.cat([group.stages()[name][1] for group in groups]) for name in stages},
        held_out=_held_out(groups, stages),
        noises=noises,
        first=first,
        trajectory=_trajectory([trace.points for trace in traces]),
        evaluations=max(group.problem.meter.evaluations for group in groups),
        backwards=max(group.problem.meter.backwards for group in groups),
        seconds=sum(group.problem.meter.seconds for group in groups),
        baseline_cost={
            name: _cost([g.baselines[name] for g in groups]) for name in stages if name in groups[0].baselines
        },
        gaussianity={BEFORE: _looks(first[:, changed]), AFTER: _looks(noises[:, changed])},
        frames=traces[0].frames,
        failures={
            int(start) + row: text
            for start, trace in zip(offsets, traces, strict=False)
            for row, text in trace.failures.items()
        },
        stopped=stopped,
        sheets={
            int(start) + row: sheet
            for start, trace in zip(offsets, traces, strict=False)
            for row, sheet in trace.sheets.items()
        },
        notes=_notes([trace.notes for trace in traces]),
    )


def _notes(groups: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Those that all groups have in the same shape."""
    shapes = [{name: values.shape[1:] for name, values in notes.items()} for notes in groups]
    names = [name for name in shapes[0] if all(found.get(name) == shapes[0][name] for found in shapes)]
    return {name: torch.cat([notes[name] for notes in groups]) for name in names}


def _trajectory(groups: Sequence[list[Point]]) -> list[Point]:
    """Looks of all groups side by side; a group that ended sooner keeps its last. Seconds are added."""
    if not all(groups):
        return []
    rows = [[points[min(i, len(points) - 1)] for points in groups] for i in range(max(map(len, groups)))]
    return [
        Point(
            max(point.evaluations for point in row),
            max(point.backwards for point in row),
            sum(point.seconds for point in row),
            torch.cat([point.rewards for point in row]),
            torch.cat([point.best for point in row]),
        )
        for row in rows
    ]


def _held_out(groups: Sequence[Group], stages: Sequence[str]) -> Scores:
    names = [name for name in groups[0].held_out if all(name in group.held_out for group in groups)]
    return {
        name: {stage: np.concatenate([group.held_out[name][stage] for group in groups]) for stage in stages}
        for name in names
    }


def _cost(found: Sequence[Baseline]) -> tuple[int, float]:
    return max(one.evaluations for one in found), sum(one.seconds for one in found)


def _looks(noises: Tensor) -> list[Gaussianity | None]:
    return [gaussianity(noise) if bool(noise.isfinite().all()) else None for noise in noises]
