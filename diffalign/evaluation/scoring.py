"""Run a scorer over pictures in batches: every score, its uncertainty and its parts, and what was skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.evaluation.pictures import Progress, silent
from diffalign.rewards.base import Reward, RewardOutput
from diffalign.rewards.guard import ask

Array = NDArray[np.float64]
SCORE_BATCH = 16


class Images(Protocol):
    """Pictures in [0, 1] that can be sliced into `[B, 3, H, W]`: a tensor or `Pictures`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice) -> Tensor: ...


@dataclass(frozen=True)
class Scored:
    """Scores of `N` pictures by one reward.

    Fields:
        mean: `[N]`, NaN where the scorer skipped a picture. std: its own uncertainty `[N]`, None without one.
        parts: named components `[N]`, NaN where a part does not apply.
    """

    mean: Array
    std: Array | None = None
    parts: dict[str, Array] = field(default_factory=dict)

    @property
    def skipped(self) -> int:
        """How many pictures have no score."""
        return int(np.isnan(self.mean).sum())


def unique_names(rewards: Sequence[Reward]) -> list[str]:
    """Names of rewards for tables; of equal ones the second becomes `name-2`, and so on."""
    names: list[str] = []
    for reward in rewards:
        name, count = reward.name, 2
        while name in names:
            name, count = f"{reward.name}-{count}", count + 1
        names.append(name)
    return names


def may_skip(reward: Reward) -> bool:
    """Whether NaN is how a reward says that it left a picture out (`skips`, or a guard with `on_error: skip`)."""
    return bool(getattr(reward, "skips", False)) or getattr(reward, "on_error", "raise") == "skip"


def score_pictures(
    reward: Reward,
    images: Images,
    prompts: Sequence[str],
    *,
    label: str,
    batch_size: int = SCORE_BATCH,
    progress: Progress = silent,
) -> Scored:
    """Score pictures one batch after the other, without gradients.

    A reward that skips (see `may_skip`) may return NaN for a picture it could not score; of any other reward a
    NaN is an error.

    Args:
        images: `[N, 3, H, W]` in [0, 1]. prompts: `N` texts. label: for progress and messages.

    Raises:
        DiffalignError: scores that are not finite, or not one per picture.
    """
    total = len(prompts)
    columns: dict[str, Array] = {}
    for start in range(0, total, batch_size):
        progress(label, start, total)
        rows = slice(start, min(start + batch_size, total))
        with torch.no_grad():
            output = ask(reward, images[rows], prompts[rows])
        for name, values in _named(output).items():
            column = columns.setdefault(name, np.full(total, np.nan))
            column[rows] = _checked(values, rows.stop - start, label)
    progress(label, total, total)
    mean, std = columns.pop("", np.empty(0)), columns.pop("<std>", None)
    _refuse_gaps(mean, label, may_skip(reward))
    return Scored(mean, std, columns)


def _named(output: RewardOutput) -> dict[str, Tensor]:
    """All columns of an output: "" for the mean, "<std>" for the uncertainty, parts by name."""
    uncertainty = {} if output.std is None else {"<std>": output.std}
    return {"": output.mean} | output.parts | uncertainty


def _checked(values: Tensor, expected: int, label: str) -> Array:
    found = values.detach().double().cpu().reshape(-1).numpy()
    if len(found) != expected:
        raise DiffalignError(f"{label}: {len(found)} scores for {expected} pictures; expected one each")
    return found


def _refuse_gaps(mean: Array, label: str, skips: bool) -> None:
    """Infinite scores are always wrong; missing ones are allowed for rewards that skip, unless all are missing."""
    bad = int((np.isinf(mean) if skips else ~np.isfinite(mean)).sum())
    if bad:
        raise DiffalignError(
            f"{label}: {bad} of {len(mean)} scores are not finite numbers. Look at the scorer's input, or let "
            "it skip such pictures (on_error: skip)."
        )
    if len(mean) and np.isnan(mean).all():
        raise DiffalignError(f"{label}: every one of {len(mean)} pictures was skipped; nothing to measure")
