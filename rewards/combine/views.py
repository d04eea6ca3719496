"""Slightly changed views of pictures: crop, flip, colour jitter, noise. All differentiable in the pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class View:
    """One change, the same for every picture of a batch, so that a score does not depend on its neighbours.

    Fields:
        top, left: of the crop, as shares of the free margin. keep: share of each side that the crop keeps.
        brightness, contrast, saturation: factors. flip: left to right. noise: std. seed: of the noise.
    """

    top: float = 0.0
    left: float = 0.0
    keep: float = 1.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    flip: bool = False
    noise: float = 0.0
    seed: int = 0


def draw_views(
    n: int, generator: torch.Generator, crop: float, jitter: float, noise: float, flip: bool
) -> list[View]:
    """n random views: crops that lose up to `crop` of each side, factors within 1 +- `jitter`, noise of std `noise`."""
    views = []
    for _ in range(n):
        u = torch.rand(7, generator=generator, dtype=torch.float64).tolist()
        brightness, contrast, saturation = (1 + jitter * (2 * x - 1) for x in u[3:6])
        seed = int(torch.randint(2**31, (1,), generator=generator))
        mirrored = flip and u[6] < 0.5
        views.append(
            View(u[0], u[1], 1 - crop * u[2], brightness, contrast, saturation, mirrored, noise, seed)
        )
    return views


def apply_view(images: Tensor, view: View) -> Tensor:
    """Pictures `[B, 3, H, W]` in [0, 1] as the view shows them; same shape and range."""
    out = crop_and_resize(images, view.top, view.left, view.keep)
    out = colour_jitter(out, view.brightness, view.contrast, view.saturation)
    if view.noise > 0:
        generator = torch.Generator("cpu").manual_seed(view.seed)
        out = out + view.noise * torch.randn(out.shape[1:], generator=generator).to(out)
    return (out.flip(-1) if view.flip else out).clamp(0, 1)


def crop_and_resize(images: Tensor, top: float, left: float, keep: float) -> Tensor:
    """A crop of `keep` of each side, back at the original size (bilinear); top and left in [0, 1] place it."""
    h, w = images.shape[-2:]
    ch, cw = max(1, round(keep * h)), max(1, round(keep * w))
    if (ch, cw) == (h, w):
        return images
    y, x = round(top * (h - ch)), round(left * (w - cw))
    crop = images[..., y : y + ch, x : x + cw]
    return F.interpolate(crop, size=(h, w), mode="bilinear", align_corners=False)


def colour_jitter(images: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Factors of brightness, of contrast about the picture's mean grey, of saturation about each pixel's grey.

    Grey is the luma of ITU-R 601.
    """
    out = images * brightness
    mean = _grey(out).mean((-2, -1), keepdim=True)
    out = mean + contrast * (out - mean)
    grey = _grey(out)
    return grey + saturation * (out - grey)


def _grey(images: Tensor) -> Tensor:
    weights = images.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return (images * weights).sum(-3, keepdim=True)
