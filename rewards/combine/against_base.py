"""Rewards measured against the untuned model: log-sigmoid and PAR.

Both take the scores of the base model from a table (`base`, a `BaseScores` or its JSON file, per prompt with a global
fallback) or a single number (`reference`). Their std is the scorer's, times the slope of the transform (delta method).
Parts: the plain score under the reward's name, and `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Reward, RewardOutput
from diffalign.rewards.combine.base_scores import BaseScores
from diffalign.rewards.combine.members import check_batch, prefixed
from diffalign.rewards.combine.transforms import Percentile, log_sigmoid, log_sigmoid_slope, par, par_slope
from diffalign.rewards.combine.wrapper import Of, Wrapper, only

Table: TypeAlias = BaseScores | str | Path


class LogSigmoid(Wrapper):
    """`log sigmoid((r - r_ref) / scale)` (LSC, arXiv 2402.00742); add several for "good in every respect".

    Args:
        of: one reward. base, reference: see above; exactly one of them.
        percentile: which quantile of the base scores r_ref is. method: `normal` fits a normal distribution to a
            prompt's scores, `empirical` sorts them.
        scale: 1 as in the paper, for rewards whose scores differ by about 1 between good and bad; `base` takes the
            std of the base scores, which suits any scale.
    """

    def __init__(
        self,
        of: Of,
        base: Table | None = None,
        reference: float | None = None,
        percentile: float = 0.85,
        method: Percentile = "normal",
        scale: float | Literal["base"] = 1.0,
    ) -> None:
        inner = only(of, "log-sigmoid")
        super().__init__(inner, f"log-sigmoid({getattr(inner, 'name', inner)})")
        self.base = _table(self.name, inner, base, reference)
        if not 0 < percentile < 1 or method not in ("normal", "empirical"):
            raise DiffalignError(
                f"reward {self.name!r}: percentile {percentile}, method {method!r}; expected a value between 0 and 1 "
                "and normal or empirical"
            )
        if (scale == "base" and self.base is None) or (
            scale != "base" and not (isinstance(scale, (int, float)) and scale > 0)
        ):
            raise DiffalignError(
                f"reward {self.name!r}: scale is {scale!r}; expected a positive number, or base with a table"
            )
        self.reference, self.percentile, self.scale = reference, percentile, scale
        self.method: Percentile = method

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`."""
        check_batch(self.name, media, prompts)
        inner = self.of[0].score(media, prompts)
        reference, scale = (value.to(inner.mean) for value in self._references(prompts))
        slope = log_sigmoid_slope(inner.mean, reference, scale)
        mean = log_sigmoid(inner.mean, reference, scale)
        return _transformed(self, inner, mean, slope, reference)

    def _references(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """r_ref and scale, each `[B]`."""
        if self.base is None:
            reference = torch.full((len(prompts),), float(self.reference or 0.0))
        else:
            reference = self.base.percentile(prompts, self.percentile, self.method)
        if self.scale == "base" and self.base is not None:
            return reference, self.base.std(prompts)
        return reference, torch.full((len(prompts),), float(self.scale))


class Par(Wrapper):
    """`mean_m sigmoid(k (r - r_ref^m))` over the base model's scores of the prompt (PAR, arXiv 2502.18770).

    Bounded in (0, 1): grows fast at first, then slowly, so that nothing is won by scores beyond the base model's.

    Args:
        of: one reward. base, reference: see above; exactly one of them.
        k: 1 as in the paper; for rewards with another scale, one over the std of the base scores.
    """

    def __init__(
        self, of: Of, base: Table | None = None, reference: float | None = None, k: float = 1.0
    ) -> None:
        inner = only(of, "par")
        super().__init__(inner, f"par({getattr(inner, 'name', inner)})")
        self.base = _table(self.name, inner, base, reference)
        if not k > 0:
            raise DiffalignError(f"reward {self.name!r}: k is {k}; expected a positive number")
        self.reference, self.k = reference, k

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`; the part `reference` is the mean base score."""
        check_batch(self.name, media, prompts)
        inner = self.of[0].score(media, prompts)
        if self.base is None:
            references = torch.full((len(prompts), 1), float(self.reference or 0.0))
        else:
            references = self.base.references(prompts)
        references = references.to(inner.mean)
        mean, slope = par(inner.mean, references, self.k), par_slope(inner.mean, references, self.k)
        return _transformed(self, inner, mean, slope, references.nanmean(1))


def _transformed(
    wrapper: Wrapper, inner: RewardOutput, mean: Tensor, slope: Tensor, reference: Tensor
) -> RewardOutput:
    std = None if inner.std is None else slope * inner.std
    return RewardOutput(mean, std, prefixed(wrapper.of[0].name, inner) | {"reference": reference})


def _table(name: str, inner: Reward, base: Table | None, reference: float | None) -> BaseScores | None:
    """The table of base scores, None where a number is given instead."""
    if (base is None) == (reference is None):
        raise DiffalignError(
            f"reward {name!r} needs either 'base' (a table of the base model's scores) or 'reference' (one number)"
        )
    if base is None:
        return None
    table = base if isinstance(base, BaseScores) else BaseScores.load(base)
    if table.reward != inner.name:
        raise DiffalignError(
            f"reward {name!r}: the base scores are those of {table.reward!r}, but it wraps {inner.name!r}; "
            "score the base model's samples with the same reward"
        )
    table.pooled()
    return table
