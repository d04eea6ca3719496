"""The members of a wrapper on one scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Reward
from diffalign.rewards.combine.members import Members, check_batch, score_members, score_parts
from diffalign.rewards.combine.moments import RunningMoments
from diffalign.rewards.combine.normalise import Mode, Normaliser, Statistics


class Panel:
    """Scores the rewards of a wrapper, or named parts of its one reward, and normalises them.

    Raises:
        DiffalignError: parts of more than one reward, or options of the normalisation that do not fit.
    """

    def __init__(
        self,
        name: str,
        of: Sequence[Reward],
        members: Sequence[str] | None = None,
        normalise: Mode = "none",
        statistics: Statistics | None = None,
    ) -> None:
        if members is not None and (len(of) != 1 or not members):
            raise DiffalignError(
                f"reward {name!r}: 'members' names parts of one reward; got {len(of)} rewards and "
                f"{len(members)} parts"
            )
        self.name, self.of, self.members = name, of, members
        self.size = len(of) if members is None else len(members)
        self.normaliser = Normaliser(name, self.size, normalise, statistics)

    def score(self, media: Tensor, prompts: Sequence[str], learn: bool) -> Members:
        """Members' scores, normalised; their parts keep the scores as they came."""
        raw = self._raw(media, prompts)
        values, stds = self.normaliser(raw.values, raw.stds, learn)
        return Members(values, stds, raw.parts)

    def fit(self, media: Tensor, prompts: Sequence[str], batch_size: int) -> None:
        """Start the moments anew from the members' scores on calibration media."""
        check_batch(self.name, media, prompts)
        fitted = RunningMoments(self.size)
        with torch.no_grad():
            for start in range(0, len(media), batch_size):
                rows = slice(start, start + batch_size)
                fitted.update(self._raw(media[rows], prompts[rows]).values)
        self.normaliser.moments = fitted

    def state_dict(self) -> dict[str, Tensor]:
        """The moments; empty when nothing is normalised."""
        return self.normaliser.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.normaliser.load_state_dict(state)

    def _raw(self, media: Tensor, prompts: Sequence[str]) -> Members:
        if self.members is None:
            return score_members(self.name, self.of, media, prompts)
        return score_parts(self.name, self.of[0], self.members, media, prompts)
