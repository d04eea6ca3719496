"""Losses of single judged pictures: how desirable each one is, against a common baseline.

Notation: `g = e_reference - e_policy`, what the policy gained on a picture, a mean of squares; `label` q in [0, 1] is
the probability that the picture is desirable (0.5: nobody knows). Sources use no factor 1/2: half of a DPO beta
does the same here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

UTILITIES = ("kahneman_tversky", "loss_averse", "risk_seeking")


def kto_loss(
    advantage: Tensor,
    label: Tensor,
    utility: str = "kahneman_tversky",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """`w_y (1 - U(a))` with a = advantage for desirable, minus it for undesirable pictures; `[B]`.

    U: kahneman_tversky `sigmoid(a)`, loss_averse `log sigmoid(a)`, risk_seeking `-log sigmoid(-a)`. With loss_averse it
    is binary cross-entropy of the implicit reward, plus 1. Soft labels weigh both cases.

    Args:
        advantage: `beta (g - baseline)` `[B]`. label: q `[B]`.

    Source: Diffusion-KTO (Li et al. 2024, arXiv 2404.04465), `halo` options of the release.
    """
    up = desirable_weight * (1 - _utility(advantage, utility))
    down = undesirable_weight * (1 - _utility(-advantage, utility))
    return label * up + (1 - label) * down


def kto_baseline(gain_sum: Tensor, count: Tensor | float) -> Tensor:
    """`max(0, mean g)` without gradient: the estimate of the KL divergence that gains are compared with."""
    return (gain_sum.detach() / count).clamp(min=0)


def _utility(advantage: Tensor, name: str) -> Tensor:
    if name == "kahneman_tversky":
        return torch.sigmoid(advantage)
    if name == "loss_averse":
        return F.logsigmoid(advantage)
    if name == "risk_seeking":
        return -F.logsigmoid(-advantage)
    raise ValueError(f"utility is {name!r}; expected one of: {', '.join(UTILITIES)}")
