"""ISTD of two models: ends of a path, numbers by hand, the same paths for both, what an evaluation reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.backbones import open_backbone
from diffalign.config import ModelConfig
from diffalign.evaluation.evaluate import spread
from diffalign.evaluation.latent_paths import path_effects, path_lengths, path_noises
from diffalign.evaluation.pictures import Settings
from diffalign.evaluation.prompts import EvalPrompt
from diffalign.sampling.generate import generate_images

ROWS = [EvalPrompt("a cat", seed=3), EvalPrompt("a dog", seed=4)]


@pytest.fixture(scope="module")
def backbone(tiny_sdxl: Path):
    """Adapters that were moved away from zero."""
    opened = open_backbone(
        ModelConfig(path=str(tiny_sdxl), precision="fp32"), device="cpu", parts="all", resolution=64
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in opened.trainable_parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return opened


def test_a_path_leads_from_the_noise_of_the_seed_to_another_and_keeps_its_norm():
    found = path_noises((4, 8, 8), 3)
    start = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found[0], start)
    assert len(found) == 11
    assert abs(torch.cosine_similarity(found[0].flatten(), found[10].flatten(), dim=0)) < 0.2
    assert ((found.flatten(1).norm(dim=1) - 16).abs() < 1.5).all()
    # Of 90 degrees every step is 9: neighbours have the cosine 0.988, whatever their place.
    near = torch.cosine_similarity(found[1:].flatten(1), found[:-1].flatten(1), dim=1)
    assert near.max() - near.min() < 2e-3


def test_given_noises_make_the_pictures_of_their_seeds(backbone):
    texts, seeds = ["a cat", "a dog"], [3, 4]
    noises = torch.stack([path_noises(backbone.latent_shape, seed)[0] for seed in seeds])
    expected = generate_images(backbone, texts, seeds, steps=2, guidance=2.0)
    found = generate_images(backbone, texts, [0, 0], steps=2, guidance=2.0, noises=noises, batch_size=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_both_models_walk_the_same_paths(backbone):
    settings = Settings(2, 1.0, 4)
    tuned = path_lengths(backbone, ROWS, settings)
    assert tuned.shape == (2, 10)
    with backbone.reference():
        base = path_lengths(backbone, ROWS, settings)
        again = path_lengths(backbone, ROWS[1:], settings)
    torch.testing.assert_close(base[1:], again)
    assert (tuned - base).abs().max() > 1e-3


def test_effects_by_hand():
    """Steps (1, 3) deviate by 1 around 2, steps (2, 2) by 0; twice as long ones deviate twice as much."""
    base = torch.tensor([[1.0, 3.0], [2.0, 6.0]])
    tuned = torch.tensor([[2.0, 2.0], [4.0, 4.0]])
    found = path_effects(base, tuned, ROWS)
    assert list(found) == ["ISTD", "path step"]
    assert (found["ISTD"].base, found["ISTD"].tuned) == (1.5, 0.0)
    assert (found["path step"].base, found["path step"].tuned) == (3.0, 3.0)
    assert found["path step"].difference == 0
    assert (found["ISTD"].n, found["ISTD"].unit) == (2, "paths")


def test_prompts_are_spread_evenly():
    rows = [EvalPrompt(str(i)) for i in range(7)]
    assert [row.text for row in spread(rows, 3)] == ["0", "3", "6"]
    assert spread(rows, 7) == rows
    assert spread(rows, 100) == rows
