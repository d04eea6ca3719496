"""Frechet distance: closed forms, bias, streaming statistics, exchange of single elements."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.sets import (
    FrechetExchange,
    FrechetStats,
    Gaussian,
    frechet_distance,
    frechet_infinity,
    gaussian_distance,
)
from diffalign.rewards.sets.frechet import psd_factor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def replaced(features: Tensor, row: int, vector: Tensor) -> Tensor:
    copy = features.clone()
    copy[row] = vector
    return copy


def test_spherical_gaussians_have_the_known_distance():
    # |m|^2 + D (s - 1)^2 = 3 * 0.25 + 3 * 4.
    first = Gaussian(torch.zeros(3).double(), torch.eye(3).double())
    second = Gaussian(torch.full((3,), 0.5).double(), 3 * torch.eye(3).double())
    assert float(gaussian_distance(first, second)) == pytest.approx(12.75, abs=1e-12)


def test_covariances_that_do_not_commute():
    # diag(4, 1) and its quarter turn by 45 degrees; tr sqrt(S1 S2) = sqrt(tr(S1 S2) + 2 sqrt(det)) in two dimensions.
    s1 = torch.tensor([[4.0, 0.0], [0.0, 1.0]]).double()
    s2 = torch.tensor([[2.5, 1.5], [1.5, 2.5]]).double()
    zero = torch.zeros(2).double()
    distance = gaussian_distance(Gaussian(zero, psd_factor(s1)), Gaussian(zero, psd_factor(s2)))
    assert float(distance) == pytest.approx(10 - 2 * math.sqrt(12.5 + 2 * 4), abs=1e-12)


def test_two_points_against_two_points():
    # Means 0 and (0, 3), variances 2 along x and 8 along y: singular covariances that do not overlap.
    features = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    reference = torch.tensor([[0.0, 1.0], [0.0, 5.0]])
    assert float(frechet_distance(features, reference)) == pytest.approx(9 + 2 + 8, abs=1e-12)


@pytest.mark.parametrize("count", [400, 2000])
def test_sampling_bias_is_the_stated_one(count):
    reference = Gaussian(torch.zeros(8).double(), torch.eye(8).double())
    found = torch.stack([frechet_distance(normal(count, 8, seed=seed), reference) for seed in range(40)])
    expected = 8 / count + 8 * 9 / (4 * count)
    assert float(found.mean()) == pytest.approx(expected, rel=0.08)


def test_distance_to_a_shifted_and_scaled_gaussian_within_sampling_error():
    # N(0, I) against N(0.5, 4 I) in 4 dimensions: 4 * 0.25 + 4 * 1.
    reference = FrechetStats.of(2 * normal(20_000, 4, seed=1) + 0.5)
    assert float(frechet_distance(normal(20_000, 4, seed=2), reference)) == pytest.approx(5.0, abs=0.1)


def test_extrapolation_removes_the_bias():
    reference = Gaussian(torch.zeros(16).double(), torch.eye(16).double())
    features = normal(1500, 16, seed=3)
    line = frechet_infinity(features, reference, smallest=150)
    biased = float(frechet_distance(features, reference))
    assert biased > 0.04
    assert abs(line.value) < biased / 4
    assert line.slope == pytest.approx(16 + 16 * 17 / 4, rel=0.2)
    assert line.r_squared > 0.98


def test_fewer_samples_than_dimensions_agree_with_statistics():
    features, reference = normal(10, 30, seed=4), normal(12, 30, seed=5)
    through_covariances = gaussian_distance(
        FrechetStats.of(features).gaussian(), FrechetStats.of(reference).gaussian()
    )
    assert float(frechet_distance(features, reference)) == pytest.approx(float(through_covariances), rel=1e-6)
    assert float(frechet_distance(features, features)) == pytest.approx(0, abs=1e-11)


def test_gradient_agrees_with_differences():
    features, reference = normal(7, 4, seed=6).requires_grad_(), normal(9, 4, seed=7)
    assert torch.autograd.gradcheck(lambda x: frechet_distance(x, reference), features, fast_mode=True)


def test_gradient_exists_below_full_rank():
    features = normal(4, 9, seed=8).requires_grad_()
    frechet_distance(features, normal(6, 9, seed=9)).backward()
    step = 1e-6 * normal(4, 9, seed=10)
    ahead, back = (frechet_distance(features.detach() + s * step, normal(6, 9, seed=9)) for s in (1, -1))
    assert float((features.grad * step).sum()) == pytest.approx(float(ahead - back) / 2, rel=1e-4)


def test_statistics_stream_and_unstream(tmp_path):
    features = normal(50, 5, seed=11) + 1e4
    stats = FrechetStats.empty(5)
    for part in features.split([1, 20, 29]):
        stats.add(part)
    centred = features - features.mean(0)
    torch.testing.assert_close(stats.covariance, centred.T @ centred / 49, rtol=1e-9, atol=1e-9)
    stats.remove(features[30:])
    torch.testing.assert_close(stats.covariance, torch.cov(features[:30].T), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(stats.mean, features[:30].mean(0))
    stats.save(tmp_path / "s.safetensors")
    loaded = FrechetStats.load(tmp_path / "s.safetensors")
    assert loaded.count == 30
    assert torch.equal(loaded.scatter, stats.scatter)
    stats.remove(features[:30])
    assert stats.count == 0
    assert stats.mean.tolist() == pytest.approx([0] * 5, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(3, 24),
    d=st.integers(1, 24),
    reference_size=st.integers(2, 40),
    log_scale=st.integers(-6, 6),
    decay=st.sampled_from([0.0, -3.0, -8.0]),
    outlier=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
# A mode twelve decades below the largest, whose left vector rounding mixes with the vector of ones.
@example(n=4, d=4, reference_size=4, log_scale=0, decay=-8.0, outlier=1e-6, seed=0)
def test_swapped_equals_recomputed(n, d, reference_size, log_scale, decay, outlier, seed):
    widths = 10**log_scale * torch.logspace(0, decay, d, dtype=torch.float64)
    features, reference = normal(n, d, seed=seed) * widths, normal(reference_size, d, seed=seed + 1) * widths
    candidates = normal(4, d, seed=seed + 2) * widths * outlier
    candidates[0] = features[0]  # a copy of another element
    candidates[1] = reference[0]
    rows = torch.arange(4) % n
    exchange = FrechetExchange(features, reference)
    found = exchange.swapped_pairs(rows, candidates)
    changed = [replaced(features, int(row), v) for row, v in zip(rows, candidates, strict=True)]
    for value, new in zip(found, changed, strict=True):
        scale = float(new.var(0).sum() + reference.var(0).sum())
        assert float(value) == pytest.approx(float(frechet_distance(new, reference)), abs=1e-7 * scale)
    torch.testing.assert_close(exchange.swapped(1, candidates)[1], found[1])


@pytest.mark.parametrize(("n", "d"), [(256, 256), (40, 256), (256, 40)])
def test_swapped_is_exact_to_six_digits_absolutely(n, d):
    features, reference = normal(n, d), normal(400, d, seed=1) + 0.1
    exchange, candidate = FrechetExchange(features, reference), normal(1, d, seed=2)
    expected = float(frechet_distance(replaced(features, 7, candidate[0]), reference))
    assert float(exchange.swapped(7, candidate)) == pytest.approx(expected, abs=1e-6)


def test_many_swaps_do_not_drift():
    features, reference = normal(30, 12), normal(100, 12, seed=1)
    exchange = FrechetExchange(features, reference)
    for number in range(20):
        vector = normal(12, seed=50 + number)
        foreseen = float(exchange.swapped(number, vector[None]))
        features = replaced(features, number, vector)
        assert exchange.swap(number, vector) == pytest.approx(foreseen, abs=1e-8)
    assert exchange.distance == pytest.approx(float(frechet_distance(features, reference)), abs=1e-12)


def test_equal_elements_have_no_spread():
    # One element leaves five copies of the origin for (6, 0): mean 1, variance 6 along x; the reference's is 8 along x.
    exchange = FrechetExchange(torch.zeros(6, 2), torch.tensor([[-2.0, 0.0], [2.0, 0.0]]))
    assert exchange.distance == pytest.approx(8.0)
    found = exchange.swapped(3, torch.tensor([[6.0, 0.0], [0.0, 0.0]]))
    assert found.tolist() == pytest.approx([1 + 6 + 8 - 2 * math.sqrt(48), 8.0], abs=1e-6)


def test_a_reference_without_spread():
    # Means 2, 1 and 3 against 1; variances 3, 0 and 12.
    exchange = FrechetExchange(torch.tensor([[1.0], [1.0], [4.0]]), torch.ones(4, 1))
    assert exchange.distance == pytest.approx(1 + 3)
    assert exchange.swapped(2, torch.tensor([[1.0], [7.0]])).tolist() == pytest.approx([0, 4 + 12])


def test_bad_input_is_named(tmp_path):
    with pytest.raises(DiffalignError, match="features have 1 rows; this needs at least 2"):
        frechet_distance(normal(1, 3), normal(4, 3))
    with pytest.raises(DiffalignError, match="features have 4 numbers, the reference 3"):
        frechet_distance(normal(5, 4), normal(4, 3))
    with pytest.raises(DiffalignError, match="NaN or infinity in 1 of 2 rows"):
        frechet_distance(torch.tensor([[0.0, math.nan], [1.0, 2.0]]), normal(4, 2))
    with pytest.raises(DiffalignError, match=r"rows 5 to 5 were to be replaced; the set has 5 rows"):
        FrechetExchange(normal(5, 3), normal(4, 3)).swapped(5, normal(1, 3))
    with pytest.raises(DiffalignError, match=r"candidates of shape \(1, 2\)"):
        FrechetExchange(normal(5, 3), normal(4, 3)).swapped(0, normal(1, 2))
    with pytest.raises(DiffalignError, match="expected 2 <= smallest < 9"):
        frechet_infinity(normal(9, 3), normal(4, 3), smallest=9)
    with pytest.raises(DiffalignError, match="needs at least 2 rows; these statistics have 0"):
        FrechetStats.empty(3).gaussian()
    with pytest.raises(DiffalignError, match="3 rows were to be removed from statistics of 2"):
        FrechetStats.of(normal(2, 4)).remove(normal(3, 4))
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(DiffalignError, match="holds no feature statistics"):
        FrechetStats.load(tmp_path / "x.safetensors")
