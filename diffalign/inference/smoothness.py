"""Smooth latent spaces: a regulariser for training, and how unevenly pictures change along a path between noises.

Guo et al. 2024 (Smooth Diffusion, CVPR), arXiv 2312.04410. Training adds `(|J^T delta| - a)^2`: J is the Jacobian of
the predicted clean latent by the noise at one step, delta a random direction and a the running mean, so that a change
of the noise moves the output by an amount that is the same everywhere (as StyleGAN2's path lengths, Karras et al.
2020). The metric is ISTD, the deviation of the steps between pictures along a path.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffalign.process import expand_as


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
    scale = sigma / math.sqrt(clean[0].numel())
    direction = delta * expand_as(scale, clean).to(delta)
    (jacobian,) = torch.autograd.grad((clean * direction).sum(), noise, create_graph=True)
    square = jacobian.flatten(1).float().square().sum(1)
    # The root of 0 has no gradient; a sample whose output does not move is flat and pulls at nothing.
    return torch.where(square > 0, square.clamp(min=torch.finfo(square.dtype).tiny).sqrt(), 0.0)


class Smoothness:
    """The running mean of variations, and the penalty around it; a trainer adds `weight * penalty` to its loss.

    Args:
        decay: share of a step's mean that the running mean takes in; the release's is 0.01. It starts at 0 there, and
            here, so that early penalties are large.
    """

    def __init__(self, decay: float = 0.01) -> None:
        self.decay = decay
        self.mean = torch.zeros(())

    def penalty(self, variation: Tensor) -> Tensor:
        """`(v - a)^2` per sample `[B]`, with a moved towards the batch's mean first, as in the release.

        The part of v in a takes part in the gradient of this step; afterwards a is a number.
        """
        before = self.mean.to(variation)
        mean = before + self.decay * (variation.mean() - before)
        self.mean = mean.detach()
        return (variation - mean).square()

    def state(self) -> dict[str, Tensor]:
        """The running mean, which a checkpoint needs: the release loses it on a resume."""
        return {"mean": self.mean.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.mean = state["mean"].clone()


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
    distances = (pictures[:, 1:] - pictures[:, :-1]).flatten(2).float().norm(dim=2)
    return distances.std(1, correction=0)
