"""Reward gaps from labels of single aspects."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pair_fakes import pickapic_row, write_pickapic

from diffalign.data.gaps import known_gaps, reward_gaps
from diffalign.data.pairs import choose_pairs
from diffalign.data.records import PreferenceRecord, as_records
from diffalign.data.sources import open_source
from diffalign.errors import DiffalignError


def row(label: float, **labels: float) -> PreferenceRecord:
    return PreferenceRecord("p", b"", b"", label, labels=labels)


ROWS = [row(1.0, style=0.75), row(0.0, style=0.75), row(0.9), row(0.2, style=1.0), row(0.5, style=0.5)]


def test_gaps_are_log_odds_of_the_chosen_picture_and_limited():
    gaps = reward_gaps(ROWS, np.array([0, 1, 0, 1, 0]))
    assert list(gaps) == ["style"]
    log3 = math.log(3)
    np.testing.assert_allclose(gaps["style"], [log3, -log3, math.nan, -5.0, 0.0])


def test_pairs_carry_them_and_controls_reverse_their_sign_only():
    given, swapped = (choose_pairs(as_records(ROWS), labels) for labels in ("given", "swapped"))
    assert given.records.tolist() == [0, 1, 2, 3]  # the tie is dropped
    np.testing.assert_allclose(given.gaps["style"], -swapped.gaps["style"])
    assert given.keep(given.chosen == 1).gaps["style"].shape == (2,)


def test_what_rewards_thought_of_a_relabelled_pair_is_an_aspect(tmp_path):
    rows = [pickapic_row("a", 0.0, b"x", b"y", chance=0.75), pickapic_row("b", 1.0, b"x", b"y", chance=None)]
    records = open_source(str(write_pickapic(tmp_path / "train-0.parquet", rows)))
    assert [dict(row.labels) for row in records.rows] == [{"chance": 0.75}, {}]
    gap = choose_pairs(records).gaps["chance"]
    np.testing.assert_allclose(gap, [-math.log(3), math.nan])


def test_an_aspect_nobody_judged_is_refused_by_name():
    gaps = choose_pairs(as_records(ROWS)).gaps
    assert known_gaps(gaps, "style", "x") is gaps["style"]
    with pytest.raises(DiffalignError, match=r"curriculum.gap names 'stile'.*aspects of the data: style"):
        known_gaps(gaps, "stile", "curriculum.gap")
    with pytest.raises(DiffalignError, match=r"aspects of the data: none"):
        known_gaps({}, "style", "curriculum.gap")
