"""Make clean scenes look as a small generator draws them: bent outlines, blur, shifted colours, noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BEND = 1.2
BLUR = 1.0
TINT = 0.08
NOISE = 0.04
# Control points of the bending field per side; about one every 8 pixels.
FIELD = 9


def degrade(pixels: Tensor, draws: torch.Generator, strength: float = 1.0) -> Tensor:
    """Degrade pictures `[B, 3, H, W]` in [0, 1], each by its own random amount up to `strength` (1: still readable)."""
    count = len(pixels)
    pixels = bend(pixels, strength * BEND * torch.rand(count, generator=draws), draws)
    pixels = blur(pixels, strength * BLUR * torch.rand(count, generator=draws))
    tint = 1 + strength * TINT * torch.randn(count, 3, 1, 1, generator=draws)
    amount = strength * NOISE * torch.rand(count, 1, 1, 1, generator=draws)
    return (pixels * tint + amount * torch.randn(pixels.shape, generator=draws)).clamp(0, 1)


def bend(pixels: Tensor, amount: Tensor, draws: torch.Generator) -> Tensor:
    """Move the content of `[B, C, H, W]` along a smooth random field whose rms is `amount` `[B]` pixels."""
    count, _, height, width = pixels.shape
    coarse = torch.randn(count, 2, FIELD, FIELD, generator=draws)
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    rms = field.square().sum(1, keepdim=True).mean((2, 3), keepdim=True).sqrt()
    # The sampling grid runs over [-1, 1], so a pixel is 2 / size.
    pixel = 2 / torch.tensor([width, height]).view(1, 2, 1, 1)
    field = field / rms * amount.view(-1, 1, 1, 1) * pixel
    identity = torch.eye(2, 3).expand(count, 2, 3)
    grid = F.affine_grid(identity, list(pixels.shape), align_corners=False) + field.permute(0, 2, 3, 1)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of `[B, C, H, W]`, `sigma` `[B]` pixels wide (below 0.05: none; kernels end at 3 pixels)."""
    offsets = torch.arange(-3, 4).float()
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=0.05)[:, None]).square())
    count, channels, height, width = pixels.shape
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    stack = F.pad(pixels, (3, 3, 3, 3), mode="replicate").reshape(1, count * channels, height + 6, width + 6)
    stack = F.conv2d(stack, kernel[:, None, :, None], groups=count * channels)
    stack = F.conv2d(stack, kernel[:, None, None, :], groups=count * channels)
    return stack.reshape(pixels.shape)
