"""Evolution strategies over noises: CMA-ES with full or diagonal covariance, through the package `cma`.

Hansen 2016, arXiv 1604.00772 (CMA-ES); Ros and Hansen 2008 (separable CMA-ES, `CMA_diagonal`: variances only, learned
faster by (d + 2) / 3). A full covariance costs d^2 numbers and its eigenvectors d^3 operations, so it is for latents
of a few hundred numbers; that of an SDXL noise (65,536) would have 17 GB in float32.

The first distribution is `N(sqrt(1 - sigma^2) start, sigma^2 I)`: its samples have the norm of Gaussian noise for
every sigma. With sigma = 1 the first round is best-of-N. Later ones leave the shell on which a generator was trained,
since the mean of selected noises is shorter and the step size adapts, so candidates are scaled back to the start's
norm before they are drawn.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.inference.search import NoiseSearch, norms, with_norm
from diffalign.randomness import derive_seed
from diffalign.strict import StrictModel

# Elements up to which a full covariance is learned: 1000^2 float64 numbers are 8 MB, their eigenvectors a second.
FULL_COVARIANCE = 1000


class EvolutionConfig(StrictModel):
    """Options of CMA-ES."""

    method: Literal["evolution"] = "evolution"
    """CMA-ES; diagonal covariance for noises of more than 1000 elements."""
    candidates: int | None = Field(default=None, ge=4)
    """Noises per round and prompt; null: 4 + 3 log(d), which is 28 for 3,072 elements and 37 for 65,536."""
    sigma: float = Field(default=1.0, gt=0, le=1)
    """First step size: 1 searches all noises, smaller ones the neighbourhood of the start."""
    covariance: Literal["auto", "full", "diagonal"] = "auto"
    """What is learned about directions; auto: full up to 1000 elements."""
    keep_norm: bool = True
    """Scale every candidate to the start's norm. Off, the search may leave the noises that the model was trained on."""


class Evolution(NoiseSearch):
    """One strategy per row. Only the order of rewards is used, and a failed candidate is the worst of its round.

    A state holds the rewards of all rounds instead of covariances: a restored strategy is told them again and so
    draws the same candidates, to the bit.

    Raises:
        DiffalignError: the package is not installed.
    """

    def __init__(self, start: Tensor, seeds: Sequence[int], config: EvolutionConfig | None = None) -> None:
        super().__init__(start, seeds)
        self.config = config or EvolutionConfig()
        self._length = norms(self.start)
        self._reset()

    def _reset(self) -> None:
        self._history: list[Tensor] = []
        self._raw: list[Any] = []
        with contained():
            self._strategies = [
                strategy(row.flatten().double().numpy(), seed, self.config)
                for row, seed in zip(self.start, self.seeds, strict=True)
            ]

    def _propose(self) -> Tensor:
        self._sample()
        found = torch.from_numpy(np.array(self._raw)).float().view(len(self.seeds), -1, *self.start.shape[1:])
        if self.config.keep_norm:
            found = with_norm(found, self._length[:, None], lead=2)
        if self.round == 0:
            found[:, 0] = self.start
        return found

    def _sample(self) -> None:
        """Ask every strategy; candidate 0 of the first round is the start."""
        self._raw = []
        with contained():
            for row, each in zip(self.start, self._strategies, strict=True):
                if self.round == 0:
                    each.inject([row.flatten().double().numpy()], force=True)
                self._raw.append(each.ask())

    def _learn(self, noises: Tensor, rewards: Tensor) -> None:
        self._tell(rewards)
        self._history.append(rewards)

    def _tell(self, rewards: Tensor) -> None:
        """Tell the places of rewards `[B, M]`; a row without any learns nothing."""
        with contained():
            for each, raw, row in zip(self._strategies, self._raw, rewards, strict=True):
                if not row.isnan().all():
                    each.tell(raw, places(row).tolist())

    def _state(self) -> dict[str, Tensor]:
        told = torch.stack(self._history) if self._history else torch.empty(0, len(self.seeds), 0)
        return {"told": told}

    def _restore(self, state: dict[str, Tensor]) -> None:
        rounds = self.round
        self._reset()
        for self.round, rewards in enumerate(state["told"]):
            self._sample()
            self._learn(self.start, rewards)
        self.round = rounds


def places(rewards: Tensor) -> Tensor:
    """The place of each reward `[M]`, 0 for the best, in float64; NaN comes last and equals keep their order."""
    order = rewards.nan_to_num(-math.inf).argsort(descending=True, stable=True)
    return torch.empty(len(rewards), dtype=torch.float64).scatter_(
        0, order, torch.arange(len(rewards), dtype=torch.float64)
    )


def strategy(start: np.ndarray, seed: int, config: EvolutionConfig) -> Any:
    """A `cma.CMAEvolutionStrategy` around a flat noise `[d]`, with random numbers of its own.

    Raises:
        DiffalignError: the package is not installed.
    """
    try:
        import cma
    except ImportError as error:
        raise DiffalignError(
            "method evolution needs the package cma, which is not installed. Run: pip install 'diffalign[search]'"
        ) from error
    numbers = np.random.default_rng(derive_seed(seed, "evolution"))
    diagonal = config.covariance == "diagonal" or (
        config.covariance == "auto" and len(start) > FULL_COVARIANCE
    )
    options = {
        "CMA_diagonal": diagonal,
        "randn": lambda *shape: numbers.standard_normal(shape),
        "seed": np.nan,  # the package's way to say: do not seed
        "verbose": -11,  # silent, and no options are read from files
        "verb_log": 0,
    }
    if config.candidates:
        options["popsize"] = config.candidates
    return cma.CMAEvolutionStrategy(math.sqrt(1 - config.sigma**2) * start, config.sigma, options)


@contextmanager
def contained() -> Iterator[None]:
    """Keep the package's work to itself.

    It draws from numpy's global generator in a self-check of its step size, and warns of a start that was shown but,
    with all rewards of the round failed, never told.
    """
    before = np.random.get_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            np.random.set_state(before)
