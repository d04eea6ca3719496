"""Tensor preprocessing against the PIL pipelines, by hand, and in its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image
from tiny_clip import assert_gradient
from torch import Tensor
from torchvision.transforms import functional as TF
from transformers import CLIPImageProcessor

from diffalign.errors import DiffalignError
from diffalign.rewards.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    ClipPreprocess,
    center_crop,
    check_batch,
    normalize,
    resize,
    resize_max_and_pad,
    resize_shortest,
)

MAX_DIFFERENCE = 1.2 / 255
MEAN_DIFFERENCE = 0.4 / 255
SIZES = [(320, 320), (64, 64), (300, 200), (231, 225), (229, 300), (224, 224)]


def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(7 * x / width + c) * np.cos(5 * y / height + c) for c in range(3)]
    return np.stack([127.5 + 127 * wave for wave in waves], -1).round().astype(np.uint8)


def _media(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255


def _assert_close(ours: Tensor, official: Tensor) -> None:
    """Within the stated tolerance, in units of [0, 1]."""
    assert ours.shape == official.shape
    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    difference = ((ours - official) * std).abs()
    assert difference.max() < MAX_DIFFERENCE
    assert difference.mean() < MEAN_DIFFERENCE


@pytest.mark.parametrize("make", [_noise, _smooth])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["shortest", "longest"])
def test_agrees_with_open_clip(make, size, mode) -> None:
    picture = make(*size)
    official = image_transform(224, is_train=False, resize_mode=mode)(Image.fromarray(picture))[None]
    _assert_close(ClipPreprocess(resize=mode)(_media(picture)), official)


@pytest.mark.parametrize(("make", "size"), [(_noise, (229, 300)), (_noise, (64, 64)), (_smooth, (300, 200))])
def test_agrees_with_the_squash_of_open_clip(make, size) -> None:
    picture = make(*size)
    official = image_transform(224, is_train=False, resize_mode="squash")(Image.fromarray(picture))[None]
    _assert_close(ClipPreprocess(resize="squash")(_media(picture)), official)


@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_transformers(size) -> None:
    """Its processor resizes bytes with PIL or, newer, with torchvision."""
    picture = _noise(*size)
    official = CLIPImageProcessor()(images=Image.fromarray(picture), return_tensors="pt").pixel_values
    _assert_close(ClipPreprocess(crop="floor")(_media(picture)), official)


def test_goes_through_the_width_first() -> None:
    """On noise the order shows, because each pass clips; versions of Pillow differ for pictures as tall as this one."""
    picture = _noise(100, 20)
    in_order = Image.fromarray(picture).resize((50, 100), Image.BICUBIC).resize((50, 60), Image.BICUBIC)
    ours = resize(_media(picture), (60, 50))
    assert (ours - TF.to_tensor(in_order)).abs().max() < MAX_DIFFERENCE
    other = Image.fromarray(picture).resize((20, 60), Image.BICUBIC).resize((50, 60), Image.BICUBIC)
    assert (ours - TF.to_tensor(other)).abs().max() > 5 / 255


def test_hps_pads_a_picture_as_its_validation_transform_does() -> None:
    """Longer side to 224, the odd pixel of the black border right and below."""
    picture = _smooth(301, 200)
    official = TF.pad(Image.fromarray(picture).resize((149, 224), Image.BICUBIC), [37, 0, 38, 0])
    ours = resize_max_and_pad(_media(picture), 224)
    assert ours.shape == (1, 3, 224, 224)
    assert (ours - TF.to_tensor(official)).abs().max() < MAX_DIFFERENCE
    assert ours[..., :37].abs().max() == 0
    assert ours[..., -38:].abs().max() == 0


def test_shorter_side_and_rounding_of_the_longer() -> None:
    assert resize_shortest(torch.rand(1, 3, 300, 200), 224).shape == (1, 3, 336, 224)
    assert resize_shortest(torch.rand(1, 3, 225, 231), 224).shape == (1, 3, 224, 229)  # 229.97 rounded down


@pytest.mark.parametrize(
    ("length", "rule", "first"),
    [
        (5, "half-even", 2),
        (5, "floor", 1),
        (3, "half-even", 0),
        (3, "floor", 0),
        (4, "floor", 1),
        (4, "half-even", 1),
    ],
)
def test_crop_puts_odd_remainders_where_each_library_does(length: int, rule, first: int) -> None:
    row = torch.arange(float(length)).expand(1, 1, 2, length)
    assert center_crop(row, (2, 2), rule)[0, 0, 0].tolist() == [first, first + 1]


def test_crop_refuses_smaller_pictures() -> None:
    with pytest.raises(DiffalignError, match="cannot crop 8x8 pixels from pictures of 6x9"):
        center_crop(torch.zeros(1, 3, 9, 6), (8, 8))


def test_same_size_is_left_alone_and_flat_stays_flat() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert resize(images, (8, 8)) is images
    assert torch.allclose(resize(torch.full((1, 3, 9, 7), 0.3), (20, 5)), torch.tensor(0.3), atol=1e-6)


def test_normalise_by_hand() -> None:
    images = torch.tensor([0.5, 0.25, 1.0]).view(1, 3, 1, 1)
    result = normalize(images, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.1))
    assert result.flatten().tolist() == pytest.approx([0.0, -1.0, 5.0])
    white = normalize(torch.ones(1, 3, 1, 1)).flatten().tolist()
    assert white == pytest.approx([(1 - m) / s for m, s in zip(CLIP_MEAN, CLIP_STD, strict=True)])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["shortest", "longest", "squash"]))
def test_any_size_becomes_the_input_of_the_network(height: int, width: int, mode) -> None:
    images = torch.rand(1, 3, height, width, dtype=torch.float16)
    if mode == "shortest" and max(height, width) > 20 * min(height, width):
        height, width = 20, 20
        images = torch.rand(1, 3, height, width, dtype=torch.float16)
    pixels = ClipPreprocess(size=16, resize=mode)(images)
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert torch.isfinite(pixels).all()


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(20, 26), (9, 7)])
def test_gradients_agree_with_finite_differences(mode, size) -> None:
    images = torch.rand(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    preprocess = ClipPreprocess(size=12, resize=mode)
    assert_gradient(lambda x: (weights * preprocess(x)).sum((1, 2, 3)), images)


def test_clipped_overshoot_has_no_gradient() -> None:
    """Beside a hard edge bicubic leaves [0, 1]; PIL clips it there, and so the pixel does not pull on its sources."""
    edge = torch.cat([torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)], dim=-1).requires_grad_()
    larger = resize(edge, (4, 16))
    unclipped = torch.nn.functional.interpolate(edge, size=(4, 16), mode="bicubic", antialias=True)
    beyond = int(unclipped[0, 0, 0].argmax())
    assert unclipped[0, 0, 0, beyond] > 1.01
    assert larger[0, 0, 0, beyond] == 1
    (gradient,) = torch.autograd.grad(larger[0, 0, 0, beyond], edge)
    assert gradient.abs().max() == 0


def test_bad_batches_are_refused() -> None:
    good = torch.rand(2, 3, 4, 4)
    check_batch("clip", good, ["a", "b"])
    with pytest.raises(DiffalignError, match="clip got an empty batch"):
        check_batch("clip", good[:0], [])
    with pytest.raises(DiffalignError, match=r"clip got media of shape \(3, 4, 4\); expected \[B, 3, H, W\]"):
        check_batch("clip", good[0], ["a"])
    with pytest.raises(DiffalignError, match=r"got media of shape \(2, 4, 4, 3\)"):
        check_batch("clip", good.permute(0, 2, 3, 1), ["a", "b"])
    with pytest.raises(DiffalignError, match="2 pictures and 1 prompts"):
        check_batch("clip", good, ["a"])
    with pytest.raises(DiffalignError, match=r"torch.uint8 pixels; expected floats in \[0, 1\]"):
        check_batch("clip", good.byte(), ["a", "b"])
