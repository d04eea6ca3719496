"""Validation of preference models: shares, bins and halves by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffalign.errors import DiffalignError
from diffalign.evaluation.calibration import (
    Share,
    accuracy_by_margin,
    answers,
    compare_halves,
    expected_calibration_error,
    reliability,
    validate_preferences,
)
from diffalign.evaluation.calibration_charts import margin_chart, reliability_diagram
from diffalign.evaluation.statistics import wilson


def test_ties_and_unjudged_pairs_are_left_out():
    right, confidence = answers([0.9, 0.2, 0.5, 0.7, 0.7], [1.0, 1.0, 0.0, 0.5, np.nan])
    assert right.tolist() == [1, 0, 0.5]
    assert confidence.tolist() == [0.9, 0.8, 0.5]
    with pytest.raises(DiffalignError, match="decided"):
        answers([0.3], [0.5])
    with pytest.raises(DiffalignError, match="2 predictions came with 1"):
        answers([0.3, 0.4], [1.0])


def test_calibration_error_by_hand():
    # Two answers of confidence 0.62 (one right) and two of 0.97 (both right): (|0.5 - 0.62| + |1 - 0.97|) / 2.
    right, confidence = np.array([1.0, 0, 1, 1]), np.array([0.62, 0.62, 0.97, 0.97])
    bins = reliability(right, confidence)
    assert [(b.low, b.accuracy.value, b.accuracy.n) for b in bins] == [(0.6, 0.5, 2), (0.95, 1.0, 2)]
    assert expected_calibration_error(bins) == pytest.approx(0.075)


def test_certainty_of_exactly_one_belongs_to_the_last_bin():
    assert reliability(np.ones(1), np.ones(1))[0].high == 1.0


def test_a_calibrated_model_has_a_small_error_and_a_boastful_one_a_large_one():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 20_000)
    right = (rng.uniform(size=len(p)) < p).astype(float)
    assert expected_calibration_error(reliability(right, p)) < 0.02
    boast = np.clip(p + 0.2, 0, 1)
    assert expected_calibration_error(reliability(right, boast)) > 0.1


def test_margin_bins_have_equal_counts_and_ignore_the_sign():
    right, margin = np.array([1.0, 0, 1, 1]), np.array([-4.0, 0.5, 1.0, -3.0])
    low, high = accuracy_by_margin(right, np.full(4, 0.7), margin, bins=2)
    assert (low.low, low.high, low.accuracy.value) == (0.5, 1.0, 0.5)
    assert (high.low, high.high, high.accuracy.value) == (3.0, 4.0, 1.0)


def test_halves_with_newcombes_interval():
    right = np.array([1.0] * 9 + [0] + [1.0] * 5 + [0] * 5)
    found = compare_halves(right, np.arange(20.0))
    assert found is not None
    assert (found.certain.value, found.uncertain.value, found.difference) == (0.9, 0.5, pytest.approx(0.4))
    (l1, u1), (l2, u2) = wilson(9, 10), wilson(5, 10)
    low = 0.4 - np.hypot(0.9 - l1, u2 - 0.5)
    high = 0.4 + np.hypot(u1 - 0.9, 0.5 - l2)
    assert found.interval == pytest.approx((low, high))
    assert not compare_halves(right[::-1].copy(), np.arange(20.0)).informative
    assert compare_halves(np.ones(1), np.ones(1)) is None


def test_share_of_nothing_says_so():
    assert np.isnan(Share.of(np.array([])).value)
    assert Share.of(np.array([1.0, 0.5])).value == 0.75


def test_everything_together_is_plain_data_and_can_be_drawn(tmp_path):
    rng = np.random.default_rng(1)
    margin = rng.normal(size=400) * 2
    preference = (rng.uniform(size=400) < 1 / (1 + np.exp(-margin))).astype(float)
    preference[:10] = 0.5
    noise = rng.uniform(size=400)
    found = validate_preferences(margin, 1 / (1 + np.exp(-margin)), preference, {"noise": noise})
    assert found["accuracy"]["n"] == 390
    assert found["ties"] == 10
    assert found["halves"]["margin"]["informative"]
    assert not found["halves"]["noise"]["informative"]
    assert json.loads(json.dumps(found))["log_loss"] == found["log_loss"]
    for draw in (reliability_diagram, margin_chart):
        assert draw(found, tmp_path / f"{draw.__name__}.png").stat().st_size > 5000
