"""Mean and std over repeated scores of the same samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.rewards.base import RewardOutput
from diffalign.rewards.combine.aggregate import total_std, variance


def spread_over_passes(outputs: Sequence[RewardOutput]) -> tuple[Tensor, Tensor]:
    """Mean `[B]` over passes, and std of the mixture: variance over passes plus the scorer's own mean variance."""
    values = torch.stack([output.mean for output in outputs]).float()
    stds = [output.std for output in outputs if output.std is not None]
    within = torch.stack(stds).float() if stds else None
    return values.mean(0), total_std(variance(values), within)
