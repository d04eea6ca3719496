"""The best-of-N estimator against enumeration and simulation, its curve, and the fit of over-optimisation."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import DiffalignError
from diffalign.evaluation.best_of_n import (
    best_of_n,
    best_of_n_curve,
    best_of_n_kl,
    best_of_n_weights,
    fit_over_optimisation,
)


def _enumerated(proxy: list[float], gold: list[float], n: int) -> float:
    """Mean over all subsets of size n of the gold score of the proxy's favourite, ties shared."""
    values = []
    for chosen in combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in chosen)
        values.append(np.mean([gold[i] for i in chosen if proxy[i] == best]))
    return float(np.mean(values))


def test_weights_by_hand() -> None:
    # Of 4, best of 2: C(i - 1, 1) / 6.
    assert best_of_n_weights(4, 2).tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    assert best_of_n_weights(3, 1).tolist() == pytest.approx([1 / 3] * 3)
    assert best_of_n_weights(3, 3).tolist() == pytest.approx([0, 0, 1])


@pytest.mark.parametrize("n", [1, 2, 37, 500, 5000])
def test_weights_are_probabilities_for_many_samples(n: int) -> None:
    weights = best_of_n_weights(5000, n)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1, abs=1e-9)


def test_estimate_by_hand() -> None:
    # The proxy likes the third most: (1*5 + 2*(-6)) / 3 with pairs {1,2}->2nd, {1,3},{2,3}->3rd.
    assert best_of_n([0.1, 0.2, 0.9], [1.0, 5.0, -6.0], 2) == pytest.approx(-7 / 3)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), min_size=1, max_size=7),
    st.data(),
)
@settings(max_examples=50, deadline=None)
def test_estimate_equals_enumeration_with_ties(samples: list[tuple[int, int]], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(samples)))
    proxy, gold = [float(p) for p, _ in samples], [float(g) for _, g in samples]
    assert best_of_n(proxy, gold, n) == pytest.approx(_enumerated(proxy, gold, n))
    rng = np.random.default_rng(0)
    order = rng.permutation(len(samples))
    shuffled = best_of_n(np.array(proxy)[order], np.array(gold)[order], n)
    assert shuffled == pytest.approx(best_of_n(proxy, gold, n))


def test_ties_are_shared_among_those_that_tie() -> None:
    # Pairs: {1,2} tie -> 3; {1,3} -> 8; {2,3} -> 8.
    assert best_of_n([1.0, 1.0, 2.0], [2.0, 4.0, 8.0], 2) == pytest.approx(19 / 3)
    # All tied: no information, so the plain mean at every n.
    assert best_of_n([1.0] * 4, [1.0, 2.0, 3.0, 6.0], 3) == pytest.approx(3.0)


def test_estimate_agrees_with_simulation() -> None:
    rng = np.random.default_rng(1)
    proxy, gold = rng.normal(size=16), rng.normal(size=16)
    picks = [rng.choice(16, 5, replace=False) for _ in range(8_000)]
    drawn = np.array([gold[p[np.argmax(proxy[p])]] for p in picks])
    error = drawn.std() / math.sqrt(len(drawn))
    assert best_of_n(proxy, gold, 5) == pytest.approx(drawn.mean(), abs=4 * error)


def test_estimate_is_unbiased_for_fresh_samples() -> None:
    """Maximum of 4 uniforms is 4/5 on average, estimated from 12 samples a prompt."""
    proxy = np.random.default_rng(2).uniform(size=(1500, 12))
    estimates = np.array([best_of_n(row, row, 4) for row in proxy])
    assert estimates.mean() == pytest.approx(0.8, abs=4 * estimates.std() / math.sqrt(1500))


def test_curve_by_hand() -> None:
    proxy = [[1.0, 2.0], [2.0, 1.0, 0.0]]
    gold = [[0.0, 4.0], [0.0, 3.0, 6.0]]
    curve = best_of_n_curve(proxy, gold)
    assert curve.n == [1, 2]
    # Second prompt, pairs: {2,1}->0, {2,0}->0, {1,0}->3: mean 1.
    assert curve.gold_per_prompt.tolist() == [[2.0, 4.0], [3.0, pytest.approx(1.0)]]
    assert curve.gold == pytest.approx([2.5, 2.5])
    assert curve.proxy == pytest.approx([1.25, (2 + 5 / 3) / 2])
    assert curve.kl == [0.0, pytest.approx(math.log(2) - 0.5)]
    low, high = curve.gold_interval[0]
    assert low < 2.5 < high


def test_curve_of_a_proxy_that_is_gold_at_first_and_hacked_at_the_top() -> None:
    """Gold follows the proxy but for its top sample, which is worthless: gold rises, then falls; the proxy rises."""
    rng = np.random.default_rng(3)
    proxy = np.sort(rng.normal(size=(60, 32)), axis=1)
    gold = proxy.copy()
    gold[:, -1] = -10
    curve = best_of_n_curve(proxy, gold)
    assert curve.n == [1, 2, 4, 8, 16, 32]
    assert np.all(np.diff(curve.proxy) > 0)
    assert curve.gold[-1] == -10.0
    assert curve.gold_interval[-1] == (-10.0, -10.0)
    assert max(curve.gold) > curve.gold[-1]


def test_curve_of_one_prompt_has_no_interval() -> None:
    curve = best_of_n_curve([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]])
    assert curve.n == [1, 2, 3]
    assert curve.gold_interval is None


def test_kl_of_best_of_n() -> None:
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(64) == pytest.approx(4.158883 - 63 / 64, abs=1e-6)


@pytest.mark.parametrize(
    ("policy", "peak", "height"),
    # alpha 2, beta 0.5: peak 2 / 1 with 2 (2 - 1) = 2; exp(3) with exp(3) (2 - 1.5).
    [("bon", 2.0, 2.0), ("rl", math.exp(3), 0.5 * math.exp(3))],
)
def test_fit_recovers_a_known_curve(policy: str, peak: float, height: float) -> None:
    d = np.array([0.0, 0.5, 1.0, 1.7, 2.5, 4.0])
    fall = d if policy == "bon" else np.log(np.maximum(d, 1e-30))
    gains = d * (2.0 - 0.5 * fall)
    fit = fit_over_optimisation(d**2, 7 + gains, start=7.0, policy=policy)
    assert (fit.alpha, fit.beta) == pytest.approx((2.0, 0.5))
    assert (fit.peak, fit.height) == pytest.approx((peak, height))
    assert fit.residual == pytest.approx(0, abs=1e-9)
    assert fit.predict(d).tolist() == pytest.approx(gains.tolist())


def test_fit_of_a_curve_that_never_falls_has_no_peak() -> None:
    d = np.array([0.5, 1.0, 2.0])
    fit = fit_over_optimisation(d**2, d * (1 + 0.1 * d), start=0.0)
    assert (fit.alpha, fit.beta) == pytest.approx((1.0, -0.1))
    assert fit.peak is None
    assert fit.height is None


def test_fit_residual_is_the_root_mean_square() -> None:
    # Three points, two parameters; d = 1, 2, 3 with gains 0, 0, 1. Normal equations solved by hand:
    # columns (1,2,3), (-1,-4,-9): A'A = [[14,-36],[-36,98]], A'y = (3,-9); alpha = -30/76, beta = -18/76.
    fit = fit_over_optimisation([1.0, 4.0, 9.0], [0.0, 0.0, 1.0], start=0.0)
    assert (fit.alpha, fit.beta) == pytest.approx((-30 / 76, -18 / 76))
    residuals = np.array([-12, 12, -4]) / 76
    assert fit.residual == pytest.approx(math.sqrt((residuals**2).mean()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_of_n([1.0, 2.0], [1.0, 2.0], 3), "best of 3 needs at least 3 samples"),
        (lambda: best_of_n([1.0], [1.0], 0), "n >= 1"),
        (lambda: best_of_n([1.0, 2.0], [1.0], 1), "equal length"),
        (
            lambda: best_of_n_curve([[1.0, 2.0], [math.nan, 1.0]], [[1.0, 2.0]] * 2),
            "prompt 1: 1 of 2 samples",
        ),
        (lambda: best_of_n_curve([], []), "0 and 0 rows"),
        (lambda: fit_over_optimisation([0.0, 1.0, 1.0], [0.0, 1.0, 1.0], 0.0), "two different positive KLs"),
        (lambda: fit_over_optimisation([-1.0, 1.0, 2.0], [0.0, 1.0, 1.0], 0.0), "no negative one"),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(DiffalignError, match=message):
        call()
