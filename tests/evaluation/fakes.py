"""Stand-ins shared by the evaluation tests: prompts, pictures and rewards with known answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.evaluation.compare import Comparison, compare
from diffalign.evaluation.prompts import EvalPrompt
from diffalign.rewards import RewardOutput


class Brightness:
    """Mean pixel value, with a part for all pictures, a part for some, and an uncertainty."""

    name = "brightness"
    modality = "image"
    differentiable = True
    kind = "sample"

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        mean = media.mean((1, 2, 3))
        red = media[:, 0].mean((1, 2))
        some = torch.where(torch.tensor(["red" in p for p in prompts]), mean, torch.nan)
        return RewardOutput(mean, torch.full_like(mean, 0.25), {"red": red, "some": some})


class Lit:
    """1 for pictures that are brighter than a half, else 0."""

    name = "lit"
    modality = "image"
    differentiable = False
    kind = "sample"

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        return RewardOutput((media.mean((1, 2, 3)) > 0.5).float())


def flat(values: Sequence[float], size: int = 8) -> Tensor:
    """Pictures `[N, 3, size, size]` of one grey value each."""
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, size, size)


def prompts(n: int, categories: Sequence[str] = ("even", "odd")) -> list[EvalPrompt]:
    """`n` different prompts in alternating categories."""
    return [EvalPrompt(f"prompt {i}", categories[i % len(categories)], seed=i) for i in range(n)]


def lit_comparison(n: int = 24) -> tuple[Comparison, Tensor, Tensor]:
    """A comparison with gains, losses and ties: a third of the base is lit, more of the tuned."""
    base = flat([1.0 if i % 3 == 0 else 0.1 for i in range(n)])
    tuned = flat([0.0 if i % 9 == 0 else 0.9 for i in range(n)])
    return compare(base, tuned, prompts(n), [Lit(), Brightness()]), base, tuned
