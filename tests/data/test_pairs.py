from __future__ import annotations

import numpy as np
import pytest
from pair_fakes import records

from diffalign.data.pairs import choose_pairs
from diffalign.data.records import PreferenceRecord, as_records
from diffalign.errors import DiffalignError

LABELS = (1.0, 0.0, 0.5, 0.8, 0.25)


def test_ties_are_dropped_and_soft_labels_oriented() -> None:
    pairs = choose_pairs(as_records(records(5, LABELS)))
    assert pairs.records.tolist() == [0, 1, 3, 4]
    assert pairs.chosen.tolist() == [0, 1, 0, 1]
    assert pairs.preference.tolist() == pytest.approx([1.0, 1.0, 0.8, 0.75])
    assert pairs.ties_dropped == 1


def test_kept_ties_count_half_and_never_as_a_win() -> None:
    pairs = choose_pairs(as_records(records(5, LABELS)), ties="half")
    assert pairs.records.tolist() == [0, 1, 2, 3, 4]
    assert pairs.preference[2] == 0.5
    assert pairs.ties_dropped == 0


def test_all_ties_are_refused_with_count_and_remedy() -> None:
    tied = as_records(records(7, (0.5,)))
    with pytest.raises(DiffalignError, match=r"all 7 labelled pairs.*data\.ties=half"):
        choose_pairs(tied)
    assert len(choose_pairs(tied, ties="half")) == 7


def test_swapped_reverses_every_preference() -> None:
    given = choose_pairs(as_records(records(5, LABELS)))
    swapped = choose_pairs(as_records(records(5, LABELS)), labels="swapped")
    assert (swapped.chosen == 1 - given.chosen).all()
    assert swapped.preference.tolist() == given.preference.tolist()
    assert swapped.records.tolist() == given.records.tolist()


def test_random_labels_are_a_fair_coin_per_record_and_seed() -> None:
    many = as_records([PreferenceRecord("p", b"", b"", 1.0)] * 400)
    first, again, other = (choose_pairs(many, labels="random", seed=seed) for seed in (0, 0, 1))
    assert first.chosen.tolist() == again.chosen.tolist()
    assert first.chosen.tolist() != other.chosen.tolist()
    assert 160 < first.chosen.sum() < 240
    fewer = choose_pairs(as_records([PreferenceRecord("p", b"", b"", 1.0)] * 10), labels="random")
    assert fewer.chosen.tolist() == first.chosen[:10].tolist()


def test_chosen_and_rejected_of_a_record() -> None:
    record = PreferenceRecord("p", b"first", b"second", 0.0)
    assert (record.chosen, record.rejected, record.is_tie) == (b"second", b"first", False)
    assert PreferenceRecord("p", b"first", b"second", 0.5).is_tie


def test_flipped_labels_are_a_share_that_the_seed_chooses():
    many = as_records([PreferenceRecord("p", b"", b"", 1.0)] * 2000)
    given = choose_pairs(many)
    flipped, again, other = (choose_pairs(many, seed=seed, flipped=0.2) for seed in (0, 0, 1))
    assert (given.chosen == 0).all()
    assert abs(flipped.chosen.mean() - 0.2) < 0.03
    np.testing.assert_array_equal(flipped.chosen, again.chosen)
    assert (flipped.chosen != other.chosen).mean() > 0.2
    # A share that grows keeps the records that were flipped already.
    more = choose_pairs(many, flipped=0.4)
    assert (more.chosen[flipped.chosen == 1] == 1).all()
    assert (flipped.preference == 1).all()
