"""Pair losses on stored denoising steps: log-ratios of Gaussian transitions instead of evidence lower bounds.

A step draws `x_prev = mean + std z`. Log-densities are means over elements, as in the releases; betas of this family
are not those of the ELBO losses.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.process import expand_as


def step_log_ratio(x_prev: Tensor, mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """`log p(x_prev) - log p_ref(x_prev)` `[B]`, a mean over elements, in float32 and without cancellation.

    Args:
        x_prev, mean, reference_mean: `[B, ...]`. std: `[B]`, of both models.
    """
    change = mean.float() - reference_mean.float()
    middle = x_prev.float() - (mean.float() + reference_mean.float()) / 2
    return (change * middle).flatten(1).mean(1) / std.float().square()


def clipped_ratio_loss(
    chosen: Tensor, rejected: Tensor, preference: Tensor, beta: float, clip: float = 0.1
) -> Tensor:
    """`-log sigmoid(beta (log rho_chosen - log rho_rejected))`, rho clamped to [1 - clip, 1 + clip]; `[B]`.

    Log-ratios are clamped where the releases clamp ratios. A sample outside the band has no gradient, in whichever
    direction it left. With beta and clip 0.1 the loss stays in [0.683, 0.703]. Source: D3PO (arXiv 2311.13231,
    beta 0.1), SPO (arXiv 2406.04314, beta 10), LPO (arXiv 2502.01051, beta 500).
    """
    low, high = math.log1p(-clip), math.log1p(clip)
    margin = beta * (chosen.clamp(low, high) - rejected.clamp(low, high))
    return -preference * F.logsigmoid(margin) - (1 - preference) * F.logsigmoid(-margin)


def shared_start_margin(
    chosen: Tensor, rejected: Tensor, mean: Tensor, reference_mean: Tensor, std: Tensor
) -> Tensor:
    """`log rho_chosen - log rho_rejected` `[B]` of two samples of the same step, before any clamp.

    `mean[(x_w - x_l) (mu - mu_ref)] / std^2`: with one x_t both candidates have the same mean, so one forward of
    policy and reference each does what the releases of SPO and LPO do with two, and it is linear in the policy.
    """
    product = (chosen.float() - rejected.float()) * (mean.float() - reference_mean.float())
    return (product / expand_as(std.float().square(), product)).flatten(1).mean(1)


def elbo_beta(beta: float, coefficient: Tensor, std: Tensor) -> Tensor:
    """The DPO beta (of mean errors) that a step loss's beta stands for: `beta c^2 / std^2`.

    `coefficient` c is that of the predicted noise in the step's mean. It ranges over two orders of magnitude along a
    schedule, which is why step betas and ELBO betas cannot be compared.
    """
    return beta * (coefficient / std).square()


def scored_pairs(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Best and worst candidate `[B]` of each group of scores `[B, K]`, and which groups differ enough `[B]`.

    A group counts when softmax of the two extreme scores differs by more than `threshold`, as in SPO.
    """
    best, worst = scores.argmax(1), scores.argmin(1)
    gap = scores.gather(1, best[:, None]) - scores.gather(1, worst[:, None])
    return best, worst, torch.tanh(gap.squeeze(1) / 2) > threshold
