"""Kernel distances, nearest neighbours, Vendi scores and diversity, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.sets import (
    MMDExchange,
    VendiExchange,
    cmmd,
    diversity_per_prompt,
    gaussian_kernel,
    kid,
    kid_subsets,
    mmd2,
    neighbour_metrics,
    pairwise_distance,
    polynomial_kernel,
    vendi_from_kernel,
    vendi_score,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def replaced(features: Tensor, row: int, vector: Tensor) -> Tensor:
    copy = features.clone()
    copy[row] = vector
    return copy


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


# Kernels


def test_kid_of_literal_points():
    # D = 1, kernel (xy + 1)^3. Within {0, 1}: 1; within {1, 2}: 27; across: 1, 1, 8, 27.
    assert float(kid(column(0, 1), column(1, 2))) == pytest.approx(1 + 27 - 2 * 37 / 4)


def test_kid_has_expectation_zero_and_the_biased_form_has_not():
    pairs = [(normal(20, 3, seed=2 * i), normal(20, 3, seed=2 * i + 1)) for i in range(400)]
    unbiased = torch.stack([kid(x, y) for x, y in pairs])
    assert abs(float(unbiased.mean())) < 3 * float(unbiased.std()) / 20
    assert (unbiased < 0).any()
    biased = torch.stack([mmd2(x, y, polynomial_kernel, unbiased=False) for x, y in pairs])
    assert (biased >= -1e-12).all()
    assert float(biased.mean()) > 0.2


def test_gaussian_kernel_meets_the_closed_form_of_gaussians():
    # x ~ N(0, I), y ~ N(1, 4 I), D = 2, sigma = 1, v the sum of two variances:
    # E k = (1 / (1 + v))^(D/2) exp(-|m|^2 / (2 (1 + v))).
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return gaussian_kernel(x, y, sigma=1.0)

    expected = 1 / 3 + 1 / 9 - 2 * math.exp(-2 / 12) / 6
    found = mmd2(normal(1000, 2), 2 * normal(1000, 2, seed=1) + 1, kernel, unbiased=True)
    assert float(found) == pytest.approx(expected, abs=0.015)


def test_cmmd_of_literal_points():
    # Unit vectors at a right angle, whatever their length: 1000 (1 + 1 - 2 exp(-2 / 200)).
    assert float(cmmd(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]]))) == pytest.approx(
        19.900332, abs=1e-6
    )
    assert float(cmmd(normal(5, 3), normal(5, 3))) == pytest.approx(0, abs=1e-9)


def test_subsets_of_everything_are_the_whole():
    x, y = normal(8, 3), normal(8, 3, seed=1)
    whole = kid_subsets(x, y, subsets=3, size=8)
    assert whole.mean == pytest.approx(float(kid(x, y)))
    assert whole.std == pytest.approx(0, abs=1e-12)
    assert kid_subsets(x, y, subsets=5, size=4).std > 0
    with pytest.raises(DiffalignError, match="expected 2 <= size <= 8"):
        kid_subsets(x, y)


@pytest.mark.parametrize(("kernel", "unbiased"), [(polynomial_kernel, True), (gaussian_kernel, False)])
def test_mmd_exchange_equals_recomputation(kernel, unbiased):
    features, reference, candidates = normal(9, 4), normal(7, 4, seed=1), normal(3, 4, seed=2)
    exchange = MMDExchange(features, reference, kernel, unbiased)
    rows = torch.tensor([0, 8, 4])
    found = exchange.swapped_pairs(rows, candidates)
    for row, candidate, value in zip(rows, candidates, found, strict=True):
        expected = mmd2(replaced(features, int(row), candidate), reference, kernel, unbiased)
        assert float(value) == pytest.approx(float(expected), abs=1e-12)
    assert exchange.swap(8, candidates[1]) == pytest.approx(float(found[1]), abs=1e-12)
    assert exchange.distance == pytest.approx(float(found[1]), abs=1e-12)
    assert float(exchange.swapped(8, features[8:])) == pytest.approx(
        float(mmd2(features, reference, kernel, unbiased)), abs=1e-12
    )


# Neighbours


def test_neighbours_of_literal_points():
    # k = 1. Reference radii: 1, 1, 2 around 0, 1, 3. Features 0.5, 1.5, 9 have radii 1, 1, 7.5.
    found = neighbour_metrics(column(0.5, 1.5, 9), column(0, 1, 3), k=1)
    assert found.precision == pytest.approx(2 / 3)
    # 0 and 1 are near 0.5; 3 is 6 from 9, inside of 7.5.
    assert found.recall == 1.0
    # 0.5 lies in two balls, 1.5 in two (1 and, at 1.5, 3's), 9 in none.
    assert found.density == pytest.approx(4 / 3)
    assert found.coverage == 1.0


def test_mode_collapse_lowers_recall_and_coverage_not_precision():
    reference = torch.cat([normal(100, 2), normal(100, 2, seed=1) + 50])
    found = neighbour_metrics(normal(200, 2, seed=2) * 0.5, reference)
    assert found.precision > 0.95
    assert found.recall < 0.55
    assert found.coverage < 0.55


def test_chunks_change_nothing(monkeypatch):
    x, y = normal(30, 3), normal(25, 3, seed=1)
    whole = neighbour_metrics(x, y)
    monkeypatch.setattr("diffalign.rewards.sets.precision_recall.CHUNK", 7)
    assert neighbour_metrics(x, y) == whole
    with pytest.raises(DiffalignError, match="expected 1 <= k < 25"):
        neighbour_metrics(x, y, k=25)


# Vendi


@pytest.mark.parametrize("order", [0.5, 1, 2, 3.5, math.inf])
def test_vendi_counts_orthogonal_and_equal_elements(order):
    assert float(vendi_score(3 * torch.eye(5), order)) == pytest.approx(5)
    assert float(vendi_score(torch.ones(5, 3), order)) == pytest.approx(1)
    assert float(vendi_score(torch.eye(3).repeat(4, 1), order)) == pytest.approx(3)


def test_vendi_of_unequal_groups_by_hand():
    # Three of one kind and one of another: eigenvalues 3/4 and 1/4.
    features = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    assert float(vendi_score(features)) == pytest.approx(
        math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    )
    assert float(vendi_score(features, 2)) == pytest.approx(1.6)
    assert float(vendi_score(features, 0.5)) == pytest.approx((math.sqrt(0.75) + 0.5) ** 2)
    assert float(vendi_score(features, math.inf)) == pytest.approx(4 / 3)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12),
    d=st.integers(1, 12),
    order=st.sampled_from([0.5, 1, 2, math.inf]),
    seed=st.integers(0, 99),
)
def test_vendi_from_features_equals_vendi_from_their_kernel(n, d, order, seed):
    rows = torch.nn.functional.normalize(normal(n, d, seed=seed))
    score = float(vendi_score(rows, order))
    assert 1 - 1e-9 <= score <= n + 1e-9
    assert float(vendi_from_kernel(rows @ rows.T, order)) == pytest.approx(score, rel=1e-5)


def test_vendi_gradient_agrees_with_differences_also_at_duplicates():
    features = normal(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(vendi_score, features)
    twins = torch.tensor([[1.0, 0], [1, 0]], dtype=torch.float64, requires_grad=True)
    vendi_score(twins).backward()
    assert torch.isfinite(twins.grad).all()


def test_vendi_refuses_what_is_no_kernel():
    with pytest.raises(DiffalignError, match="not symmetric with ones"):
        vendi_from_kernel(2 * torch.eye(3))
    with pytest.raises(DiffalignError, match="eigenvalue -1 below 0"):
        vendi_from_kernel(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))
    with pytest.raises(DiffalignError, match="order 0 of a Vendi score"):
        vendi_score(torch.eye(2), 0)
    with pytest.raises(DiffalignError, match="features have 1 rows of zeros"):
        vendi_score(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 24),
    d=st.integers(1, 24),
    decay=st.sampled_from([0.0, -3.0, -8.0]),
    offset=st.sampled_from([0.0, 10.0]),
    order=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_vendi_exchange_equals_recomputation(n, d, decay, offset, order, seed):
    widths = torch.logspace(0, decay, d, dtype=torch.float64)
    features, candidates = (
        (normal(n, d, seed=seed) + offset) * widths,
        (normal(3, d, seed=seed + 1) + offset) * widths,
    )
    candidates[0] = -features[-1]
    rows = torch.arange(3) % n
    exchange = VendiExchange(features, order)
    assert exchange.score == pytest.approx(float(vendi_score(features, order)), abs=1e-9)
    found = exchange.swapped_pairs(rows, candidates)
    for row, candidate, value in zip(rows, candidates, found, strict=True):
        expected = vendi_score(replaced(features, int(row), candidate), order)
        assert float(value) == pytest.approx(float(expected), abs=1e-8)
    assert exchange.swap(1, candidates[1]) == pytest.approx(float(found[1]), abs=1e-8)
    torch.testing.assert_close(
        exchange.swapped(0, candidates)[2],
        vendi_score(replaced(exchange.features, 0, candidates[2]), order),
        atol=1e-8,
        rtol=0,
    )


def test_vendi_exchange_removes_a_duplicate():
    # Four orthogonal elements and a twin; the twin's place goes to a fifth direction.
    features = torch.cat([torch.eye(4, 6), torch.eye(4, 6)[:1]])
    exchange = VendiExchange(features)
    found = exchange.swapped(4, torch.eye(6)[[0, 5]])
    assert found.tolist() == pytest.approx([exchange.score, 5.0], abs=1e-9)
    with pytest.raises(DiffalignError, match="order 3; expected 1 or 2"):
        VendiExchange(features, 3)


# Diversity


def test_pairwise_distance_by_hand():
    # Cosines 0, -1, 0 between (1, 0), (0, 2), (-3, 0): distances 1, 2, 1.
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert float(pairwise_distance(features)) == pytest.approx(4 / 3)
    with pytest.raises(DiffalignError, match="at least 2 pictures"):
        pairwise_distance(features[:1])


def test_diversity_of_each_prompt():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 2.0], [5.0, 5.0]])
    found = diversity_per_prompt(features, ["a", "a", "b", "b", "c"])
    assert {prompt: float(value) for prompt, value in found.items()} == pytest.approx({"a": 1.0, "b": 0.0})
    with pytest.raises(DiffalignError, match="none of 2 prompts has two pictures"):
        diversity_per_prompt(features[:2], ["a", "b"])
    with pytest.raises(DiffalignError, match="5 rows of features for 1 prompts"):
        diversity_per_prompt(features, ["a"])
