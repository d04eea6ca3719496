"""Smooth latent spaces: how much pictures change with the noise they are made from, in training and along a path.

Guo et al. 2024 (Smooth Diffusion, CVPR), arXiv 2312.04410. Training adds `(|J^T delta| - a)^2`: J is the Jacobian of
the predicted clean latent by the noise at one step, delta a random direction and a the running mean, so that a change
of the noise moves the output by an amount that is the same everywhere (as StyleGAN2's path lengths, Karras et al.
2020). The metric is ISTD, the deviation of the steps between pictures along a path.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def step_variation(clean: Tensor, noise: Tensor, delta: Tensor, sigma: Tensor) -> Tensor:
    """`|J^T (sigma delta / sqrt(n))|` per sample `[B]`, differentiable in the weights.

    Eq. 5 and 6: sensitivity of the prediction to the noise in one random direction. It is a gradient within the
    gradient, so attention must be one that can be differentiated twice:
        `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.

    Args:
        clean: predicted clean latents `[B, ...]`, n numbers each, computed from noise. noise: `[B, ...]`, requires
            grad. delta: standard normal, like `clean`. sigma: `[B]`, noise level of the step, sqrt(1 - alpha_bar).

    Raises:
        RuntimeError: `clean` was not computed from `noise`.
    """
    (jacobian,) = torch.autograd.grad((clean * delta.to(clean)).sum(), noise, create_graph=True)
    square = jacobian.flatten(1).float().square().sum(1)
    # The root of 0 has no gradient; a sample whose output does not move is flat and pulls at nothing.
    length = torch.where(square > 0, square.clamp(min=torch.finfo(square.dtype).tiny).sqrt(), 0.0)
    # Lengths are scaled, not the direction, whose numbers would be lost in half precision.
    return length * sigma.to(length) / math.sqrt(clean[0].numel())


def running_mean(mean: Tensor, found: Tensor, decay: float, steps: Tensor) -> Tensor:
    """`a + decay (v - a) / (1 - (1 - decay)^(n + 1))`, the mean `[]` of n = `steps` past steps and the one found.

    The correction of Adam (Kingma and Ba 2015, section 3): the first steps count alike. Without it, as in the release,
    a starts at 0, and for 1 / decay steps the penalty pulls all variation down more than it evens it out.
    """
    return mean + decay * (found - mean) / (1 - (1 - decay) ** (steps + 1))


def slerp(first: Tensor, second: Tensor, ratio: float) -> Tensor:
    """Spherical interpolation of noises `[B, ...]`: `sin((1 - r) o) / sin(o) x + sin(r o) / sin(o) y`, o their angle.

    Shoemake 1985. Straight interpolation shortens noises: halfway between independent ones the norm is 0.71 of
    theirs. It is used where noises are parallel and the angle says nothing.
    """
    x, y = first.flatten(1), second.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=1).clamp(-1, 1)
    angle = cosine.acos()[:, None]
    straight = angle.sin() < 1e-4
    sine = torch.where(straight, 1.0, angle.sin())
    a = torch.where(straight, 1 - ratio, ((1 - ratio) * angle).sin() / sine)
    b = torch.where(straight, ratio, (ratio * angle).sin() / sine)
    return (a * x + b * y).view_as(first)


def istd(pictures: Tensor) -> Tensor:
    """Deviation of the L2 distances between neighbours along each path `[P]`; its mean over paths is ISTD.

    The paper: 11 pictures per path from `slerp` at ratios 0, 0.1, ..., 1, 500 pairs of noises; 38.6 for SD 1.5 at 512
    pixels and 16.5 with the regulariser. 0: every step changes the picture by the same amount. The deviation is that
    of the steps themselves (divided by their number).

    Args:
        pictures: `[P, K, C, H, W]` in [0, 1], K > 1 along each path.
    """
    return step_lengths(pictures).std(1, correction=0)


def step_lengths(pictures: Tensor) -> Tensor:
    """L2 distances `[P, K - 1]` between neighbours along each path; pictures `[P, K, C, H, W]` in [0, 1]."""
    return (pictures[:, 1:] - pictures[:, :-1]).flatten(2).float().norm(dim=2)
