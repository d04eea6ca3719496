"""Rewards of whole sets: values, intervals, and their place in an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.evaluation.set_metrics import GROUPS, measure_sets
from diffalign.evaluation.statistics import jackknife_interval
from diffalign.rewards import RewardOutput
from diffalign.rewards.sets.rewards import VendiReward
from tests.evaluation.fakes import flat, prompts


class MeanOfSet:
    """The mean grey value of all pictures together; counts how large the sets were."""

    name = "mean-of-set"
    modality = "image"
    differentiable = True
    kind = "set"

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        self.sizes.append(len(media))
        return RewardOutput(media.mean().expand(len(media)))


def test_jackknife_of_a_mean_is_the_t_interval_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=12)
    without = (values.sum() - values) / 11
    low, high = jackknife_interval(values.mean(), without)
    expected = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected)


def test_jackknife_of_a_variance_covers_it() -> None:
    draws = np.random.default_rng(1).normal(size=(300, 40))
    held = 0
    for values in draws:
        without = [np.var(np.delete(values, k)) for k in range(40)]
        low, high = jackknife_interval(np.var(values), without)
        held += low <= 1 <= high
    assert 0.85 < held / 300 < 0.98


def test_a_jackknife_needs_two_groups_and_numbers() -> None:
    with pytest.raises(DiffalignError, match="2 groups; got 1"):
        jackknife_interval(0.0, [1.0])
    with pytest.raises(DiffalignError, match="1 of 2 scores are not finite"):
        jackknife_interval(0.0, [1.0, float("nan")])


def test_a_set_is_measured_whole_and_without_each_group_of_prompts() -> None:
    grey = torch.linspace(0, 1, 60).tolist()
    reward = MeanOfSet()
    found = measure_sets(flat(grey), flat([g / 2 + 0.4 for g in grey]), prompts(60), [reward])["mean-of-set"]
    assert reward.sizes == 2 * [60, *[57] * GROUPS]
    assert found.base == pytest.approx(0.5)
    assert found.tuned == pytest.approx(0.65)
    assert found.difference == pytest.approx(0.15)
    change = 0.4 - np.array(grey) / 2
    groups = np.array([change[k::GROUPS].mean() for k in range(GROUPS)])
    expected = stats.t.interval(0.95, GROUPS - 1, loc=0.15, scale=stats.sem(groups))
    assert found.interval == pytest.approx(expected, rel=1e-3)
    assert found.change == "better"
    assert (found.n, found.prompts) == (60, 60)


def test_pictures_of_a_prompt_stay_together() -> None:
    rows = [row for row in prompts(4) for _ in range(3)]
    reward = MeanOfSet()
    found = measure_sets(flat([0.5] * 12), flat([0.5] * 12), rows, [reward])["mean-of-set"]
    assert reward.sizes == 2 * [12, 9, 9, 9, 9]
    assert found.difference == 0
    assert found.change == "no difference"
    assert found.prompts == 4


def test_features_are_made_once_and_variety_is_seen() -> None:
    reward = VendiReward("pixels:4")
    calls: list[int] = []
    embed = reward.encoder.embed

    def spy(media: Tensor) -> Tensor:
        calls.append(len(media))
        return embed(media)

    reward.encoder.embed = spy  # type: ignore[method-assign]
    noise = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = measure_sets(flat([0.5] * 40), noise, prompts(40), [reward])["vendi"]
    assert sum(calls) == 80
    assert found.base == pytest.approx(1.0, abs=1e-4)
    assert found.tuned > 1.5
    assert found.change == "better"


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(DiffalignError, match="needs 3 prompts or more; got 2"):
        measure_sets(flat([0.5] * 2), flat([0.5] * 2), prompts(2), [MeanOfSet()])


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(DiffalignError, match="base: the set's score is not a finite number"):
        measure_sets(flat([float("nan")] * 4), flat([0.5] * 4), prompts(4), [MeanOfSet()])
