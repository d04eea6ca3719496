"""Picture preprocessing as differentiable tensor operations that agree with the PIL pipelines of CLIP-type scorers.

PIL resizes 8-bit pictures one axis at a time, width first, and after each axis it rounds and clips to [0, 255].
`resize` therefore also goes axis by axis and clips after each, which keeps bicubic overshoot from travelling into the
second axis: at most 1.2 grey levels from PIL (0.0047 of the range; mean 0.0012) on random noise and on smooth
pictures, up- and downscaled, where one joint resize with a clip at the end is up to 21 levels off on noise. The rest
of the difference is PIL's rounding, which has no gradient and is left out. Pillow 13 takes the height first when it
loses more than twice the pixels that the width loses (proportionally scaled pictures more than twice as tall as
wide); there noise differs by up to 22 levels between Pillow's own versions, and this is the older order.

Clipping has gradient zero where it acts: an overshooting pixel, next to a hard edge between black and white, does
not pull on its sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.precision import at_least_float32

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Interpolation = Literal["bicubic", "bilinear"]
CropRule = Literal["half-even", "floor"]


def check_batch(name: str, media: Tensor, prompts: Sequence[str]) -> None:
    """Refuse a batch that no picture scorer can judge.

    Args:
        name: of the scorer, for the message.

    Raises:
        DiffalignError: `media` is not a non-empty float `[B, 3, H, W]`, or there are not `B` prompts.
    """
    if media.ndim != 4 or media.shape[1] != 3:
        raise DiffalignError(f"{name} got media of shape {tuple(media.shape)}; expected [B, 3, H, W]")
    if len(media) == 0:
        raise DiffalignError(f"{name} got an empty batch; it needs at least one picture to score")
    if not media.is_floating_point():
        raise DiffalignError(
            f"{name} got {media.dtype} pixels; expected floats in [0, 1] (divide bytes by 255)"
        )
    if len(prompts) != len(media):
        raise DiffalignError(
            f"{name} got {len(media)} pictures and {len(prompts)} prompts; expected one prompt per picture"
        )


def resize(images: Tensor, size: tuple[int, int], interpolation: Interpolation = "bicubic") -> Tensor:
    """Antialiased resize of `[B, C, H, W]` in [0, 1] to `size` (height, width), one axis at a time as PIL does it.

    Returns `[B, C, *size]` in [0, 1], at least float32; the pictures themselves when they have that size.
    """
    images = at_least_float32(images)
    for target in ((images.shape[-2], size[1]), size):
        if images.shape[-2:] != target:
            images = F.interpolate(images, size=target, mode=interpolation, antialias=True).clamp(0, 1)
    return images


def resize_shortest(images: Tensor, size: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """Resize so that the shorter side has `size` pixels; the longer is rounded down, as torchvision does."""
    height, width = images.shape[-2:]
    longer = int(size * max(height, width) / min(height, width))
    return resize(images, (size, longer) if height <= width else (longer, size), interpolation)


def center_crop(images: Tensor, size: tuple[int, int], rule: CropRule = "half-even") -> Tensor:
    """The central `size` (height, width) of `[B, C, H, W]`.

    Args:
        rule: where an odd remainder goes. `half-even` (torchvision, open_clip) rounds half a pixel to the even
            offset; `floor` (transformers) rounds it down. They differ by one pixel for every other odd remainder.

    Raises:
        DiffalignError: the pictures are smaller than the crop.
    """
    height, width = images.shape[-2:]
    if height < size[0] or width < size[1]:
        raise DiffalignError(f"cannot crop {size[1]}x{size[0]} pixels from pictures of {width}x{height}")
    top, left = (
        round(rest / 2) if rule == "half-even" else rest // 2 for rest in (height - size[0], width - size[1])
    )
    return images[..., top : top + size[0], left : left + size[1]]


def resize_max_and_pad(
    images: Tensor, size: int, fill: float = 0.0, interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Resize so that the longer side has `size` pixels and pad to a square with `fill`, as HPSv2 validates.

    The odd pixel of padding goes right and below.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    images = resize(images, (new_height, new_width), interpolation)
    rows, columns = size - new_height, size - new_width
    padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return F.pad(images, padding, value=fill)


def normalize(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """`(images - mean) / std` per channel of `[B, C, H, W]`."""
    return (images - _channels(mean, images)) / _channels(std, images)


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


@dataclass(frozen=True)
class ClipPreprocess:
    """Pictures `[B, 3, H, W]` in [0, 1] to the network's input `[B, 3, size, size]`, with gradients.

    Fields:
        size: side of the network's input. mean, std: per channel, subtracted and divided by.
        resize: `shortest` side to `shorter`, then the central crop; `longest` side, then black padding;
            `squash` to a square whatever the proportions.
        shorter: length that `shortest` resizes to; `size` when None.
        crop: see `center_crop`.
    """

    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    shorter: int | None = None
    interpolation: Interpolation = "bicubic"
    crop: CropRule = "half-even"

    def __call__(self, images: Tensor) -> Tensor:
        """Resize, crop or pad, and normalise."""
        if self.resize == "longest":
            images = resize_max_and_pad(images, self.size, interpolation=self.interpolation)
        elif self.resize == "squash":
            images = resize(images, (self.size, self.size), self.interpolation)
        else:
            images = resize_shortest(images, self.shorter or self.size, self.interpolation)
            images = center_crop(images, (self.size, self.size), self.crop)
        return normalize(images, self.mean, self.std)
