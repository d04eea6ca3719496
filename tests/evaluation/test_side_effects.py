"""Sharpness, saturation and diversity of known pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import flat, prompts
from torch import Tensor

from diffalign.evaluation.prompts import EvalPrompt
from diffalign.evaluation.side_effects import distances, mean_pairwise, pseudo_values, side_effects
from diffalign.rewards.encoders import load_encoder
from diffalign.rewards.sets.diversity import pairwise_distance


class Channels:
    """Mean of each colour channel."""

    name = "channels"

    def embed(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def colours(rows: list[list[float]]) -> Tensor:
    """Pictures `[N, 3, 8, 8]` of one colour each."""
    return torch.tensor(rows)[:, :, None, None].expand(-1, 3, 8, 8)


def test_distances_by_hand() -> None:
    # Directions x, y, -x and x again: 1 - cos is 1, 2 and 0.
    found = distances(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [5.0, 0.0]]))
    expected = [[0, 1, 2, 0], [1, 0, 1, 1], [2, 1, 0, 2], [0, 1, 2, 0]]
    assert found.tolist() == expected
    # Sum of the upper half is 7 over 6 pairs.
    assert mean_pairwise(found) == pytest.approx(7 / 6)


def test_distance_is_that_of_the_diversity_reward() -> None:
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert mean_pairwise(distances(features)) == pytest.approx(float(pairwise_distance(features)))


def test_pseudo_values_are_the_jackknife() -> None:
    features = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    distance = distances(features)
    whole = mean_pairwise(distance)
    without = [mean_pairwise(distances(features[[j for j in range(6) if j != i]])) for i in range(6)]
    assert pseudo_values(distance) == pytest.approx([6 * whole - 5 * w for w in without])
    assert pseudo_values(distance).mean() == pytest.approx(whole)


def test_pseudo_values_give_the_spread_of_the_mean_distance() -> None:
    """The standard error from one sample is that found by drawing samples again and again."""
    rng = torch.Generator().manual_seed(2)
    draws = [distances(torch.randn(40, 2, generator=rng) + 1) for _ in range(200)]
    true = np.std([mean_pairwise(d) for d in draws])
    estimated = np.mean([pseudo_values(d).std(ddof=1) / np.sqrt(40) for d in draws])
    assert estimated == pytest.approx(true, rel=0.2)


def test_grey_and_coloured_pictures_differ_in_saturation_only() -> None:
    base = flat([0.5] * 6)
    tuned = colours([[0.5, 0.25, 0.25]] * 6)
    found = side_effects(base, tuned, prompts(6), Channels())
    assert (found["saturation"].base, found["saturation"].tuned) == (0.0, 0.5)
    assert found["saturation"].change == "higher"
    assert found["sharpness"].change == "no difference"
    assert found["sharpness"].difference == 0.0
    assert found["diversity over prompts"].difference == pytest.approx(0.0, abs=1e-12)


def test_collapse_shows_in_diversity() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.rand(16, 3, 1, 1, generator=generator).expand(-1, 3, 8, 8)
    rows = [EvalPrompt(f"p{i // 2}", seed=i) for i in range(16)]
    found = side_effects(base, base[:1].expand(16, 3, 8, 8), rows, Channels())
    for name, n in (("diversity over seeds", 8), ("diversity over prompts", 8)):
        assert found[name].change == "lower"
        assert found[name].tuned == pytest.approx(0.0, abs=1e-12)
        assert (found[name].n, found[name].unit) == (n, "prompts")


def test_one_seed_per_prompt_has_no_diversity_over_seeds() -> None:
    found = side_effects(flat([0.1, 0.5]), flat([0.2, 0.5]), prompts(2), Channels())
    assert list(found) == ["sharpness", "saturation"]


def test_black_pictures_and_the_pixel_encoder_are_no_error() -> None:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    found = side_effects(flat([0.0] * 4, 16), images, prompts(4), load_encoder("pixels:4"))
    assert np.isfinite(found["diversity over prompts"].difference)
    assert found["sharpness"].change == "higher"
    assert set(found["sharpness"].as_json()) >= {"base", "tuned", "interval", "verdict", "meaning"}
