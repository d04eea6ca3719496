"""Batches of scores: order, parts, skips, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from fakes import Brightness, Lit, flat, prompts
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import compare
from diffalign.evaluation.scoring import score_pictures, unique_names
from diffalign.rewards import RewardOutput
from diffalign.rewards.guard import Guarded


class Picky(Lit):
    """Lit, but NaN for prompts that hold a 0; a part follows the score."""

    name = "picky"
    skips = True

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        mean = super().score(media, prompts).mean
        mean = torch.where(torch.tensor(["0" in p for p in prompts]), torch.nan, mean)
        return RewardOutput(mean, parts={"twice": 2 * mean})


class Uneven(Brightness):
    """A part that only some batches have."""

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        output = super().score(media, prompts)
        parts = {"late": output.mean} if "prompt 2" in prompts else {}
        return RewardOutput(output.mean, None, parts)


class Failing(Lit):
    """Raises for one prompt."""

    name = "failing"

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        if "prompt 3" in prompts:
            raise RuntimeError("no answer")
        return super().score(media, prompts)


TEXTS = [f"prompt {i}" for i in range(5)]


def test_batches_keep_the_order() -> None:
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    found = score_pictures(Brightness(), flat(values), TEXTS, label="x", batch_size=2)
    assert found.mean == pytest.approx(values)
    assert found.std == pytest.approx([0.25] * 5)
    assert found.skipped == 0


def test_part_of_some_batches_is_nan_elsewhere() -> None:
    found = score_pictures(Uneven(), flat([0.1, 0.2, 0.3, 0.4, 0.5]), TEXTS, label="x", batch_size=2)
    assert np.isnan(found.parts["late"]).tolist() == [True, True, False, False, True]


def test_skipped_pairs_are_left_out_and_counted() -> None:
    # Prompts 0 and 10 are skipped on both sides; among the other ten, five rise.
    base, tuned = flat([0.0] * 12), flat([1.0, 0.0] * 6)
    result = compare(base, tuned, prompts(12), [Picky()])
    assert (result.main.n, result.main.skipped) == (10, 2)
    assert result.main.difference == 0.4
    assert result.skipped == {"picky": 4}
    assert result.metrics["picky/twice"].n == 10
    assert result.as_json()["metrics"]["picky"]["skipped"] == 2
    assert result.categories["even"]["picky"].skipped == 2


def test_guarded_failures_become_skips() -> None:
    result = compare(flat([0.0] * 6), flat([1.0] * 6), prompts(6), [Guarded(Failing(), "skip")])
    assert (result.main.n, result.main.wins.wins) == (5, 5)
    with pytest.raises(DiffalignError, match="no answer"):
        compare(flat([0.0] * 6), flat([1.0] * 6), prompts(6), [Failing()])


@pytest.mark.parametrize(
    ("reward", "texts", "message"),
    [
        (Picky(), ["0", "10"], "every one of 2 pictures was skipped"),
        (
            type("Hard", (Picky,), {"skips": False})(),
            ["0", "1"],
            "1 of 2 scores are not finite.*on_error: skip",
        ),
    ],
)
def test_gaps_that_are_refused(reward: Picky, texts: list[str], message: str) -> None:
    with pytest.raises(DiffalignError, match=message):
        score_pictures(reward, flat([0.0, 1.0]), texts, label="x")


def test_too_few_scored_pairs_are_refused() -> None:
    with pytest.raises(
        DiffalignError, match=r"fewer than 2 different prompts have both scores .1 of 2 pairs"
    ):
        compare(flat([0.0] * 2), flat([1.0] * 2), prompts(2), [Picky()])


def test_equal_names_are_told_apart() -> None:
    assert unique_names([Lit(), Brightness(), Lit(), Lit()]) == ["lit", "brightness", "lit-2", "lit-3"]
    result = compare(flat([0.0] * 3), flat([1.0] * 3), prompts(3), [Lit(), Lit()])
    assert list(result.metrics) == ["lit", "lit-2"]


def test_medians_stand_beside_the_means() -> None:
    metric = compare(flat([0.0, 0.0, 0.0]), flat([0.1, 0.2, 0.9]), prompts(3), [Brightness()]).main
    assert metric.difference == pytest.approx(0.4)
    assert metric.medians == pytest.approx((0.0, 0.2))
    assert metric.median_difference == pytest.approx(0.2)
    # A median of changes is not a change of medians: changes are 0.9, 0 and -0.5.
    other = compare(flat([0.0, 0.4, 0.6]), flat([0.9, 0.4, 0.1]), prompts(3), [Brightness()]).main
    assert other.medians == pytest.approx((0.4, 0.4))
    assert other.median_difference == pytest.approx(0.0, abs=1e-6)


def test_two_draws_of_the_same_model_show_no_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    base, tuned = (torch.rand(200, 3, 2, 2, generator=generator) for _ in range(2))
    metric = compare(base, tuned, prompts(200), [Brightness()]).main
    assert metric.change == "no difference"
    assert metric.wins.interval[0] < 0.5 < metric.wins.interval[1]
    assert metric.wins.rate == pytest.approx(0.5, abs=0.1)
