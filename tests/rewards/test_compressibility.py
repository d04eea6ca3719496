"""JPEG size as a reward."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.rewards import Reward, load_reward
from diffalign.rewards.compressibility import JpegCompressibility, JpegIncompressibility, jpeg_kilobytes


def _pictures() -> torch.Tensor:
    """A flat one and a noisy one, with values that are exact bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    flat = np.full_like(noise, 128)
    return torch.from_numpy(np.stack([flat, noise])).permute(0, 3, 1, 2).float() / 255


def test_sizes_are_those_of_the_files_pil_writes() -> None:
    expected = []
    for picture in (_pictures() * 255).round().byte().permute(0, 2, 3, 1).numpy():
        buffer = BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=95)
        expected.append(len(buffer.getvalue()) / 1000)
    assert jpeg_kilobytes(_pictures()).tolist() == pytest.approx(expected)
    assert expected[1] > 5 * expected[0]


def test_rewards_are_opposite_and_scaled() -> None:
    size = jpeg_kilobytes(_pictures())
    prompts = ["a", "b"]
    assert torch.equal(JpegIncompressibility().score(_pictures(), prompts).mean, size)
    assert torch.equal(JpegCompressibility().score(_pictures(), prompts).mean, -size)
    flow_grpo = load_reward({"reward": "jpeg-compressibility", "divide_by": 500})
    assert torch.allclose(flow_grpo.score(_pictures(), prompts).mean, -size / 500)


def test_lower_quality_is_smaller() -> None:
    noise = _pictures()[1:]
    assert JpegIncompressibility(quality=30).score(noise, ["a"]).mean < jpeg_kilobytes(noise) / 2


def test_values_are_rounded_and_clipped_to_bytes() -> None:
    flat = torch.full((1, 3, 16, 16), 1.0)
    assert torch.equal(jpeg_kilobytes(flat * 1.4), jpeg_kilobytes(flat))
    assert torch.equal(jpeg_kilobytes(_pictures() + 0.4 / 255), jpeg_kilobytes(_pictures()))
    assert torch.equal(jpeg_kilobytes(_pictures().half()), jpeg_kilobytes(_pictures()))


@pytest.mark.parametrize("name", ["jpeg-compressibility", "jpeg-incompressibility"])
def test_catalogue(name: str) -> None:
    reward = load_reward(name)
    assert isinstance(reward, Reward)
    assert (reward.name, reward.differentiable) == (name, False)
    with pytest.raises(DiffalignError, match=f"{name} got an empty batch"):
        reward.score(_pictures()[:0], [])
    with pytest.raises(DiffalignError, match="quality 100; expected 1 to 95"):
        load_reward({"reward": name, "quality": 100})
    with pytest.raises(DiffalignError, match="divide_by 0; expected a positive number"):
        load_reward({"reward": name, "divide_by": 0})
