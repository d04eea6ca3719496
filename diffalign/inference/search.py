"""Black-box search over noises: ask for candidates, tell their rewards.

A search knows no model, picture or prompt: a prompt is a row, and rows do not touch. All B rows are asked for at
once. What a search draws depends on (row's seed, round, candidate) only, so a row finds the same whichever rows stand
beside it, and a state holds counters and tensors, no generator.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.process import expand_as
from diffalign.randomness import generator


class Search(Protocol):
    """What a driver needs of a search."""

    def ask(self) -> Tensor:
        """Candidate noises `[B, M, *shape]`, float32 on the CPU; the same ones until their rewards are told."""
        ...

    def tell(self, rewards: Tensor) -> None:
        """Rewards `[B, M]` of the candidates last asked for, higher is better; NaN: failed or left out."""
        ...

    @property
    def best(self) -> tuple[Tensor, Tensor]:
        """The best noises so far `[B, *shape]` and their rewards `[B]`; -inf where none has one."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs to go on to the bit."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state of a search of the same kind, start, seeds and options."""
        ...


class NoiseSearch(ABC):
    """The book-keeping of every search; a method adds `_propose` and `_learn`.

    Args:
        start: noises that the search starts from `[B, *shape]`; what they score is the "before" of every row.
        seeds: one per row.

    Raises:
        DiffalignError: the number of seeds is not the number of rows.
    """

    def __init__(self, start: Tensor, seeds: Sequence[int]) -> None:
        if len(seeds) != len(start):
            raise DiffalignError(
                f"a search got {len(start)} starting noises and {len(seeds)} seeds; expected one seed per noise."
            )
        self.start = start.detach().to("cpu", torch.float32)
        self.seeds = list(seeds)
        self.round = 0
        self._best_noises = self.start.clone()
        self._best_rewards = torch.full((len(seeds),), -math.inf)
        self._asked: Tensor | None = None

    @property
    def best(self) -> tuple[Tensor, Tensor]:
        """The best noises so far `[B, *shape]`, at first the start, and their rewards `[B]`, at first -inf."""
        return self._best_noises, self._best_rewards

    def ask(self) -> Tensor:
        """Candidate noises `[B, M, *shape]`; the same ones until their rewards are told."""
        if self._asked is None:
            self._asked = self._propose()
        return self._asked

    def tell(self, rewards: Tensor) -> None:
        """Take the rewards `[B, M]` of the candidates last asked for.

        A reward that is not finite counts as failed: it is never the best and nothing is learned from it. So a driver
        whose budget ends within a round tells NaN for the rest.

        Raises:
            DiffalignError: another shape.
        """
        noises = self.ask()
        if rewards.shape != noises.shape[:2]:
            raise DiffalignError(
                f"a search was told rewards of shape {list(rewards.shape)}; expected {list(noises.shape[:2])}, one per "
                "candidate that it asked for."
            )
        values = failed_as_nan(rewards)
        self._keep_best(noises, values)
        self._learn(noises, values)
        self.round += 1
        self._asked = None

    def state(self) -> dict[str, Tensor]:
        """Copies of all tensors and counters; candidates that were asked for are drawn again."""
        own = {
            "round": torch.tensor(self.round),
            "best_noises": self._best_noises,
            "best_rewards": self._best_rewards,
        }
        return {name: value.clone() for name, value in {**own, **self._state()}.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state of a search of the same kind, start, seeds and options."""
        self.round = int(state["round"])
        self._best_noises, self._best_rewards = state["best_noises"].clone(), state["best_rewards"].clone()
        self._asked = None
        self._restore({name: value.clone() for name, value in state.items()})

    def _keep_best(self, noises: Tensor, rewards: Tensor) -> None:
        found, values = best_of(noises, rewards)
        better = values > self._best_rewards
        self._best_noises = where_rows(better, found, self._best_noises)
        self._best_rewards = torch.where(better, values, self._best_rewards)

    def _fresh(self, count: int, *keys: int | str) -> Tensor:
        """Standard normal noises of this round `[B, count, *shape]`."""
        return draw(self.seeds, count, self.start.shape[1:], self.round, *keys)

    @abstractmethod
    def _propose(self) -> Tensor:
        """Candidates `[B, M, *shape]`, a function of the state alone."""

    @abstractmethod
    def _learn(self, noises: Tensor, rewards: Tensor) -> None:
        """Move on, given candidates `[B, M, *shape]` and their rewards `[B, M]`, NaN where failed."""

    def _state(self) -> dict[str, Tensor]:
        """What the method remembers beside the best."""
        return {}

    def _restore(self, state: dict[str, Tensor]) -> None:  # noqa: B027  (nothing to take back is the default)
        """Take back what `_state` gave."""


def draw(seeds: Sequence[int], count: int, shape: Sequence[int], *keys: int | str, first: int = 0) -> Tensor:
    """Standard normal noises `[B, count, *shape]`; number i of a row depends on (its seed, keys, first + i) only."""
    rows = [
        torch.stack([torch.randn(*shape, generator=generator(seed, *keys, first + i)) for i in range(count)])
        for seed in seeds
    ]
    return torch.stack(rows)


def failed_as_nan(rewards: Tensor) -> Tensor:
    """Rewards in float32 on the CPU, NaN wherever they are not finite."""
    values = rewards.detach().to("cpu", torch.float32)
    return torch.where(values.isfinite(), values, torch.nan)


def best_of(noises: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The candidate with the highest reward of each row; the first one of equals.

    Args:
        noises: `[B, M, *shape]`. rewards: `[B, M]`, NaN is never chosen.

    Returns:
        Noises `[B, *shape]` and rewards `[B]`; candidate 0 and -inf for a row without a reward.
    """
    values = torch.where(rewards.isnan(), -math.inf, rewards)
    top, index = values.max(1)
    return noises[torch.arange(len(noises)), index], top


def where_rows(rows: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Rows `[B, ...]` of `chosen` where the mask `rows` `[B]` holds, of `other` elsewhere."""
    return torch.where(expand_as(rows, chosen), chosen, other)


def norms(noises: Tensor, lead: int = 1) -> Tensor:
    """Euclidean norms over all but the first `lead` dimensions, which they keep (the others with size 1)."""
    flat = torch.linalg.vector_norm(noises.flatten(lead), dim=-1)
    return flat.view(*noises.shape[:lead], *[1] * (noises.dim() - lead))


def rotated(noises: Tensor, towards: Tensor, cosine: Tensor | float, lead: int = 1) -> Tensor:
    """Turn noises by a given angle towards others, on the sphere through them.

    `y = |x| (c u + sqrt(1 - c^2) w)`, u the direction of x and w that of the part of `towards` at right angles to it,
    so that `|y| = |x|` and the angle is exact (Ma et al. 2025, arXiv 2501.09732, neighbours as in its public
    implementation). Where `towards` is parallel to x there is no plane to turn in and y = c x.

    Args:
        noises, towards: `[..., *shape]` with `lead` leading dimensions. cosine: of the angle; broadcasts against
            them.
    """
    length = norms(noises, lead)
    unit = noises / length
    along = (unit * towards).flatten(lead).sum(-1).view_as(length)
    across = towards - along * unit
    across = across / norms(across, lead).clamp(min=torch.finfo(across.dtype).tiny)
    c = torch.as_tensor(cosine, dtype=noises.dtype)
    return length * (c * unit + (1 - c * c).clamp(min=0).sqrt() * across)


def with_norm(noises: Tensor, length: Tensor, lead: int = 1) -> Tensor:
    """Noises scaled to the given norms, which broadcast; a noise of norm 0 stays."""
    return noises * (length / norms(noises, lead).clamp(min=torch.finfo(noises.dtype).tiny))
