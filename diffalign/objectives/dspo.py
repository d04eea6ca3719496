"""Direct score preference optimisation: the score of the preferred picture, corrected by the policy's own reward.

Zhu et al., "DSPO: Direct Score Preference Optimization for Diffusion Model Alignment" (ICLR 2025). The release holds
two different losses, one for SD 1.5 and one for SDXL; both are here. Predictions are `[B, ...]`, margins `[B]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.process import expand_as

# Mean squared change of the chosen prediction above which the release's SDXL branch weighs that change itself.
CHANGE_LIMIT = 0.1


def dspo_score_loss(policy: Tensor, reference: Tensor, target: Tensor, margin: Tensor, beta: float) -> Tensor:
    """`mean ((p - y) - beta (1 - sigmoid(h)) (p - p_ref))^2` on the chosen picture: the release for SD 1.5.

    With its beta of 0.001 the correction is a thousandth of the change, h is near 0, and the loss is fine-tuning on
    chosen pictures to three digits. Nothing is detached, as in the release.
    """
    change = policy.float() - reference.float()
    weight = expand_as(beta * torch.sigmoid(-margin), change)
    return (policy.float() - target.float() - weight * change).square().flatten(1).mean(1)


def dspo_squared_loss(policy: Tensor, reference: Tensor, margin: Tensor) -> Tensor:
    """`(1 - sigmoid(h))^2`, the squared-error form of DPO: the release for SDXL.

    Where the predictions of the batch have moved by 0.1 or more in mean square, `(1 - sigmoid(h))^2` times that square,
    per pair. This branch depends on the batch, and a sane run does not reach it.
    """
    change = (policy.float() - reference.float()).square().flatten(1).mean(1)
    weight = torch.sigmoid(-margin).square()
    return torch.where(change.detach().mean() >= CHANGE_LIMIT, weight * change, weight)
