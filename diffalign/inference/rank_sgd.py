"""ZO-RankSGD: climb by rankings alone, a person's or those that any reward implies.

Tang et al. 2024 (ICLR), arXiv 2303.03751. Two kinds of rounds take turns:

1. *Gradient*: queries `x + mu xi_i` are ranked. Over the edges `i > j` of the ranking, `g = 1/|E| sum (xi_i - xi_j)`
   estimates the direction of ascent (eq. 5 there), and d is the running mean of g since the last accepted step.
2. *Line search*: `x + step decay^j d`, the previous round's best query and x itself are shown, and the best of them
   becomes x. If x stays, d goes on averaging.

The edge sum is `sum_i w_i xi_i` with w_i = (candidates that i beats) - (those that beat it). These weights sum to 0;
the release's `m - 2 r` do not (they sum to k), which adds a drift along the mean perturbation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.inference.search import NoiseSearch, best_of, norms, where_rows, with_norm
from diffalign.process import expand_as
from diffalign.strict import StrictModel

Rankings = Sequence[Sequence[int]]


class RankSGDConfig(StrictModel):
    """Options of ZO-RankSGD."""

    method: Literal["rank_sgd"] = "rank_sgd"
    """Rankings only; rounds of queries and of line search take turns."""
    candidates: int = Field(default=6, ge=4)
    """Pictures per round and prompt, in both kinds of rounds."""
    mu: float = Field(default=0.3, gt=0)
    """Size of a query's perturbation in units of the noise's deviation. Too small and nobody can tell queries apart."""
    step: float = Field(default=3.0, gt=0)
    """Longest step of a line search in units of d, whose length grows with mu: what counts is their product. About 1
    was best on quadratics of 64 and 3,072 dimensions."""
    decay: float = Field(default=0.5, gt=0, lt=1)
    """Ratio of each step of a line search to the one before."""
    top: int | None = Field(default=None, ge=1)
    """Ranks of a reward that are used, as if a person had ranked the best few only; null: all."""
    keep_norm: bool = True
    """Scale new candidates to the start's norm. The paper does not, but then steps lengthen the noise at every turn,
    so that only short ones help: 5 times the progress on a quadratic of 3,072 dimensions in 66 rounds."""


class RankSGD(NoiseSearch):
    """A current point x, a direction d and the best query per row; all rows are in the same kind of round."""

    def __init__(self, start: Tensor, seeds: Sequence[int], config: RankSGDConfig | None = None) -> None:
        super().__init__(start, seeds)
        self.config = config or RankSGDConfig()
        self._length = norms(self.start)
        self._point = self.start.clone()
        self._direction = torch.zeros_like(self.start)
        self._averaged = torch.zeros(len(self.seeds), dtype=torch.long)
        self._previous = self.start.clone()

    @property
    def is_line_search(self) -> bool:
        """Whether the round at hand is a line search; the first one is a gradient round."""
        return self.round % 2 == 1

    @property
    def point(self) -> Tensor:
        """The current noises `[B, *shape]`."""
        return self._point

    @property
    def direction(self) -> Tensor:
        """The direction of ascent that rankings gave so far `[B, *shape]`, 0 where none did."""
        return self._direction

    @property
    def labels(self) -> list[str]:
        """What to call each candidate of the round when it is shown to a person, `[M]` names."""
        count = self.config.candidates
        if not self.is_line_search:
            return [f"query {i + 1}" for i in range(count)]
        return [f"step {size:.3g}" for size in self._steps()] + ["previous best", "current"]

    def tell_rankings(self, rankings: Rankings) -> None:
        """Take a ranking per row: candidate numbers from 0, best first; those not named are all below.

        In a line search the first number is the choice, and an empty ranking stays at x. In a gradient round an empty
        one says nothing. As "reward" of a candidate `best` shows how many places it had below it.

        Raises:
            DiffalignError: a number that is no candidate or comes twice, or another number of rows.
        """
        self.tell(rewards_of(rankings, len(self.seeds), self.config.candidates))

    def _steps(self) -> list[float]:
        return [self.config.step * self.config.decay**j for j in range(self.config.candidates - 2)]

    def _propose(self) -> Tensor:
        if not self.is_line_search:
            fresh = self._fresh(self.config.candidates, "rank_sgd")
            return self._on_shell(self._point[:, None] + self.config.mu * fresh)
        steps = torch.tensor(self._steps()).view(1, -1, *[1] * (self.start.dim() - 1))
        along = self._on_shell(self._point[:, None] + steps * self._direction[:, None])
        return torch.cat([along, self._previous[:, None], self._point[:, None]], 1)

    def _on_shell(self, noises: Tensor) -> Tensor:
        return with_norm(noises, self._length[:, None], lead=2) if self.config.keep_norm else noises

    def _learn(self, noises: Tensor, rewards: Tensor) -> None:
        if self.is_line_search:
            self._move(noises, rewards)
        else:
            self._average(noises, rewards)

    def _average(self, noises: Tensor, rewards: Tensor) -> None:
        """Take a round's estimate into the running mean of each row that has one."""
        weights, edges = edge_weights(rewards, self.config.top)
        known = edges > 0
        estimate = ascent(noises - self._point[:, None], weights, edges)
        count = expand_as(self._averaged, self.start).float()
        mean = (self._direction * count + estimate) / (count + 1)
        self._direction = where_rows(known, mean, self._direction)
        self._averaged = torch.where(known, self._averaged + 1, self._averaged)
        found, value = best_of(noises, rewards)
        self._previous = where_rows(value > -math.inf, found, self._point)

    def _move(self, noises: Tensor, rewards: Tensor) -> None:
        """Go to the best candidate where it beats the current point, and forget the direction there."""
        found, value = best_of(noises, rewards)
        moved = value > rewards[:, -1].nan_to_num(-math.inf)
        self._point = where_rows(moved, found, self._point)
        self._direction = where_rows(moved, torch.zeros_like(found), self._direction)
        self._averaged = torch.where(moved, 0, self._averaged)

    def _state(self) -> dict[str, Tensor]:
        return {
            "point": self._point,
            "direction": self._direction,
            "averaged": self._averaged,
            "previous": self._previous,
        }

    def _restore(self, state: dict[str, Tensor]) -> None:
        self._point, self._direction = state["point"], state["direction"]
        self._averaged, self._previous = state["averaged"], state["previous"]


def edge_weights(rewards: Tensor, top: int | None = None) -> tuple[Tensor, Tensor]:
    """Weight of each candidate in the edge sum, and the number of edges of the ranking.

    `w_i = sum_j sign(r_i - r_j)`: candidates that i beats minus those that beat it, so a row sums to 0. Equal rewards
    have no edge, and a NaN has none at all. With a full ranking of m they are m - 1, m - 3, ..., 1 - m.

    Args:
        rewards: `[B, M]`. top: only edges from one of the best few are kept: the rest count as equals.

    Returns:
        Weights `[B, M]` and edges `[B]`, float32.
    """
    if top is not None:
        rewards = _capped(rewards, top)
    signs = (rewards[:, :, None] - rewards[:, None, :]).sign().nan_to_num(0.0)
    return signs.sum(2), signs.abs().sum((1, 2)) / 2


def _capped(rewards: Tensor, top: int) -> Tensor:
    """Rewards in which all below the `top` best of a row are equal; NaN stays."""
    below = rewards.nan_to_num(-math.inf).argsort(dim=1, descending=True, stable=True)[:, top:]
    floor = rewards.nan_to_num(math.inf).amin(1, keepdim=True).expand_as(rewards)
    capped = rewards.scatter(1, below, floor.gather(1, below))
    return torch.where(rewards.isnan(), rewards, capped)


def ascent(perturbations: Tensor, weights: Tensor, edges: Tensor) -> Tensor:
    """`1/|E| sum_i w_i xi_i` of each row, `[B, *shape]`; 0 without edges.

    Args:
        perturbations: `[B, M, *shape]`, queries minus the point. weights: `[B, M]`. edges: `[B]`.
    """
    share = weights / edges.clamp(min=1)[:, None]
    return torch.einsum("bm,bm...->b...", share, perturbations)


def rewards_of(rankings: Rankings, rows: int, candidates: int) -> Tensor:
    """Rewards `[rows, candidates]` that rank like `rankings`: the first has M, the next M - 1, ...; the others 0.

    An empty ranking gives equal rewards, which have no edge and no best; a line search then stays where it is.

    Raises:
        DiffalignError: a number that is no candidate or comes twice, or another number of rows.
    """
    if len(rankings) != rows:
        raise DiffalignError(f"got {len(rankings)} rankings; expected {rows}, one per prompt.")
    found = torch.zeros(rows, candidates)
    for row, ranking in enumerate(rankings):
        if len(set(ranking)) < len(ranking) or not all(0 <= each < candidates for each in ranking):
            raise DiffalignError(
                f"ranking {row} is {list(ranking)}; expected different candidate numbers from 0 to {candidates - 1}, "
                "best first."
            )
        for place, each in enumerate(ranking):
            found[row, each] = candidates - place
    return found


def read_ranking(text: str, candidates: int) -> list[int]:
    """What a person typed, such as `3 1` or `3,1`: numbers from 1, best first; as candidate numbers from 0.

    Raises:
        DiffalignError: something else.
    """
    words = text.replace(",", " ").replace(">", " ").split()
    numbers = [int(word) - 1 if word.isdecimal() else -1 for word in words]
    if len(set(numbers)) < len(numbers) or not all(0 <= number < candidates for number in numbers):
        raise DiffalignError(
            f"{text!r} is no ranking; expected different numbers from 1 to {candidates}, best first, such as: 3 1"
        )
    return numbers
