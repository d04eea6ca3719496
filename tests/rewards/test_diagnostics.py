"""Sharpness, saturation, brightness and colourfulness by hand, by property, and in their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_clip import assert_gradient

from diffalign.errors import DiffalignError
from diffalign.rewards import Reward, load_reward
from diffalign.rewards.diagnostics import (
    brightness,
    colourfulness,
    laplacian_variance,
    log_sharpness,
    luma,
    saturation,
)

NAMES = {
    "sharpness": log_sharpness,
    "saturation": saturation,
    "brightness": brightness,
    "colourfulness": colourfulness,
}


def _flat(red: float, green: float, blue: float) -> torch.Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 4, 4).clone()


def test_luma_by_hand() -> None:
    assert luma(_flat(1, 0, 0)).flatten()[0].item() == pytest.approx(0.299)
    assert luma(_flat(0.5, 0.5, 0.5)).flatten()[0].item() == pytest.approx(0.5)
    assert brightness(_flat(0, 1, 0)).item() == pytest.approx(0.587)


def test_sharpness_of_one_bright_pixel_by_hand() -> None:
    """A white pixel in the middle of 5x5 black: Laplacian -1020 there, 255 at its four neighbours, 0 elsewhere.

    Mean 0, mean square (1020^2 + 4 * 255^2) / 25 = 52020.
    """
    picture = torch.zeros(1, 3, 5, 5)
    picture[..., 2, 2] = 1
    assert laplacian_variance(picture).item() == pytest.approx(52020, rel=1e-5)
    assert log_sharpness(picture).item() == pytest.approx(math.log(52021), rel=1e-6)


def test_sharpness_mirrors_the_border_without_repeating_it() -> None:
    """Columns 0 and 1 alternate: with OpenCV's border every Laplacian is plus or minus 510, and the variance 510^2."""
    picture = (torch.arange(4) % 2).float().expand(1, 3, 4, 4)
    assert laplacian_variance(picture).item() == pytest.approx(510.0**2, rel=1e-5)


def test_blurring_lowers_sharpness() -> None:
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(picture, 3, 1, 1, count_include_pad=False)
    assert log_sharpness(blurred) < log_sharpness(picture)
    assert log_sharpness(_flat(0.2, 0.5, 0.9)).item() == pytest.approx(0, abs=1e-4)


def test_saturation_by_hand() -> None:
    assert saturation(_flat(1, 0, 0)).item() == 1
    assert saturation(_flat(0.8, 0.6, 0.4)).item() == pytest.approx(0.5)
    assert saturation(_flat(0.7, 0.7, 0.7)).item() == 0
    assert saturation(_flat(0, 0, 0)).item() == 0


def test_colourfulness_by_hand() -> None:
    """Flat red: rg = 255, yb = 127.5, no spread: 0.3 * 255 * sqrt(1.25). Half red, half blue: rg is 255 and 0, yb is
    127.5 and -255, so standard deviations 127.5 and 191.25, means 127.5 and -63.75."""
    assert colourfulness(_flat(1, 0, 0)).item() == pytest.approx(0.3 * 255 * math.sqrt(1.25), rel=1e-5)
    halves = torch.cat([_flat(1, 0, 0), _flat(0, 0, 1)], dim=-1)
    expected = math.hypot(127.5, 191.25) + 0.3 * math.hypot(127.5, 63.75)
    assert colourfulness(halves).item() == pytest.approx(expected, rel=1e-5)
    assert colourfulness(_flat(0.4, 0.4, 0.4)).item() == pytest.approx(0, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 12), st.integers(3, 12))
def test_ranges_and_mirror_images(seed: int, height: int, width: int) -> None:
    picture = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    for measure in NAMES.values():
        values = measure(picture)
        assert values.shape == (2,)
        assert (values >= 0).all()
        assert torch.allclose(measure(picture.flip(-1)), values, rtol=1e-3, atol=1e-3)
        assert torch.allclose(measure(picture[1:]), values[1:], rtol=1e-4)
    assert (saturation(picture) <= 1).all()
    assert (brightness(picture) <= 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    picture = torch.rand(2, 3, 10, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_gradient(NAMES[name], picture)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_gradients_of_flat_pictures_are_finite(name: str, value: float) -> None:
    picture = torch.full((1, 3, 4, 4), value, requires_grad=True)
    NAMES[name](picture).sum().backward()
    assert torch.isfinite(picture.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_catalogue(name: str) -> None:
    reward = load_reward(name)
    assert isinstance(reward, Reward)
    assert (reward.name, reward.differentiable, reward.kind) == (name, True, "sample")
    picture = torch.rand(2, 3, 8, 8)
    output = reward.score(picture, ["a", "b"])
    assert torch.allclose(output.mean, NAMES[name](picture))
    assert reward.score(picture.half(), ["a", "b"]).mean.dtype == torch.float32
    with pytest.raises(DiffalignError, match=f"{name} got an empty batch"):
        reward.score(picture[:0], [])
