"""Reward-weighted regression and imitation of good pictures: weights by hand, and which pictures move the model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import picture_world as world
import pytest
import torch
from pair_world import counted_forwards, whole_draw

from diffalign.data.picture_labels import Pictures
from diffalign.trainers.rwr import RWRConfig, reward_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scored")


def scored(scores: list[float], groups: list[int] | None = None) -> Pictures:
    count = len(scores)
    unknown, rows = np.full(count, np.nan), np.arange(count)
    group = np.zeros(count, int) if groups is None else np.asarray(groups)
    return Pictures(rows, rows, unknown, np.asarray(scores), unknown, group, np.ones(count, np.float32))


def test_weights_by_hand():
    raw = reward_weights(scored([0.0, math.log(3)]), RWRConfig(scale="raw"))
    torch.testing.assert_close(raw, torch.tensor([0.5, 1.5]))  # 1 and 3, over their mean 2
    sharp = reward_weights(scored([0.0, math.log(3)]), RWRConfig(scale="raw", temperature=0.5))
    torch.testing.assert_close(sharp, torch.tensor([0.2, 1.8]))  # 1 and 9, over 5
    # Scores 0 and 4 have deviation 2: two units apart, whatever the reward's own scale.
    unit = reward_weights(scored([0.0, 4.0]), RWRConfig(temperature=2.0))
    torch.testing.assert_close(unit, torch.tensor([2 / (1 + math.e), 2 * math.e / (1 + math.e)]))
    torch.testing.assert_close(reward_weights(scored([0.0, 4e6]), RWRConfig(temperature=2.0)), unit)


def test_weights_within_groups_have_mean_one_there():
    pictures = scored([0.0, math.log(3), 50.0, 50.0, 70.0], [0, 0, 1, 1, 2])
    found = reward_weights(pictures, RWRConfig(scale="raw", within="group"))
    torch.testing.assert_close(found, torch.tensor([0.5, 1.5, 1.0, 1.0, 1.0]))


def test_extreme_and_equal_scores():
    outlier = reward_weights(scored([0.0] * 99 + [1000.0]), RWRConfig(scale="raw"))
    assert outlier[-1] == 20.0
    assert torch.isfinite(outlier).all()
    torch.testing.assert_close(reward_weights(scored([3.0, 3.0]), RWRConfig()), torch.ones(2))


def test_losses_are_weighted_errors_and_need_no_reference(tiny_sdxl, folder):
    plain = world.make("rwr", tiny_sdxl, folder, temperature=1e9)
    weighted = world.make("rwr", tiny_sdxl, folder, temperature=0.5)
    draw = whole_draw()
    with counted_forwards(plain.backbone) as calls:
        losses, metrics = plain.loss(plain.fetch(draw))
    assert [call["reference"] for call in calls] == [False]
    assert losses.requires_grad
    torch.testing.assert_close(losses, metrics["error"])
    torch.testing.assert_close(metrics["reward_weight"], torch.ones(4))
    others, found = weighted.loss(weighted.fetch(draw))
    torch.testing.assert_close(others, losses * found["reward_weight"])
    # Scores 0, -1, -2 in turn: the first and the fourth picture are the best of their groups.
    assert found["reward_weight"].argsort(descending=True, stable=True).tolist() == [0, 3, 1, 2]


def test_only_good_pictures_are_imitated(tiny_sdxl, folder):
    trainer = world.make("sft", tiny_sdxl, folder)
    assert len(trainer._cache) == 4  # one of three pictures in each of four groups
    batch = trainer.fetch(whole_draw())
    with counted_forwards(trainer.backbone) as calls:
        losses, metrics = trainer.loss(batch)
    assert [call["reference"] for call in calls] == [False]
    torch.testing.assert_close(losses, metrics["error"])
    assert len(calls[0]["t"].unique()) == 4


def test_several_times_are_averaged(tiny_sdxl, folder):
    once, twice = (world.make("rwr", tiny_sdxl, folder, times_per_picture=n) for n in (1, 2))
    with counted_forwards(twice.backbone) as calls:
        _, metrics = twice.loss(twice.fetch(whole_draw()))
    assert len(calls[0]["x_t"]) == 8
    assert metrics["error"].shape == (4,)
    assert not torch.equal(metrics["error"], once.loss(once.fetch(whole_draw()))[1]["error"])
