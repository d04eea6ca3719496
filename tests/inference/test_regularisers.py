"""Norm term and concentration term: values by hand, floors, gradients in float64."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.inference.regularisers import (
    CONCENTRATION_FLOOR,
    concentration_penalty,
    log_bounds,
    norm_penalty,
    norm_penalty_minimum,
)


def noise(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_norm_penalty_by_hand():
    """|e| = 5, d = 2: 12.5 - log 5; |e|^2 = 4, d = 4: 2 - 3 log 2."""
    assert norm_penalty(torch.tensor([[3.0, 4.0]])).item() == pytest.approx(12.5 - math.log(5))
    assert norm_penalty(torch.ones(1, 2, 2)).item() == pytest.approx(2 - 3 * math.log(2))


def test_norm_penalty_is_least_at_the_shell():
    """d - 1 = 16383: the minimum is there, its value as stated, and the radial derivative n - (d - 1) / n around it."""
    direction = torch.nn.functional.normalize(noise(1, 16384, dtype=torch.float64), dim=1)
    for norm in (math.sqrt(16383), 130.0, 120.0):
        point = (direction * norm).requires_grad_()
        value = norm_penalty(point)
        value.sum().backward()
        radial = (point.grad * direction).sum().item()
        assert radial == pytest.approx(norm - 16383 / norm, abs=1e-9)
        assert value.item() >= norm_penalty_minimum(16384) - 1e-8
    assert norm_penalty(direction * math.sqrt(16383)).item() == pytest.approx(
        norm_penalty_minimum(16384), abs=1e-8
    )


def test_the_sheet_s_radial_gradient():
    """0.01 (n - (d - 1) / n) for d = 16384: 0.040 at 130 and 0.230 at 140."""
    for norm, expected in ((130.0, 0.040), (140.0, 0.230)):
        point = torch.zeros(1, 16384, dtype=torch.float64)
        point[0, 0] = norm
        point.requires_grad_()
        (0.01 * norm_penalty(point)).sum().backward()
        assert point.grad[0, 0].item() == pytest.approx(expected, abs=5e-4)


def test_half_precision_does_not_overflow():
    """The sum of squares is 262144, above the greatest float16 of 65504."""
    value = norm_penalty(torch.full((1, 65536), 2.0, dtype=torch.float16))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(131072 - 65535 * math.log(512), rel=1e-6)


def test_log_bounds_by_hand():
    """Four vectors of two: all (2, 0). Mean square 4: p1 = -4 * 4 / 4 = -4. S^T S / n - I = diag(3, -1), D = 3:
    beyond = 2 - 1 - sqrt(1/2) = 0.29289, p2 = -2 * 0.08579 = -0.1716, so -ln 2."""
    flat = torch.tensor([[2.0, 0.0] * 4])
    assert log_bounds(flat, 2).item() == pytest.approx(-4 - math.log(2))
    # 16 such vectors: p1 = -16; beyond = 1 - sqrt(1/8) = 0.64645, p2 = -8 * 0.41789 = -3.3431.
    assert log_bounds(flat.repeat(1, 4), 2).item() == pytest.approx(-16 - 3.3431, abs=1e-4)


def test_vectors_without_a_mean():
    """(2, 0) and (-2, 0) in turn: the mean is 0 and its bound at -ln 2, with a gradient that is finite."""
    flat = torch.tensor([[2.0, 0.0, -2.0, 0.0] * 8], dtype=torch.float64, requires_grad=True)
    value = log_bounds(flat, 2)
    assert value.item() == pytest.approx(-math.log(2) - 8 * (1 - math.sqrt(1 / 8)) ** 2)
    value.sum().backward()
    assert flat.grad.isfinite().all()


def test_floor_and_no_gradient_for_typical_noise():
    flat = noise(1, 4, 64, 64, seed=12).requires_grad_()
    value = concentration_penalty(flat, permutations=0)
    assert value.item() == pytest.approx(2 * math.log(2))
    value.sum().backward()
    assert flat.grad.abs().max() == 0
    values = concentration_penalty(noise(6, 4, 64, 64), permutations=20)
    assert values.min() >= CONCENTRATION_FLOOR - 1e-5
    assert values.median() < CONCENTRATION_FLOOR + 0.3
    assert pytest.approx(2.7726, abs=1e-4) == CONCENTRATION_FLOOR


@pytest.mark.parametrize(
    ("scale", "shift", "low", "high"),
    [(1.05, 0.0, 4.0, 12.0), (1.1, 0.0, 28.0, 42.0), (1.0, 0.05, 6.0, 18.0), (0.9, 0.0, 15.0, 35.0)],
)
def test_values_of_the_research_notes(scale, shift, low, high):
    """6.9, 33 and 14.6 for one noise of (1, 4, 64, 64), noises differ by a few; too little variance counts as well."""
    found = concentration_penalty(scale * noise(6, 4, 64, 64) + shift, permutations=10)
    assert low < found.mean().item() < high


def test_more_noises_are_judged_more_strictly():
    """(51, 4, 64, 64) scaled by 1.02: 71, where one noise is at the floor."""
    whole = noise(1, 51, 4, 64, 64)
    assert concentration_penalty(1.02 * whole, permutations=2).item() == pytest.approx(71, abs=4)
    assert concentration_penalty(1.05 * whole, permutations=1).item() == pytest.approx(492, abs=15)
    assert concentration_penalty(1.02 * whole[:, 0], permutations=2).item() < 5


def test_structure_is_seen_in_the_given_order_and_hidden_by_permutations():
    """Neighbours that are equal: covariance of groups is far from I in order, elements are as Gaussian as before."""
    smooth = noise(1, 4096, seed=3).repeat_interleave(4, dim=1)
    assert concentration_penalty(smooth, permutations=0).item() > 500
    rest = concentration_penalty(smooth, permutations=10) - concentration_penalty(smooth, permutations=0)
    assert rest.item() < 30


def test_rows_do_not_touch_and_seeds_choose_permutations():
    noises = 1.1 * noise(3, 4, 16, 16)
    together = concentration_penalty(noises, 5, permutations=4)
    for row in range(3):
        alone = concentration_penalty(noises[row : row + 1], 5, permutations=4)
        torch.testing.assert_close(alone[0], together[row])
    assert not torch.equal(concentration_penalty(noises, 6, permutations=4), together)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_gradients_against_differences(shift):
    flat = (1.6 * noise(2, 96, dtype=torch.float64, seed=4) + shift).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: concentration_penalty(x, permutations=3), flat)
    assert torch.autograd.gradcheck(norm_penalty, flat)
    value = concentration_penalty(flat, permutations=3)
    assert (value > CONCENTRATION_FLOOR + 0.1).all(), (
        "the bounds must be active for the check to mean anything"
    )
