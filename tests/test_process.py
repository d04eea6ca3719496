"""Round trips and levels of the forward processes."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.process import Process

SDXL = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


def process_of(prediction: str) -> Process:
    if prediction == "flow":
        return Process.from_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    return Process.from_scheduler(SDXL | {"prediction_type": prediction})


def draw(seed: int, process: Process) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 5, 4, 3, 3, generator=generator)
    uniform = 0.02 + 0.96 * torch.rand(5, generator=generator)
    return x0, eps, process.times(uniform)


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "flow"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_target_gives_back_x0_and_eps(prediction, seed):
    process = process_of(prediction)
    x0, eps, t = draw(seed, process)
    x_t, target = process.noise(x0, eps, t), process.target(x0, eps, t)
    assert torch.allclose(process.to_x0(target, x_t, t), x0, atol=2e-4)
    assert torch.allclose(process.to_eps(target, x_t, t), eps, atol=2e-4)
    assert torch.allclose(process.from_x0(x0, x_t, t), target, atol=2e-4)


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "flow"])
def test_x0_and_eps_of_any_output_recompose_x_t(prediction):
    process = process_of(prediction)
    x_t, pred, t = draw(7, process)
    x0, eps = process.to_x0(pred, x_t, t), process.to_eps(pred, x_t, t)
    assert torch.allclose(process.noise(x0, eps, t), x_t, atol=2e-3)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_levels_are_those_of_the_diffusers_scheduler(schedule, zero_snr):
    config = SDXL | {"beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr}
    scheduler = DDPMScheduler(**config)
    x0, eps, _ = draw(3, process_of("epsilon"))
    t = torch.tensor([0, 1, 250, 998, 999])
    ours = Process.from_scheduler(config).noise(x0, eps, t)
    assert torch.allclose(ours, scheduler.add_noise(x0, eps, t), atol=2e-4)


def test_v_target_is_that_of_the_diffusers_scheduler():
    scheduler = DDPMScheduler(**SDXL)
    process = process_of("v_prediction")
    x0, eps, t = draw(5, process)
    assert torch.allclose(process.target(x0, eps, t), scheduler.get_velocity(x0, eps, t), atol=1e-5)


def test_variance_is_preserved_and_flow_is_a_line():
    alpha, sigma = process_of("epsilon").alpha_sigma(torch.tensor([0, 500, 999]))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(3), atol=1e-6)
    alpha, sigma = process_of("flow").alpha_sigma(torch.tensor([0.0, 0.25, 1.0]))
    assert alpha.tolist() == [1.0, 0.75, 0.0]
    assert sigma.tolist() == [0.0, 0.25, 1.0]


def test_hand_worked_two_step_schedule():
    process = Process.from_scheduler({"trained_betas": [0.36, 0.75], "num_train_timesteps": 2})
    x0, eps, t = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [2.0]]), torch.tensor([0, 1])
    # alpha^2 is 0.64 and 0.64 * 0.25 = 0.16, so (alpha, sigma) is (0.8, 0.6) and (0.4, sqrt 0.84).
    assert torch.allclose(process.noise(x0, eps, t), torch.tensor([[2.0], [0.4 + 2 * 0.84**0.5]]))
    assert torch.allclose(process.snr(t), torch.tensor([0.64 / 0.36, 0.16 / 0.84]))


def test_times_cover_the_schedule_once_when_stratified():
    process = process_of("epsilon")
    t = process.times((torch.arange(1000) + 0.5) / 1000)
    assert sorted(t.tolist()) == list(range(1000))
    assert process.times(torch.tensor([0.0, 0.9999999])).tolist() == [0, 999]
    assert process_of("flow").model_time(torch.tensor([0.25])).item() == 250.0


def test_logit_normal_times_prefer_the_middle():
    t = process_of("flow").times(torch.linspace(0.001, 0.999, 999), "logit_normal")
    assert t[499].item() == pytest.approx(0.5, abs=1e-6)
    # The quartiles of a standard normal are -+0.6745; sigmoid(0.6745) = 0.6625.
    assert t[749].item() == pytest.approx(0.6625, abs=2e-3)


@pytest.mark.parametrize(
    ("config", "named"),
    [({"prediction_type": "noise"}, "noise"), ({"beta_schedule": "sigmoidal"}, "sigmoidal")],
)
def test_unknown_configs_are_refused_by_name(config, named):
    with pytest.raises(ValueError, match=named):
        Process.from_scheduler(SDXL | config)


def test_unknown_time_weighting_is_refused():
    with pytest.raises(ValueError, match="cosmap"):
        process_of("flow").times(torch.rand(2), "cosmap")
