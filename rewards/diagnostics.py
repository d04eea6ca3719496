"""What over-optimised rewards tend to distort, measured without any model: sharpness, saturation, brightness, colour.

Watch them beside a reward: a learned scorer whose mean rises together with saturation or sharpness is probably being
exploited. All are differentiable, so they can also be optimised or used as constraints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.precision import at_least_float32
from diffalign.rewards.base import Facts, RewardOutput
from diffalign.rewards.preprocess import check_batch

LUMA = (0.299, 0.587, 0.114)
LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


def luma(images: Tensor) -> Tensor:
    """Grey values `[B, 1, H, W]` of `[B, 3, H, W]` (ITU-R BT.601 weights, as PIL's and OpenCV's grey)."""
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def laplacian_variance(images: Tensor) -> Tensor:
    """Variance `[B]` of the Laplacian of the grey picture in 0 to 255, borders mirrored (OpenCV's convention).

    Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000.
    """
    kernel = torch.tensor(LAPLACIAN, dtype=images.dtype, device=images.device).view(1, 1, 3, 3)
    edges = F.conv2d(F.pad(255 * luma(images), (1, 1, 1, 1), mode="reflect"), kernel)
    return edges.flatten(1).var(1, correction=0)


def log_sharpness(images: Tensor) -> Tensor:
    """`log(1 + laplacian_variance)` `[B]`: 0 for a flat picture."""
    return laplacian_variance(images).log1p()


def saturation(images: Tensor) -> Tensor:
    """Mean HSV saturation `[B]` in [0, 1]: `(max - min) / max` over the channels, 0 for black pixels."""
    brightest = images.amax(1)
    spread = brightest - images.amin(1)
    return torch.where(brightest > 0, spread / brightest.clamp_min(1e-6), 0).flatten(1).mean(1)


def brightness(images: Tensor) -> Tensor:
    """Mean grey value `[B]` in [0, 1]."""
    return luma(images).flatten(1).mean(1)


def colourfulness(images: Tensor) -> Tensor:
    """Colourfulness `[B]`: 0 for grey pictures, about 30 for average ones, above 80 for extremely colourful ones.

    Hasler and Suesstrunk, Measuring colourfulness in natural images, SPIE 2003: with `rg = R - G` and
    `yb = (R + G) / 2 - B` in 0 to 255, the length of their standard deviations plus 0.3 times that of their means.
    """
    red, green, blue = (255 * images).flatten(2).unbind(1)
    opponent = torch.stack([red - green, (red + green) / 2 - blue], dim=1)
    spread = opponent.var(-1, correction=0).sum(1)
    mean = opponent.mean(-1).square().sum(1)
    return _root(spread) + 0.3 * _root(mean)


def _root(x: Tensor) -> Tensor:
    """Square root with gradient 0 instead of infinity at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


@dataclass
class Diagnostic:
    """A statistic of the pixels as a reward; prompts play no part.

    Fields:
        name: in the catalogue. measure: pictures `[B, 3, H, W]` in [0, 1] to `[B]`, differentiable. facts: scale.
    """

    name: str
    measure: Callable[[Tensor], Tensor]
    facts: Facts
    modality: Literal["image", "audio"] = "image"
    differentiable: bool = True
    kind: Literal["sample", "set"] = "sample"

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Measure pictures `[B, 3, H, W]` in [0, 1].

        Raises:
            DiffalignError: an empty batch, or other than one prompt per picture.
        """
        check_batch(self.name, media, prompts)
        return RewardOutput(self.measure(at_least_float32(media)).float())


SHARPNESS = Diagnostic(
    "sharpness", log_sharpness, Facts(scale="log(1 + variance of the Laplacian): 0 flat, 4 to 8 usual")
)
SATURATION = Diagnostic("saturation", saturation, Facts(scale="mean HSV saturation, 0 to 1"))
BRIGHTNESS = Diagnostic("brightness", brightness, Facts(scale="mean grey value, 0 to 1"))
COLOURFULNESS = Diagnostic(
    "colourfulness",
    colourfulness,
    Facts(scale="0 grey, about 30 average, above 80 extreme", source="Hasler and Suesstrunk, SPIE 2003"),
)
