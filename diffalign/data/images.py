"""From encoded image files to tensors: safe decoding, then one crop, alike for both images of a pair."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffalign.data.records import ImageSource, read_image
from diffalign.errors import DiffalignError

# The formats that generators and preference sets use; Pillow's rarer decoders stay out of reach of untrusted
# files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 100_000_000

_pillow_limit = threading.Lock()


class BrokenImage(DiffalignError):
    """One image cannot be used; the message is the reason."""


class MissingImage(BrokenImage):
    """The image's file is not there, or the record holds no bytes for it."""


@dataclass(frozen=True)
class Picture:
    """A square crop of an image, with the sizes that SDXL is told (heights first, pixels).

    Fields:
        pixels: `[3, R, R]` float32 in [-1, 1].
        original: height and width of the upright image as it was stored.
        resized: height and width after the resize, before the crop.
        crop: top and left of the crop in the resized image.
    """

    pixels: Tensor
    original: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]

    @property
    def target(self) -> tuple[int, int]:
        """Height and width of the crop."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def flipped(self) -> Picture:
        """The mirrored picture; the crop's left is counted from the mirrored image's left edge."""
        top, left = self.crop
        mirrored = self.resized[1] - self.target[1] - left
        return replace(self, pixels=self.pixels.flip(-1), crop=(top, mirrored))


def load_picture(
    image: ImageSource,
    resolution: int,
    position: tuple[float, float] = (0.5, 0.5),
    max_pixels: int = MAX_PIXELS,
) -> Picture:
    """Read, decode, resize and crop one image.

    Args:
        image: encoded bytes or a path.
        resolution: side R of the square, in pixels.
        position: where the crop lies between the top (left) end, 0, and the bottom (right) end, 1. The two
            images of a pair are given the same position, so equal sizes get equal crops.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        BrokenImage: the file is missing, damaged, too large, or not an image.
    """
    return crop_resized(decode(image, max_pixels), resolution, position)


def decode(image: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to upright 8-bit RGB; transparency is laid over white, of an animation the first frame is used.

    Raises:
        BrokenImage: the file is missing, damaged, too large, or not an image.
    """
    try:
        data = read_image(image)
    except OSError as error:
        raise MissingImage(f"cannot be read: {error.strerror or error}") from error
    if not data:
        raise MissingImage("is empty: no bytes")
    try:
        with _open(data, max_pixels) as opened:
            return _rgb(ImageOps.exif_transpose(opened))
    except BrokenImage:
        raise
    except Exception as error:  # damaged files make decoders raise nearly any type
        raise BrokenImage(f"cannot be decoded: {type(error).__name__}: {error}") from error


def crop_resized(image: Image.Image, resolution: int, position: tuple[float, float]) -> Picture:
    """Resize so that the shorter side is `resolution`; keep the square at `position` (see `load_picture`).

    Only what is kept is resampled (Lanczos, antialiased), so an extreme aspect ratio costs no memory.
    """
    width, height = image.size
    resized = resized_size(height, width, resolution)
    top, left = (_offset(p, side - resolution) for p, side in zip(position, resized, strict=True))
    per_row, per_column = height / resized[0], width / resized[1]
    right, bottom = (left + resolution) * per_column, (top + resolution) * per_row
    box = (left * per_column, top * per_row, min(right, width), min(bottom, height))
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1)
    return Picture((pixels / 127.5 - 1.0).contiguous(), (height, width), resized, (top, left))


def _offset(position: float, gap: int) -> int:
    """One of the `gap + 1` places of a crop, all equally likely when `position` is uniform in [0, 1)."""
    return min(int(position * (gap + 1)), gap)


def resized_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Height and width after a resize that keeps the aspect ratio and makes the shorter side `resolution`."""
    shorter = min(height, width)
    return (
        max(resolution, round(height * resolution / shorter)),
        max(resolution, round(width * resolution / shorter)),
    )


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only, and refuse what it declares if that is too large."""
    with _pillow_guard(max_pixels):
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BrokenImage(f"is larger than data.max_pixels = {max_pixels}: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise BrokenImage(f"declares {width}x{height} pixels, more than data.max_pixels = {max_pixels}")
    return image


@contextmanager
def _pillow_guard(max_pixels: int) -> Iterator[None]:
    """Pillow's own limit and its warning, which are process-wide, set for the time of one header."""
    with _pillow_limit, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise BrokenImage(f"has pixel mode {image.mode}; expected 8 bits per channel")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
