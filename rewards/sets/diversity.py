"""Mean pairwise distance of a set in an encoder: of the whole set, and among the pictures of each prompt.

The distance is `1 - cosine`. For features of length 1 it is half the squared Euclidean distance, which is what LPIPS
averages over places and layers; so a perceptual encoder gives a LPIPS-like diversity of whole pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.sets.features import as_matrix, unit_rows


def pairwise_distance(features: Tensor) -> Tensor:
    """Mean of `1 - cosine` over all pairs of rows `[N, D]`; a float64 scalar in [0, N / (N - 1)], differentiable.

    Costs O(N D): the cosines of all pairs sum to the squared length of the sum of unit rows, less N.

    Raises:
        DiffalignError: fewer than two rows, a row of zeros, numbers that are not finite.
    """
    rows = unit_rows(as_matrix(features, at_least=2))
    count = len(rows)
    return 1 - (rows.sum(0).square().sum() - count) / (count * (count - 1))


def diversity_per_prompt(features: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """`pairwise_distance` among the rows of each prompt that has at least two, in order of first appearance.

    Raises:
        DiffalignError: rows and prompts differ in number, or no prompt has two rows.
    """
    if len(features) != len(prompts):
        raise DiffalignError(f"{len(features)} rows of features for {len(prompts)} prompts; expected as many")
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    repeated = {prompt: own for prompt, own in rows.items() if len(own) > 1}
    if not repeated:
        raise DiffalignError(
            f"none of {len(rows)} prompts has two pictures; diversity per prompt needs several seeds per prompt"
        )
    return {prompt: pairwise_distance(features[torch.tensor(own)]) for prompt, own in repeated.items()}
