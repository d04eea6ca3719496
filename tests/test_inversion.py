"""DDIM inversion where the answer is known: Gaussian data, whose probability-flow path is a scaling."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from diffalign.conditioning import Conditioning
from diffalign.inversion import Inverter, implied_noise, step_deviation
from diffalign.process import Process

SPREAD = 1.7
ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square(), 0)
TOLD = Conditioning(torch.zeros(3, 1, 1))


class GaussianModel:
    """Predicts exactly for data N(0, SPREAD^2): E[eps | x_t] = sigma x_t / (alpha^2 SPREAD^2 + sigma^2)."""

    def __init__(self, prediction: str):
        self.process = Process(prediction, None if prediction == "flow" else ABAR)
        self.asked: list[tuple[int, bool]] = []

    def variance(self, t):
        alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in self.process.alpha_sigma(t))
        return alpha, sigma, (alpha * SPREAD) ** 2 + sigma**2

    def predict(self, x_t, t, cond, reference=False):
        assert len(cond) == len(x_t) == len(t)
        self.asked.append((len(t), reference))
        alpha, sigma, variance = self.variance(t)
        return self.process.target(alpha * SPREAD**2 * x_t / variance, sigma * x_t / variance, t)

    @contextmanager
    def inference(self):
        with torch.no_grad():
            yield


def start_of(model, shares=(0.15, 0.5, 0.93)):
    x0 = SPREAD * torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(shares)
    return x0, t if model.process.is_flow else (t * 1000).long()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_inversion_follows_the_exact_path_of_gaussian_data(prediction):
    model = GaussianModel(prediction)
    x0, t = start_of(model)
    inverted = Inverter(steps=500)(model, x0, t, TOLD)
    exact = x0 * model.variance(t)[2].sqrt() / SPREAD
    torch.testing.assert_close(inverted, exact, rtol=0.02, atol=0.01)
    noise = implied_noise(model.process, x0, inverted, t)
    torch.testing.assert_close(model.process.noise(x0, noise, t), inverted)


def test_refinements_follow_the_path_better_with_few_steps():
    model = GaussianModel("epsilon")
    x0, t = start_of(model)
    exact = x0 * model.variance(t)[2].sqrt() / SPREAD
    errors = [(Inverter(5, refinements=r)(model, x0, t, TOLD) - exact).abs().max() for r in (0, 1)]
    assert errors[1] < errors[0]


def test_every_row_takes_its_own_number_of_steps_and_does_not_see_the_others():
    """Times 150, 500, 930 of 1000 in ten steps: 2, 5 and 10 steps; forwards hold only the rows still on their way."""
    model = GaussianModel("epsilon")
    x0, t = start_of(model)
    inverter = Inverter(steps=10)
    together = inverter(model, x0, t, TOLD)
    assert [rows for rows, _ in model.asked] == [1] * 5 + [2] * 3 + [3] * 2
    for row in range(3):
        alone = inverter(model, x0[row : row + 1], t[row : row + 1], TOLD.select([row]))
        torch.testing.assert_close(alone[0], together[row])


def test_one_step_ends_at_the_models_own_noise():
    model = GaussianModel("epsilon")
    x0 = SPREAD * torch.ones(1, 4, 3, 3)
    for time in (0, 40):
        t = torch.tensor([time])
        z = Inverter(steps=10)(model, x0, t, TOLD.select([0]))
        noise = implied_noise(model.process, x0, z, t)
        torch.testing.assert_close(noise, model.predict(x0, t, TOLD.select([0])), rtol=1e-3, atol=1e-3)


def test_steps_by_hand():
    """t = 150 in steps of 100: 0 to 50 from the clean latent, then 50 to 150."""
    model = GaussianModel("epsilon")
    x0 = torch.full((1, 1, 1, 1), 0.8)
    z = Inverter(steps=10)(model, x0, torch.tensor([150]), TOLD.select([0]))

    def eps(x, t):
        return model.predict(x, torch.tensor([t]), TOLD.select([0]))

    a50, a150 = ABAR[50].sqrt().item(), ABAR[150].sqrt().item()
    s50, s150 = (1 - ABAR[50]).sqrt().item(), (1 - ABAR[150]).sqrt().item()
    first = a50 * x0 + s50 * eps(x0, 50)
    direction = eps(first, 150)
    second = a150 * (first - s50 * direction) / a50 + s150 * direction
    torch.testing.assert_close(z, second)


def test_noise_has_the_deviation_of_a_ddim_step_and_must_be_given():
    # DDIM, eq. 16: (1 - abar_low) / (1 - abar_high) (1 - abar_high / abar_low).
    low, high = torch.tensor([100]), torch.tensor([200])
    expected = ((1 - ABAR[100]) / (1 - ABAR[200]) * (1 - ABAR[200] / ABAR[100])).sqrt().item()
    assert step_deviation(Process("epsilon", ABAR), low, high).item() == pytest.approx(expected, rel=1e-4)
    model = GaussianModel("epsilon")
    x0, t = start_of(model)
    with pytest.raises(ValueError, match="needs noise"):
        Inverter(eta=0.1)(model, x0, t, TOLD)
    noise = torch.randn(10, *x0.shape, generator=torch.Generator().manual_seed(1))
    moved = Inverter(eta=0.1)(model, x0, t, TOLD, noise) - Inverter()(model, x0, t, TOLD)
    assert 0 < moved.abs().mean() < 0.2


def test_the_frozen_model_is_followed_when_asked():
    model = GaussianModel("epsilon")
    x0, t = start_of(model)
    Inverter(reference=True)(model, x0, t, TOLD)
    assert all(reference for _, reference in model.asked)
