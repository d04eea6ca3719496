"""Literal numbers, properties and a coverage simulation of the paired statistics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import DiffalignError
from diffalign.evaluation.statistics import (
    cluster_bootstrap,
    paired_difference,
    proportion_interval,
    sign_test,
    wilson,
    win_rate,
)


def test_wilson_literal_numbers() -> None:
    # z = 1.959964, z^2 = 3.841459: centre (0.5 + 1.920729 / 10) / (1 + 0.3841459) = 0.5,
    # half width sqrt(3.841459 (0.025 + 0.0096036)) / 1.3841459 = 0.263406.
    assert wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    # p = 0: the upper end is z^2 / (n + z^2) = 3.841459 / 23.841459.
    assert wilson(0, 20) == pytest.approx((0.0, 0.161125), abs=1e-6)
    assert wilson(20, 20) == pytest.approx((0.838875, 1.0), abs=1e-6)


def test_wilson_counts_a_tie_as_half() -> None:
    low, high = wilson(2.5, 5)
    assert low + high == pytest.approx(1.0)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_impossible_counts(successes: float, n: int) -> None:
    with pytest.raises(DiffalignError, match="0 <= successes <= n"):
        wilson(successes, n)


def test_sign_test_literal_numbers() -> None:
    # 8 to 2: 2 (C(10,0) + C(10,1) + C(10,2)) / 1024 = 112 / 1024.
    assert sign_test(8, 2) == pytest.approx(112 / 1024)
    assert sign_test(0, 0) == 1.0
    assert sign_test(3, 3) == 1.0


def test_paired_difference_means_and_counts() -> None:
    result = paired_difference([0, 0, 1, 1], [1, 1, 1, 0], ["a", "a", "b", "c"])
    assert (result.base, result.tuned, result.difference) == (0.5, 0.75, 0.25)
    assert (result.n, result.prompts) == (4, 3)


def test_difference_of_equal_scores_is_exactly_zero() -> None:
    scores = np.random.default_rng(0).normal(size=40)
    result = paired_difference(scores, scores)
    assert result.difference == 0.0
    assert result.interval == (0.0, 0.0)


def test_win_rate_does_not_count_ties_as_wins() -> None:
    ties = win_rate([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    assert (ties.wins, ties.ties, ties.losses) == (0, 4, 0)
    assert ties.rate == 0.5
    assert ties.decided_rate is None
    assert ties.p_value == 1.0


def test_win_rate_literal_numbers() -> None:
    # 2 wins, 1 tie, 1 loss: (2 + 0.5) / 4; among the decided 2 / 3.
    result = win_rate([0, 0, 1, 1], [1, 1, 1, 0])
    assert (result.wins, result.ties, result.losses) == (2, 1, 1)
    assert result.rate == 0.625
    assert result.decided_rate == pytest.approx(2 / 3)
    assert result.decided_interval == wilson(2, 3)
    assert result.interval[0] < 0.625 < result.interval[1]


def test_a_perfect_record_is_not_certain() -> None:
    result = win_rate([0.0] * 10, [1.0] * 10)
    assert result.rate == 1.0
    assert result.interval == wilson(10, 10)
    assert result.interval[0] < 0.75


def test_perfect_record_counts_prompts_not_seeds() -> None:
    prompts = ["a"] * 50 + ["b"] * 50
    assert proportion_interval([1.0] * 100, prompts) == wilson(2, 2)


def test_proportion_of_independent_values_is_wilson() -> None:
    assert proportion_interval([1, 0, 1, 1]) == wilson(3, 4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_swapping_the_models_mirrors_everything(pairs: list[tuple[int, int]]) -> None:
    base, tuned = [a for a, _ in pairs], [b for _, b in pairs]
    there, back = paired_difference(base, tuned), paired_difference(tuned, base)
    assert there.difference == -back.difference
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]), abs=1e-9)
    assert win_rate(base, tuned).rate == pytest.approx(1 - win_rate(tuned, base).rate)


def test_bootstrap_is_deterministic_and_its_seed_matters() -> None:
    values = np.random.default_rng(1).normal(size=30)
    assert cluster_bootstrap(values, seed=3) == cluster_bootstrap(values, seed=3)
    assert cluster_bootstrap(values, seed=3) != cluster_bootstrap(values, seed=4)


def test_expanded_percentiles_widen_small_samples() -> None:
    # Two clusters with means 0 and 1: resampled means are 0, 1/2 and 1; t with one degree of freedom
    # times sqrt(2) puts the tails at the very ends.
    assert cluster_bootstrap([0.0, 1.0]) == (0.0, 1.0)


def test_bootstrap_agrees_with_the_normal_interval_for_many_values() -> None:
    values = np.random.default_rng(2).normal(0.3, 1.0, 2000)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    low, high = cluster_bootstrap(values)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(size=50)
    whole = cluster_bootstrap(values)
    monkeypatch.setattr("diffalign.evaluation.statistics._CHUNK", 1000)
    assert cluster_bootstrap(values) == pytest.approx(whole)


def test_seeds_of_a_prompt_are_resampled_together() -> None:
    """Ten copies of each prompt's value carry no new information: the interval must not shrink."""
    values = np.random.default_rng(4).normal(size=25)
    copies, labels = np.repeat(values, 10), np.repeat(np.arange(25), 10)
    assert cluster_bootstrap(copies, labels) == pytest.approx(cluster_bootstrap(values))
    low, high = cluster_bootstrap(copies)
    clustered_low, clustered_high = cluster_bootstrap(copies, labels)
    assert high - low < 0.5 * (clustered_high - clustered_low)


def _coverage(level_shift: float, clustered: bool) -> float:
    """Share of 300 simulated evaluations (30 prompts, 3 seeds) whose interval holds the true mean."""
    rng = np.random.default_rng(5)
    labels = np.repeat(np.arange(30), 3)
    hits = 0
    for _ in range(300):
        values = rng.normal(0.2, 1.0, 30)[labels] + rng.normal(0, 0.5, 90)
        low, high = cluster_bootstrap(values, labels if clustered else None, resamples=600)
        hits += low <= 0.2 + level_shift <= high
    return hits / 300


def test_coverage_is_about_95_percent() -> None:
    assert 0.92 <= _coverage(0.0, clustered=True) <= 0.98


def test_coverage_fails_without_clusters_and_for_a_wrong_value() -> None:
    assert _coverage(0.0, clustered=False) < 0.85
    assert _coverage(0.6, clustered=True) < 0.5


@pytest.mark.parametrize(
    ("base", "tuned", "clusters", "message"),
    [
        ([1.0], [1.0, 2.0], None, "equal lengths; got 1 .base. and 2"),
        ([], [], None, "at least one entry"),
        ([1.0, float("nan")], [1.0, 1.0], None, "1 of 2 scores are not finite"),
        ([1.0, 2.0], [1.0, 2.0], ["a", "a"], "at least 2 different prompts; got 1"),
        ([1.0, 2.0], [1.0, 2.0], ["a"], "2 scores came with 1 prompt labels"),
    ],
)
def test_bad_scores_are_refused(base: list, tuned: list, clusters: list | None, message: str) -> None:
    with pytest.raises(DiffalignError, match=message):
        paired_difference(base, tuned, clusters)
