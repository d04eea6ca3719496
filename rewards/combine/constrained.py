"""One reward maximised while others keep to thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import RewardOutput
from diffalign.rewards.combine.aggregate import root
from diffalign.rewards.combine.lagrange import Form, Lagrangian, Sense
from diffalign.rewards.combine.members import labels, score_members
from diffalign.rewards.combine.wrapper import Of, Wrapper, checked


class Constrained(Wrapper):
    """`primary + sum_k lambda_k slack_k`, the multipliers moved after every batch scored in training mode.

    A multiplier grows while the batch mean of its constraint is on the wrong side of the threshold, and falls back to 0
    where it holds: the weights find themselves. Parts hold each reward's own score and `multiplier/NAME`. Std:
    `sqrt(std_0^2 + sum_k lambda_k^2 std_k^2)`.

    Args:
        of: the primary reward, then the constrained ones. thresholds: one per constrained reward, in its own units.
        senses: `at_least` or `at_most` for each; at_least by default.
        step, form, start, limit: of the dual ascent, see `lagrange.Lagrangian`.
    """

    def __init__(
        self,
        of: Of,
        thresholds: Sequence[float],
        senses: Sequence[Sense] | None = None,
        step: float = 0.05,
        form: Form = "projected",
        start: float = 0.1,
        limit: float = math.inf,
    ) -> None:
        super().__init__(of, "constrained")
        if len(self.of) < 2 or len(thresholds) != len(self.of) - 1:
            raise DiffalignError(
                f"reward {self.name!r} got {len(self.of)} rewards and {len(thresholds)} thresholds; expected the "
                "primary reward, at least one constrained one, and a threshold for each of those"
            )
        self.lagrangian: Lagrangian = checked(
            Lagrangian,
            self.name,
            thresholds=thresholds,
            senses=senses,
            step=step,
            form=form,
            start=start,
            limit=limit,
        )
        self.learnt["lagrangian"] = self.lagrangian

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`."""
        members = score_members(self.name, self.of, media, prompts)
        multipliers = self.lagrangian.multipliers.to(members.values)
        mean = self.lagrangian.value(members.values[0], members.values[1:])
        std = None
        if members.stds is not None:
            weights = torch.cat([multipliers.new_ones(1), multipliers])[:, None]
            std = root((weights * members.stds).square().sum(0))
        rows = multipliers[:, None].expand(-1, len(mean))
        named = zip(labels(self.of)[1:], rows, strict=True)
        parts = members.parts | {f"multiplier/{label}": row for label, row in named}
        if self.training:
            self.lagrangian.update(members.values[1:])
        return RewardOutput(mean, std, parts)
