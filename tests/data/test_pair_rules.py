"""Pure rules: pairs of groups, labels, chances. Numbers are worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.data.chances import Margins, calibrate, chances, label_chances, uncertainty
from diffalign.data.pair_rules import (
    LabelRule,
    Selection,
    group_pairs,
    new_labels,
    posterior,
    ranks,
    uncertainty_weights,
)
from diffalign.errors import DiffalignError

SCORES = [0.2, 0.9, 0.5, 0.9, 0.1]  # ranks 4, 1, 3, 1, 5


def pairs(rule, scores=SCORES, **options):
    return group_pairs(scores, Selection(rule, **options), np.random.default_rng(0))


def test_equal_scores_share_a_rank():
    assert ranks(SCORES).tolist() == [4, 1, 3, 1, 5]


def test_best_and_worst_are_the_widest_gap():
    assert pairs("best_worst") == [(1, 4)]
    assert pairs("best_worst", rejected_ranks=(2, 3)) == [(1, 2)]
    assert pairs("best_worst", chosen_ranks=(2, 9)) == [(2, 4)]


def test_neighbours_skip_equal_scores():
    assert pairs("adjacent") == [(1, 2), (2, 0), (0, 4)]
    assert pairs("adjacent", min_margin=0.25) == [(1, 2), (2, 0)]


def test_every_different_pair_once():
    assert sorted(pairs("ranked")) == [(0, 4), (1, 0), (1, 2), (1, 4), (2, 0), (2, 4), (3, 0), (3, 2), (3, 4)]
    assert sorted(pairs("ranked", min_margin=0.7)) == [(1, 0), (1, 4), (3, 0), (3, 4)]


def test_best_against_random_draws_any_worse_one():
    found = {
        group_pairs(SCORES, Selection("best_random"), np.random.default_rng(seed))[0] for seed in range(40)
    }
    assert found == {(1, 0), (1, 2), (1, 4)}


@pytest.mark.parametrize("rule", ["best_worst", "best_random", "adjacent", "ranked"])
def test_a_group_without_spread_gives_no_pair(rule):
    assert pairs(rule, [0.5, 0.5, 0.5]) == []
    assert pairs(rule, [0.5]) == []
    assert pairs(rule, []) == []


@given(
    st.lists(st.integers(0, 4), max_size=6),
    st.sampled_from(["best_worst", "best_random", "adjacent", "ranked"]),
)
def test_the_chosen_picture_always_scores_higher(scores, rule):
    assert all(scores[i] > scores[j] for i, j in pairs(rule, scores))


def test_impossible_selections_are_refused():
    with pytest.raises(DiffalignError, match="3 to 2; expected first <= last"):
        Selection(chosen_ranks=(3, 2))
    with pytest.raises(DiffalignError, match="smallest margin is -1"):
        Selection(min_margin=-1)


GIVEN = np.array([1.0, 0.0, 0.5, 1.0, 0.8])
CHANCE = np.array([0.05, 0.3, 0.95, np.nan, 0.02])


def test_flip_reverses_what_is_contradicted_beyond_the_threshold():
    found = new_labels(GIVEN, CHANCE, LabelRule("flip", threshold=0.9))
    assert found.label == pytest.approx([0.0, 0.0, 0.5, 1.0, 0.2])
    assert found.action == ["flipped", "kept", "kept", "unscored", "flipped"]
    assert found.keep.all()
    higher = new_labels(GIVEN, CHANCE, LabelRule("flip", threshold=0.96))
    assert higher.action == ["kept", "kept", "kept", "unscored", "flipped"]


def test_flip_decides_ties_only_when_asked():
    found = new_labels(GIVEN, CHANCE, LabelRule("flip", decide_ties=True))
    assert found.label[2] == 1.0
    assert found.action[2] == "tie decided"


def test_drop_removes_contradicted_and_uncertain_pairs_and_changes_no_label():
    doubt = np.array([0.1, 0.6, 0.1, 0.9, 0.1])
    found = new_labels(GIVEN, CHANCE, LabelRule("drop", max_uncertainty=0.5), doubt)
    assert found.keep.tolist() == [False, False, True, True, False]
    assert found.action == [
        "dropped: disagrees",
        "dropped: uncertain",
        "kept",
        "unscored",
        "dropped: disagrees",
    ]
    assert found.label.tolist() == GIVEN.tolist()


def test_soften_mixes_label_and_chance_by_trust():
    found = new_labels(GIVEN, CHANCE, LabelRule("soften", trust=0.25))
    assert found.label == pytest.approx([0.7625, 0.075, 0.6125, 1.0, 0.605])
    assert found.action == ["softened", "softened", "tie decided", "unscored", "softened"]


def test_replace_takes_the_chance_or_its_winner():
    assert new_labels(GIVEN, CHANCE, LabelRule("replace")).label == pytest.approx([0.05, 0.3, 0.95, 1, 0.02])
    hard = new_labels([1.0, 0.0], [0.3, 0.5], LabelRule("replace", hard=True))
    assert hard.label.tolist() == [0.0, 0.5]


def test_uncertain_rewards_have_no_say():
    found = new_labels([1.0, 1.0], [0.1, 0.1], LabelRule("replace", max_uncertainty=0.5), [0.4, 0.6])
    assert found.label == pytest.approx([0.1, 1.0])


def test_posterior_by_hand():
    """p 0.5 leaves the label's 0.8; p 0.2 cancels it: 0.2 x 0.8 against 0.8 x 0.2."""
    found = posterior(np.array([1.0, 1.0, 0.0, 0.5]), np.array([0.5, 0.2, 0.9, 0.7]), 0.2)
    assert found == pytest.approx([0.8, 0.5, 0.18 / 0.26, 0.7])


def test_posterior_of_labels_without_noise_is_the_label():
    assert posterior(np.array([1.0, 0.0]), np.array([0.0, 0.3]), 0.0).tolist() == [1.0, 0.0]
    with pytest.raises(DiffalignError, match=r"noise is 0\.5"):
        posterior(np.array([1.0]), np.array([0.3]), 0.5)


def test_weights_fall_with_uncertainty():
    assert uncertainty_weights([0.0, 1.0, math.nan]) == pytest.approx([1.0, math.exp(-1), 1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"threshold": 0.5}, "threshold"), ({"trust": 1.1}, "trust"), ({"max_uncertainty": 2}, "uncertainty")],
)
def test_impossible_rules_are_refused(options, message):
    with pytest.raises(DiffalignError, match=message):
        LabelRule("soften", **options)


# Chances


def test_chance_of_members_is_the_mean_of_their_sigmoids():
    log3 = math.log(3)  # sigmoid(log 3) is 3/4
    margins = Margins(np.array([[2 * log3, 0.0], [-2 * log3, 2 * log3]]))
    assert chances(margins, 2.0) == pytest.approx([0.5, 0.625])


def test_normal_chance_without_temperature_is_phi_of_margin_over_std():
    margins = Margins(np.array([[1.0, 3.0], [3.0, 3.0]]))  # means 2 and 3, stds sqrt 2 and 0
    found = chances(margins, 0.0, "normal")
    assert found == pytest.approx([0.5 * (1 + math.erf(1.0)), 1.0])
    with pytest.raises(DiffalignError, match="temperature is 0"):
        chances(margins, 0.0)


def test_normal_chance_is_close_to_the_sigmoid_when_members_agree():
    row = np.linspace(-4, 4, 9)
    margins = Margins(np.stack([row, row]))
    assert chances(margins, 1.0, "normal") == pytest.approx(chances(margins, 1.0), abs=0.02)


def test_uncertainty_by_hand():
    log3 = math.log(3)
    split = Margins(np.array([[50.0, log3], [-50.0, log3]]))
    assert uncertainty(split, 1.0) == pytest.approx([1.0, 0.0])
    own = Margins(np.array([[0.0]]), np.array([log3]))  # from sigmoid(-log 3) to sigmoid(log 3)
    assert uncertainty(own, 1.0) == pytest.approx([0.5])
    assert uncertainty(Margins(np.array([[1.0]])), 1.0) is None


def world(temperature, noise, count=6000):
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 3, count)
    right = rng.random(count) < 1 / (1 + np.exp(-margin / temperature))
    label = np.where(rng.random(count) < noise, ~right, right).astype(float)
    return Margins(margin[None]), label


def test_temperature_is_found_again():
    margins, label = world(1.5, 0.0)
    assert calibrate(margins, label).temperature == pytest.approx(1.5, rel=0.1)


def test_temperature_and_label_noise_are_found_together():
    margins, label = world(0.7, 0.2)
    found = calibrate(margins, label, label_noise=None)
    assert (found.temperature, found.label_noise) == pytest.approx((0.7, 0.2), abs=0.2)
    # Without the noise the same labels make the reward look less certain than it is.
    assert calibrate(margins, label).temperature > 1.5
    told = label_chances(chances(margins, found.temperature), found.label_noise)
    sure = told > 0.75
    assert told[sure].mean() == pytest.approx(label[sure].mean(), abs=0.03)


def test_a_reward_that_knows_nothing_overrules_nothing():
    """Half wrong labels and a useless reward look alike; the second reading is the safe one."""
    rng = np.random.default_rng(1)
    margins, label = Margins(rng.normal(0, 1, (1, 500))), rng.integers(0, 2, 500).astype(float)
    found = calibrate(margins, label, label_noise=None)
    p = chances(margins, found.temperature)
    assert new_labels(label, p, LabelRule("flip", threshold=0.8)).action == ["kept"] * 500


def test_separable_labels_have_a_finite_temperature():
    margins = Margins(np.array([[1.0, -2.0, 3.0, -1.0]]))
    found = calibrate(margins, np.array([1.0, 0.0, 1.0, 0.0]))
    assert 0.05 < found.temperature < 2
    assert found.pairs == 4


def test_ties_and_unscored_pairs_are_not_fitted_and_numbers_given_are_kept():
    margins = Margins(np.array([[1.0, 1.0, np.nan, -1.0]]))
    assert calibrate(margins, np.array([1.0, 0.5, 1.0, 0.0])).pairs == 2
    assert calibrate(margins, np.full(4, 0.5), temperature=3.0, label_noise=None).temperature == 3.0
    with pytest.raises(DiffalignError, match="none of 4 pairs has a decided label"):
        calibrate(margins, np.full(4, 0.5))
    with pytest.raises(DiffalignError, match=r"label noise is 0\.7"):
        calibrate(margins, np.ones(4), label_noise=0.7)
