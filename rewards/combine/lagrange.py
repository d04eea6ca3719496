"""Maximise one reward while others keep to thresholds: Lagrange multipliers moved by dual ascent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Sense = Literal["at_least", "at_most"]
Form = Literal["projected", "softplus"]


class Lagrangian:
    """Multipliers `[K]` of K constraints on mean rewards (Moskovitz et al. 2023, arXiv 2310.04373).

    The slack of a constraint is `c - threshold` (at_least) or `threshold - c` (at_most): negative where it is violated.
    Projected: `lambda <- clip(lambda - step mean(slack), 0, limit)`. Softplus: `lambda = softplus(nu)`, and nu follows
    the gradient, which never makes a multiplier exactly 0 and moves small ones slowly.

    Args:
        thresholds: one per constraint. senses: at_least or at_most for each; all at_least by default.
        step: of the dual ascent, per batch and unit of slack. start: first value of every multiplier.
        limit: largest multiplier; a constraint that cannot be met raises its own without end otherwise.
    """

    def __init__(
        self,
        thresholds: Sequence[float],
        senses: Sequence[Sense] | None = None,
        step: float = 0.05,
        form: Form = "projected",
        start: float = 0.1,
        limit: float = math.inf,
    ) -> None:
        senses = ["at_least"] * len(thresholds) if senses is None else senses
        if len(senses) != len(thresholds) or not set(senses) <= {"at_least", "at_most"}:
            raise ValueError(
                f"{len(thresholds)} constraints need as many senses at_least or at_most; got {list(senses)}"
            )
        if form not in ("projected", "softplus"):
            raise ValueError(f"form is {form!r}; expected projected or softplus")
        if step <= 0 or limit <= 0 or not 0 <= start <= limit or (form == "softplus" and start == 0):
            raise ValueError(
                f"step {step}, start {start}, limit {limit}: expected step > 0, limit > 0 and 0 <= start <= limit "
                "(start > 0 for softplus)"
            )
        self.thresholds = torch.tensor(thresholds, dtype=torch.float64)
        self.signs = torch.tensor([1.0 if s == "at_least" else -1.0 for s in senses], dtype=torch.float64)
        self.step, self.form = step, form
        self.highest = limit if form == "projected" else _inverse_softplus(limit)
        value = start if form == "projected" else _inverse_softplus(start)
        self.raw = torch.full((len(thresholds),), value, dtype=torch.float64)

    @property
    def multipliers(self) -> Tensor:
        """Current multipliers `[K]`, float64, never negative."""
        return self.raw.clone() if self.form == "projected" else F.softplus(self.raw)

    def slack(self, constraints: Tensor) -> Tensor:
        """How far each sample is on the allowed side, `[K, B]` to `[K, B]`."""
        thresholds, signs = self.thresholds.to(constraints)[:, None], self.signs.to(constraints)[:, None]
        return signs * (constraints - thresholds)

    def value(self, primary: Tensor, constraints: Tensor) -> Tensor:
        """The Lagrangian `primary + sum_k lambda_k slack_k` per sample: `[B]`, `[K, B]` to `[B]`."""
        return primary + (self.multipliers.to(primary)[:, None] * self.slack(constraints)).sum(0)

    def update(self, constraints: Tensor) -> None:
        """One step of dual ascent on a batch `[K, B]`; scores that are NaN are left out."""
        slack = self.slack(constraints.detach().double().cpu()).nanmean(1).nan_to_num(0.0)
        if self.form == "projected":
            self.raw = (self.raw - self.step * slack).clamp(0, self.highest)
        else:
            moved = self.raw - self.step * slack * torch.sigmoid(self.raw)
            self.raw = moved.clamp_max(self.highest)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `load_state_dict` takes back."""
        return {"raw": self.raw.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.raw = state["raw"].double().cpu().clone()


def _inverse_softplus(value: float) -> float:
    """The nu with `softplus(nu) = value`."""
    return value + math.log(-math.expm1(-value))
