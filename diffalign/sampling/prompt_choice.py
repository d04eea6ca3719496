"""Which prompts a round of an online run draws pictures for: epochs over all of them, or those that teach most.

A group whose pictures are all good or all bad has nothing to compare. The curriculum keeps a success rate per prompt
and prefers prompts whose rate lies in a band. A choice depends on (seed, round) and on rates that are plain JSON, so a
resumed run chooses the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from diffalign.randomness import batch_records, generator
from diffalign.strict import StrictModel


class PromptChoiceOptions(StrictModel):
    """How the prompts of a round are chosen."""

    kind: Literal["epochs", "success"] = "epochs"
    """epochs: every prompt once, in a new order each time. success: a curriculum by success rate."""
    band: tuple[float, float] = (0.2, 0.8)
    """success: prompts with a rate in this range are preferred: neither solved nor hopeless."""
    success: float | None = None
    """success: a picture with a reward above this is a success; null: above the moving mean of all rewards, which
    follows the policy and so never runs out of prompts in the band."""
    outside: float = Field(default=0.1, gt=0, le=1)
    """success: weight of a prompt outside the band, where one inside weighs 1. Small values rarely look again whether
    a prompt has become easier."""
    explore: float = Field(default=0.5, ge=0, le=1)
    """success: share of a round for prompts that were never drawn, as long as there are any."""
    memory: float = Field(default=0.5, ge=0, lt=1)
    """success: how much a prompt's earlier rate counts against its latest one, and so for the mean of rewards."""

    @field_validator("band")
    @classmethod
    def _band_in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1] <= 1:
            raise ValueError("should be two values in [0, 1], the smaller one first")
        return value


class PromptChooser:
    """Chooses prompts by index and remembers how they fared.

    Attributes:
        rates: success rate in [0, 1] of each prompt seen so far, by index. mean: moving mean of all rewards; None
            before the first round. observed: the last round that was learned from.

    Args:
        seed: of the run. size: number of prompts.
    """

    def __init__(self, options: PromptChoiceOptions, seed: int, size: int) -> None:
        self.options, self.seed, self.size = options, seed, size
        self.rates: dict[int, float] = {}
        self.mean: float | None = None
        self.observed = -1

    def __call__(self, round_number: int, count: int) -> list[int]:
        """Indices of the `count` prompts of a round; without repetition by the curriculum, if there are enough."""
        if self.options.kind == "epochs" or count >= self.size:
            return batch_records(self.seed, round_number, count, self.size)
        unseen = [index for index in range(self.size) if index not in self.rates]
        fresh = min(len(unseen), max(round(self.options.explore * count), count - len(self.rates)))
        known, keys = sorted(self.rates), (self.seed, "prompts", round_number)
        weights = [self._weight(self.rates[index]) for index in known]
        return [
            *weighted_choice(unseen, [1.0] * len(unseen), fresh, *keys, "unseen"),
            *weighted_choice(known, weights, count - fresh, *keys, "known"),
        ]

    def observe(self, round_number: int, prompts: Tensor, rewards: Tensor) -> dict[str, float]:
        """Learn from a round, all samples of all processes; a round that was observed before changes nothing.

        Args:
            prompts: `[N]` long, the index of each sample's prompt. rewards: `[N]`, NaN where there is none.

        Returns:
            `success_rate` of the round's samples and `prompts_in_band`, the share of prompts seen so far; empty
            without any reward, and for epochs, which learn nothing.
        """
        known = rewards.isfinite()
        if self.options.kind == "epochs" or not bool(known.any()):
            return {}
        values, indices = rewards[known].double(), prompts[known]
        if round_number > self.observed:
            self.observed = round_number
            # Sorted, so that the sum does not depend on the order of processes.
            self.mean = self._moved(self.mean, float(values.sort().values.mean()))
            for index in indices.unique().tolist():
                rate = float((values[indices == index] > self.border).double().mean())
                self.rates[index] = self._moved(self.rates.get(index), rate)
        inside = [self._in_band(rate) for rate in self.rates.values()]
        success = float((values > self.border).double().mean())
        return {"success_rate": success, "prompts_in_band": sum(inside) / max(1, len(inside))}

    @property
    def border(self) -> float:
        """The reward above which a sample is a success."""
        if self.options.success is not None:
            return self.options.success
        return -math.inf if self.mean is None else self.mean

    def state(self) -> dict[str, Any]:
        """What was learned, as JSON values."""
        return {
            "observed": self.observed,
            "mean": self.mean,
            "rates": {str(index): rate for index, rate in sorted(self.rates.items())},
        }

    def restore(self, values: dict[str, Any]) -> None:
        """Take what `state` gave."""
        self.observed, self.mean = values["observed"], values["mean"]
        self.rates = {int(index): float(rate) for index, rate in values["rates"].items()}

    def _moved(self, before: float | None, value: float) -> float:
        memory = self.options.memory
        return value if before is None else memory * before + (1 - memory) * value

    def _in_band(self, rate: float) -> bool:
        low, high = self.options.band
        return low <= rate <= high

    def _weight(self, rate: float) -> float:
        return 1.0 if self._in_band(rate) else self.options.outside


def weighted_choice(
    items: Sequence[int], weights: Sequence[float], count: int, *keys: int | str
) -> list[int]:
    """`count` different items, drawn one after the other with chances proportional to their weights.

    Each item gets an exponential waiting time at the rate of its weight, and the first ones are taken (Efraimidis and
    Spirakis 2006).

    Args:
        weights: above 0, one per item. keys: seed of the draw.
    """
    uniform = torch.rand(len(items), generator=generator(*keys), dtype=torch.float64).tolist()
    waits = [-math.log1p(-u) / weight for u, weight in zip(uniform, weights, strict=True)]
    order = sorted(range(len(items)), key=waits.__getitem__)
    return [items[place] for place in order[:count]]
