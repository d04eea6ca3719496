"""Searches that are told rankings: what is shown of a round, and what an order says about rewards.

ZO-RankSGD takes rankings as they are. Any other search of this room asks only which candidates are better than the best
so far and in which order, so for it the best so far is shown beside the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffalign.inference.problem import Problem
from diffalign.inference.rank_sgd import RankSGD, rewards_of
from diffalign.inference.search import NoiseSearch
from diffalign.inference.trace import Trace

CURRENT = "current"
Rankings = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Question:
    """Pictures of one prompt to be ranked.

    Fields:
        row: the prompt's place in its group. round: from 0. names: what each picture is. current: number of the
            picture that the others have to beat, None if it is not among them.
        draw: makes the pictures `[len(names), 3, H, W]` in [0, 1].
    """

    row: int
    prompt: str
    round: int
    names: Sequence[str]
    current: int | None
    draw: Callable[[], Tensor]


class Judge(Protocol):
    """Who ranks, and keeps what was said."""

    def restore(self, search: NoiseSearch, problem: Problem, trace: Trace) -> None:
        """Bring a group of prompts to where an earlier session left it, if there was one."""
        ...

    def rank(self, question: Question) -> list[int]:
        """Numbers of pictures from 0, best first; those left out are below. Empty: no preference."""
        ...

    def keep(self, search: NoiseSearch, problem: Problem, trace: Trace, picked: Tensor) -> None:
        """Store where the group is after a round; `picked` `[B]` became the current ones, -1 where it stayed."""
        ...


class Round:
    """What a search shows of its next round, and what rankings of it mean.

    Fields:
        noises: candidates `[B, M, *shape]`. best: the current noises `[B, *shape]`.
    """

    def __init__(self, search: NoiseSearch) -> None:
        self.search, self.noises = search, search.ask()
        self.best = search.point if isinstance(search, RankSGD) else search.best[0]

    def names(self, row: int) -> list[str]:
        """What each picture is: the candidates, then the current one if it is to be shown and not among them."""
        if isinstance(self.search, RankSGD):
            return self.search.labels
        names = [f"candidate {i + 1}" for i in range(self.noises.shape[1])]
        own = self._own(row)
        return [*names, CURRENT] if own is None else [*names[:own], CURRENT, *names[own + 1 :]]

    def current(self, row: int) -> int | None:
        """Number of the current picture; None where it is not shown."""
        if isinstance(self.search, RankSGD):
            return self.noises.shape[1] - 1 if self.search.is_line_search else None
        own = self._own(row)
        return self.noises.shape[1] if own is None else own

    def is_idle(self, row: int) -> bool:
        """Whether there is nothing to rank: a line search whose direction nobody told."""
        search = self.search
        return isinstance(search, RankSGD) and search.is_line_search and not bool(search.direction[row].any())

    def picked(self, rankings: Rankings) -> Tensor:
        """The candidate that becomes the current one `[B]`, -1 where it stays."""
        moves = [
            ranking[0] if ranking and self.current(row) not in (None, ranking[0]) else -1
            for row, ranking in enumerate(rankings)
        ]
        return torch.tensor(moves)

    def tell(self, rankings: Rankings) -> None:
        """Go on."""
        if isinstance(self.search, RankSGD):
            self.search.tell_rankings(rankings)
            return
        count = self.noises.shape[1]
        rows = [self._rewards(row, ranking)[:count] for row, ranking in enumerate(rankings)]
        self.search.tell(torch.stack(rows))

    def _own(self, row: int) -> int | None:
        """Which candidate is the current noise itself."""
        same = (self.noises[row] == self.best[row]).flatten(1).all(1).nonzero().flatten().tolist()
        return same[0] if same else None

    def _rewards(self, row: int, ranking: Sequence[int]) -> Tensor:
        """Rewards of a row's pictures: places above or below the current one, from its reward on."""
        current = self.current(row)
        assert current is not None
        places = rewards_of([ranking], 1, len(self.names(row)))[0]
        if not ranking:
            return torch.full_like(places, math.nan)
        base = self.search.best[1][row]
        return places - places[current] + torch.where(base.isinf(), 0.0, base)


def drive_ranked(
    search: NoiseSearch, problem: Problem, trace: Trace, judge: Judge, rounds: int | None = None
) -> None:
    """Ask, let rank and tell until the budget is spent, or until so many rounds are done.

    A prompt's reward in the trace is how often a picture was preferred to the one before.
    """
    judge.restore(search, problem, trace)
    while rounds is None or search.round < rounds:
        now = Round(search)
        cost = problem.generation.cost * now.noises.shape[1]
        if problem.meter.affordable(cost) < 1:
            return
        if all(now.is_idle(row) for row in range(len(problem))):
            cost = 0
        drawn = Drawn(problem, trace, now)
        problem.meter.stop()
        rankings = [_asked(now, drawn, judge, row) for row in range(len(problem))]
        picked = now.picked(rankings)
        noises, media = drawn.taken(picked)
        problem.meter.start()
        now.tell(rankings)
        problem.meter.spend(cost)
        trace.saw(trace.rewards + (picked >= 0), media, noises)
        judge.keep(search, problem, trace, picked)


def _asked(now: Round, drawn: Drawn, judge: Judge, row: int) -> list[int]:
    if now.is_idle(row):
        return []
    return judge.rank(
        Question(
            row,
            drawn.problem.texts[row],
            now.search.round,
            now.names(row),
            now.current(row),
            lambda: drawn.pictures(row, len(now.names(row))),
        )
    )


class Drawn:
    """The pictures of a round, of each prompt on its own and only when looked at: an answer may be known already."""

    def __init__(self, problem: Problem, trace: Trace, now: Round) -> None:
        self.problem, self.trace, self.now = problem, trace, now
        self._media: dict[int, Tensor] = {}

    def pictures(self, row: int, count: int) -> Tensor:
        """Pictures `[count, 3, H, W]` of a prompt's candidates, and of the current one if there is room for it."""
        media = self._candidates(row)
        return media if count == len(media) else torch.cat([media, self.trace.media[row : row + 1]])

    def taken(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """Full noises `[B, S, C, h, w]` and pictures `[B, 3, H, W]` after a choice `[B]`, -1 for the current ones."""
        noises, media = self.trace.noises.clone(), self.trace.media.clone()
        for row, number in enumerate(picked.tolist()):
            if number >= 0:
                noises[row] = self.problem.full(self.now.noises[row, number][None], [row])[0]
                media[row] = self._candidates(row)[number]
        return noises, media

    def _candidates(self, row: int) -> Tensor:
        if row not in self._media:
            self.problem.meter.start()
            many = self.now.noises.shape[1]
            full = self.problem.full(self.now.noises[row], [row] * many)
            self._media[row] = self.problem.generation.media(full, [row] * many).float()
            self.problem.meter.stop()
        return self._media[row]
