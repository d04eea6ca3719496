import pytest

from diffalign.engine.stopping import GoldRule, paired_change

BASE = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]


def test_paired_change_by_hand():
    # Differences 1, 0, 2: mean 1, variance ((0)^2 + 1 + 1) / 2 = 1, standard error sqrt(1 / 3).
    mean, error = paired_change([0, 1, 0], [1, 1, 2])
    assert mean == 1
    assert error == pytest.approx(3**-0.5)


def test_rising_gold_never_stops():
    rule = GoldRule(patience=1, tolerance=0.0)
    assert all(rule.look(step, [b + 0.1 * step for b in BASE]) is None for step in range(5))
    assert rule.best_step == 4


def test_falling_gold_stops_after_patience_and_says_why():
    rule = GoldRule(patience=2)
    assert rule.look(0, BASE) is None
    assert rule.look(10, [b + 0.5 for b in BASE]) is None
    assert rule.look(20, [b + 0.2 for b in BASE]) is None
    reason = rule.look(30, BASE)
    assert "best, at step 10" in reason
    assert "-0.5" in reason


def test_a_fall_within_the_noise_is_none():
    rule = GoldRule(patience=1, tolerance=1.0)
    rule.look(0, BASE)
    # One prompt of eight lost, another won, a third lost a little: mean -0.0125, standard error 0.19.
    noisy = [1.0, 0.0, -0.1, *BASE[3:]]
    assert rule.look(1, noisy) is None
    assert rule.falls == 0


def test_a_recovery_in_between_starts_the_count_anew():
    rule = GoldRule(patience=2)
    worse = [b - 0.3 for b in BASE]
    rule.look(0, BASE)
    assert rule.look(1, worse) is None
    assert rule.look(2, BASE) is None
    assert rule.look(3, worse) is None
    assert rule.look(4, worse) is not None


def test_state_survives_a_restart():
    rule, other = GoldRule(patience=2), GoldRule(patience=2)
    rule.look(0, BASE)
    rule.look(1, [b - 0.3 for b in BASE])
    other.restore(rule.state())
    worse = [b - 0.4 for b in BASE]
    assert other.look(2, worse) == rule.look(2, worse) is not None


def test_another_number_of_prompts_is_refused():
    rule = GoldRule()
    rule.look(0, BASE)
    with pytest.raises(ValueError, match="7 gold scores"):
        rule.look(1, BASE[:7])
