"""What is remembered of a run: the best picture of each prompt, the way there, and what failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.inference.budget import Meter
from diffalign.inference.sheet import Sheet

MOST_FRAMES = 40


def unwatched(meter: Meter) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Point:
    """One look at all B prompts.

    Fields:
        evaluations, backwards: per picture so far. seconds: of the group so far.
        rewards: `[B]` of the current pictures. best: `[B]`, the best so far.
    """

    evaluations: int
    backwards: int
    seconds: float
    rewards: Tensor
    best: Tensor


@dataclass
class Trace:
    """The best of B prompts, kept as a method goes on.

    Fields:
        meter: dates the points. rewards: `[B]`, the best so far. media: their pictures `[B, 3, H, W]`.
        noises: their full noises `[B, S, C, h, w]`; NaN where a picture has no noises that give it again.
        points: the trajectory. frames: pictures `[shown, 3, H, W]` as bytes along the way, at most `MOST_FRAMES`.
        failures: what went wrong, by prompt. shown: of how many prompts frames are kept.
        notes: what else a method tells of each prompt, by name `[B, ...]`.
        sheets: several pictures of a prompt, by prompt. watch: called with the meter after every look.
    """

    meter: Meter
    rewards: Tensor
    noises: Tensor
    media: Tensor
    shown: int = 8
    points: list[Point] = field(default_factory=list)
    frames: list[Tensor] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    notes: dict[str, Tensor] = field(default_factory=dict)
    sheets: dict[int, Sheet] = field(default_factory=dict)
    watch: Callable[[Meter], None] = unwatched
    _every: int = 1

    def saw(self, rewards: Tensor, media: Tensor, noises: Tensor | None) -> None:
        """Remember one picture per prompt.

        Args:
            rewards: `[B]`, NaN is never the best. media: `[B, 3, H, W]` in [0, 1].
            noises: full noises `[B, S, C, h, w]` that give these pictures; None: none do (steered sampling).
        """
        rewards, media = rewards.detach().float().cpu(), media.detach().float().cpu()
        better = rewards > self.rewards
        found = torch.full_like(self.noises, torch.nan) if noises is None else noises.detach().float().cpu()
        self.rewards = torch.where(better, rewards, self.rewards)
        self.noises[better], self.media[better] = found[better], media[better]
        self.passed(rewards, media)

    def passed(self, rewards: Tensor, media: Tensor) -> None:
        """Remember where a run is on its way: pictures that are not finished, and so never the best.

        Args:
            rewards: `[B]`. media: `[B, 3, H, W]` in [0, 1].
        """
        rewards, media = rewards.detach().float().cpu(), media.detach().float().cpu()
        now = self.meter
        self.points.append(
            Point(now.evaluations, now.backwards, now.seconds, rewards.clone(), self.rewards.clone())
        )
        self._film(media)
        self.watch(now)

    def note(self, name: str, values: Tensor) -> None:
        """Remember a method's own figures of each prompt `[B, ...]`; the last ones of a name count."""
        self.notes[name] = values.detach().cpu()

    def fail(self, row: int, message: str) -> None:
        """Remember why a prompt was given up; its best picture so far stays. The first reason counts."""
        self.failures.setdefault(row, message)

    def _film(self, media: Tensor) -> None:
        if (len(self.points) - 1) % self._every == 0:
            self.frames.append((media[: self.shown].clamp(0, 1) * 255).round().byte())
        if len(self.frames) > MOST_FRAMES:
            self.frames, self._every = self.frames[::2], 2 * self._every


def begun(meter: Meter, noises: Tensor, rewards: Tensor, media: Tensor, shown: int) -> Trace:
    """The trace of a run that starts at noises `[B, S, C, h, w]` with their rewards `[B]` and media `[B, 3, H, W]`.

    Raises:
        DiffalignError: a prompt's first picture has no finite reward, so that nothing could be compared with it.
    """
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise DiffalignError(
            f"the first picture of prompt {bad[0]} has the reward {float(rewards[bad[0]])}; expected a finite number. "
            "Try model.precision=fp32, or look at the reward."
        )
    return Trace(meter, rewards.float().cpu(), noises.clone(), media.float().cpu().clone(), shown)
