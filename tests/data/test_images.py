from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_fakes import encoded, encoded_array, ramp
from PIL import Image

from diffalign.data.images import BrokenImage, MissingImage, decode, load_picture, resized_size


def zip_bomb(width: int, height: int) -> bytes:
    """A valid PNG header that declares `width` x `height`, in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def test_pixels_are_scaled_to_minus_one_to_one() -> None:
    picture = load_picture(encoded((255, 0, 51)), 16)
    assert picture.pixels.shape == (3, 16, 16)
    assert picture.pixels.dtype == torch.float32
    torch.testing.assert_close(picture.pixels[:, 3, 5], torch.tensor([1.0, -1.0, -0.6]))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(100, 50, (32, 16)), (50, 100, (16, 32)), (64, 64, (16, 16)), (8, 9, (16, 18))],
)
def test_shorter_side_becomes_the_resolution(height: int, width: int, expected: tuple[int, int]) -> None:
    assert resized_size(height, width, 16) == expected


def test_center_crop_keeps_the_middle_and_tells_sizes_height_first() -> None:
    picture = load_picture(encoded_array(ramp(width=24, height=16)), 16)
    assert (picture.original, picture.resized) == ((16, 24), (16, 24))
    assert (picture.crop, picture.target) == ((0, 4), (16, 16))
    columns = ((picture.pixels[0, 0] + 1) * 127.5).round().int().tolist()
    assert columns == list(range(4, 20))
    rows = ((picture.pixels[1, :, 0] + 1) * 127.5).round().int().tolist()
    assert rows == list(range(16))


@pytest.mark.parametrize(("position", "left"), [(0.0, 0), (0.49, 4), (0.99, 8)])
def test_crop_position_covers_all_places(position: float, left: int) -> None:
    assert load_picture(encoded_array(ramp(24, 16)), 16, (0.5, position)).crop == (0, left)


def test_resize_then_crop_equals_crop_of_resized() -> None:
    array = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    picture = load_picture(encoded_array(array), 20, (0.5, 0.5))
    resized = np.asarray(Image.fromarray(array).resize((32, 20), Image.Resampling.LANCZOS), np.float32)
    inner = torch.from_numpy(resized[:, 6:26].copy()).permute(2, 0, 1) / 127.5 - 1
    # At the border of the crop the filter sees no pixels outside it.
    torch.testing.assert_close(picture.pixels[:, :, 3:-3], inner[:, :, 3:-3], atol=1e-6, rtol=0)


def test_flip_mirrors_pixels_and_counts_the_crop_from_the_other_side() -> None:
    picture = load_picture(encoded_array(ramp(24, 16)), 16, (0.5, 0.3))
    flipped = picture.flipped()
    assert picture.crop == (0, 2)
    assert flipped.crop == (0, 24 - 16 - 2)
    assert torch.equal(flipped.pixels, picture.pixels.flip(-1))
    assert flipped.original == picture.original


@given(st.integers(1, 200), st.integers(1, 200), st.floats(0, 1), st.floats(0, 1))
def test_crop_lies_inside_for_any_size(width: int, height: int, top: float, left: float) -> None:
    picture = load_picture(encoded((9, 9, 9), (width, height)), 8, (top, left))
    assert picture.target == (8, 8)
    for offset, side in zip(picture.crop, picture.resized, strict=True):
        assert 0 <= offset <= side - 8
    assert picture.flipped().flipped().crop == picture.crop


def test_extreme_aspect_ratio_needs_no_huge_intermediate() -> None:
    picture = load_picture(encoded((9, 9, 9), (20000, 1)), 512)
    assert picture.resized == (512, 20000 * 512)
    assert picture.pixels.shape == (3, 512, 512)


def test_exif_orientation_is_respected() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to be upright
    image = decode(encoded((1, 2, 3), (30, 20), "JPEG", exif=exif))
    assert image.size == (20, 30)


def test_transparency_is_laid_over_white() -> None:
    array = np.zeros((8, 8, 4), np.uint8)
    array[:, :4] = (255, 0, 0, 255)
    image = decode(encoded_array(array))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert image.getpixel((7, 7)) == (255, 255, 255)


def test_grey_and_palette_become_rgb() -> None:
    grey = decode(encoded_array(np.full((4, 4), 77, np.uint8)))
    assert grey.getpixel((1, 1)) == (77, 77, 77)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4).save(buffer, "GIF")
    assert decode(buffer.getvalue()).mode == "RGB"


def test_truncated_jpeg_is_broken() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded_array(noise, "JPEG")
    with pytest.raises(BrokenImage, match="cannot be decoded"):
        load_picture(data[: len(data) // 2], 16)


@pytest.mark.parametrize("data", [b"not an image", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"])
def test_garbage_is_broken(data: bytes) -> None:
    with pytest.raises(BrokenImage):
        load_picture(data, 16)


def test_zip_bomb_is_refused_before_decoding() -> None:
    bomb = zip_bomb(50_000, 50_000)
    assert len(bomb) < 200
    with pytest.raises(BrokenImage, match="max_pixels"):
        load_picture(bomb, 16)


def test_limit_holds_just_above_and_passes_just_below() -> None:
    with pytest.raises(BrokenImage, match="max_pixels = 255"):
        load_picture(encoded((1, 1, 1)), 16, max_pixels=255)
    assert load_picture(encoded((1, 1, 1)), 16, max_pixels=256).target == (16, 16)


def test_pillows_own_limit_is_restored() -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BrokenImage):
        load_picture(zip_bomb(3000, 3000), 16, max_pixels=100)
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_large_limit_is_not_undercut_by_pillows_own() -> None:
    with pytest.raises(
        BrokenImage, match="cannot be decoded"
    ):  # the data is too short, but the size is allowed
        load_picture(zip_bomb(9_500, 9_500), 16, max_pixels=9_500**2)


def test_missing_file_is_told_apart_from_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(MissingImage, match="No such file"):
        load_picture(tmp_path / "none.png", 16)
    with pytest.raises(MissingImage, match="no bytes"):
        load_picture(b"", 16)


def test_sixteen_bit_grey_is_refused_rather_than_clipped() -> None:
    with pytest.raises(BrokenImage, match="8 bits"):
        load_picture(encoded_array(np.full((8, 8), 40_000, np.uint16)), 8)
