"""Smooth latents: variation of a linear map by hand, double backward, running mean, interpolation, ISTD."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.smoothness import istd, running_mean, slerp, step_lengths, step_variation


def test_variation_of_a_linear_map_by_hand():
    """x0 = A e with A = [[1, 2], [0, 3]], delta = (1, 1), sigma = 0.5, n = 2: J^T d = (1, 5) * 0.5 / sqrt 2."""
    matrix = torch.tensor([[1.0, 2.0], [0.0, 3.0]], requires_grad=True)
    noise = torch.tensor([[0.3, -0.7]], requires_grad=True)
    found = step_variation(noise @ matrix.T, noise, torch.ones(1, 2), torch.tensor([0.5]))
    assert found.item() == pytest.approx(math.sqrt(26) * 0.5 / math.sqrt(2))
    # v = c |A^T 1|, so the gradient by A is c (A^T 1) / |A^T 1| in each row.
    found.sum().backward()
    c = 0.5 / math.sqrt(2) / math.sqrt(26)
    torch.testing.assert_close(matrix.grad, c * torch.tensor([[1.0, 5.0], [1.0, 5.0]]))


def test_variation_is_per_sample_and_differentiable_twice():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 6, dtype=torch.float64, generator=generator).requires_grad_()
    noise = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    delta = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)

    def variation(matrix, rows=slice(None)):
        start = noise[rows].clone().requires_grad_()
        return step_variation(torch.tanh(start @ matrix), start, delta[rows], sigma[rows])

    whole = variation(weight)
    for row in range(3):
        torch.testing.assert_close(variation(weight, slice(row, row + 1))[0], whole[row])
    step = 1e-4
    whole.sum().backward()
    change = torch.zeros_like(weight)
    change[2, 3] = step
    difference = (variation(weight.detach() + change) - variation(weight.detach() - change)).sum() / (
        2 * step
    )
    assert weight.grad[2, 3].item() == pytest.approx(difference.item(), rel=1e-2)


def test_a_flat_output_has_no_variation_and_a_finite_gradient():
    weight = torch.zeros(2, 2, requires_grad=True)
    noise = torch.ones(1, 2, requires_grad=True)
    found = step_variation(noise @ weight, noise, torch.ones(1, 2), torch.ones(1))
    found.sum().backward()
    assert found.item() == 0
    assert weight.grad.isfinite().all()


def test_half_precision_does_not_lose_small_noise_levels():
    """x0 = 3 e with sigma = 1e-6 in fp16: 3 |d| 1e-6 / sqrt n, though sigma d / sqrt n is below fp16's numbers."""
    noise = torch.zeros(1, 4, dtype=torch.float16, requires_grad=True)
    found = step_variation(3 * noise, noise, torch.ones(1, 4), torch.tensor([1e-6]))
    assert found.item() == pytest.approx(3e-6, rel=1e-3)


def test_running_mean_by_hand():
    """The first step is the mean; of two at decay 0.5 the newer one counts 0.5 / 0.75; of many 0.5."""
    first = running_mean(torch.tensor(7.0), torch.tensor(3.0), 0.5, torch.tensor(0.0))
    assert first.item() == 3
    second = running_mean(first, torch.tensor(6.0), 0.5, torch.tensor(1.0))
    assert second.item() == pytest.approx(5)
    assert running_mean(second, torch.tensor(3.0), 0.5, torch.tensor(99.0)).item() == pytest.approx(4)


def test_slerp_by_hand():
    """A third of the way of a right angle is 30 degrees."""
    found = slerp(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 1 / 3)
    torch.testing.assert_close(found, torch.tensor([[math.sqrt(3), 1.0]]))


def test_slerp_ends_keeps_norms_and_knows_parallels():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 3, 4, 8, 8, generator=generator)
    torch.testing.assert_close(slerp(x, y, 0.0), x)
    torch.testing.assert_close(slerp(x, y, 1.0), y)
    norms = slerp(x, y, 0.5).flatten(1).norm(dim=1)
    assert ((norms - 16).abs() < 1.5).all(), "half of the straight way would be 11"
    torch.testing.assert_close(slerp(x, 3 * x, 0.5), 2 * x)


def test_istd_by_hand():
    """Steps of .01, .01 and .04 on 3 x 2 x 2 values: distances sqrt 12 of these, whose deviation is .01 sqrt 2."""
    levels = torch.tensor([0.0, 0.01, 0.02, 0.06])
    pictures = levels.view(1, 4, 1, 1, 1).expand(1, 4, 3, 2, 2)
    assert step_lengths(pictures)[0].tolist() == pytest.approx(
        [math.sqrt(12) * d for d in (0.01, 0.01, 0.04)]
    )
    assert istd(pictures).item() == pytest.approx(math.sqrt(12) * 0.01 * math.sqrt(2), rel=1e-4)
    even = torch.linspace(0, 1, 5).view(1, 5, 1, 1, 1).expand(2, 5, 3, 2, 2)
    assert istd(even).tolist() == pytest.approx([0, 0], abs=1e-6)
