"""Bringing members to mean 0 and std 1 before they are added or compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.combine.moments import RunningMoments

Mode = Literal["none", "running", "calibrated"]
Statistics = Sequence[Sequence[float]]


class Normaliser:
    """`(r - mean) / std` per member.

    Args:
        name: of the reward it belongs to, for messages. members: how many.
        mode: `none`; `running`, moments of all that was scored in training mode, the batch itself included, which
            makes a score depend on what came before it; `calibrated`, fixed moments, given or fitted once.
        statistics: `[[mean, std], ...]`, one pair per member, for calibrated.

    Raises:
        DiffalignError: unknown mode, or statistics that do not fit it.
    """

    def __init__(self, name: str, members: int, mode: Mode = "none", statistics: Statistics | None = None):
        if mode not in get_args(Mode):
            allowed = ", ".join(get_args(Mode))
            raise DiffalignError(f"reward {name!r}: normalise is {mode!r}; expected one of {allowed}")
        self.name, self.mode = name, mode
        self.moments = RunningMoments(members)
        if statistics is not None:
            self._take(statistics)

    def __call__(self, values: Tensor, stds: Tensor | None, learn: bool) -> tuple[Tensor, Tensor | None]:
        """Normalised values `[K, B]` and stds; running moments take in the batch first when `learn` is set.

        Raises:
            DiffalignError: nothing was seen or fitted yet.
        """
        if self.mode == "none":
            return values, stds
        if self.mode == "running" and learn:
            self.moments.update(values)
        if not (self.moments.count > 0).all():
            raise DiffalignError(
                f"reward {self.name!r} has no statistics to normalise with; call calibrate(media, prompts), give "
                "'statistics', load a saved state, or (running) score finite batches in training mode first"
            )
        mean, std = self.moments.mean.to(values)[:, None], self.moments.std.to(values)[:, None]
        return (values - mean) / std, None if stds is None else stds / std

    def state_dict(self) -> dict[str, Tensor]:
        """The moments; empty when nothing is normalised."""
        return {} if self.mode == "none" else self.moments.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        if state:
            self.moments.load_state_dict(state)

    def _take(self, statistics: Statistics) -> None:
        members = len(self.moments.count)
        if self.mode != "calibrated":
            raise DiffalignError(
                f"reward {self.name!r} got statistics with normalise: {self.mode}; they belong to calibrated"
            )
        if len(statistics) != members or any(len(pair) != 2 or not pair[1] > 0 for pair in statistics):
            raise DiffalignError(
                f"reward {self.name!r} got statistics {statistics!r} for {members} members; "
                "expected [mean, std] with std > 0 for each"
            )
        pairs = torch.tensor(statistics, dtype=torch.float64)
        # Two scores at mean +- std / sqrt(2) have exactly this mean and this unbiased std.
        self.moments.load_state_dict(
            {"count": torch.full((members,), 2.0), "center": pairs[:, 0], "squares": pairs[:, 1].square()}
        )
