"""Kernels against the diffusers schedulers, against the laws of Gaussian data, and their log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from torch.distributions import Normal, kl_divergence

from diffalign.backbones.schedule import patch_step_options
from diffalign.errors import DiffalignError
from diffalign.process import Process
from diffalign.sampling.schedules import CLEAN, Schedule, sampling_schedule
from diffalign.sampling.transition import Kernel, Transition, coefficients, transition

SD = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
LCM = {**SD, "_class_name": "LCMScheduler"}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(time: float | int, count: int = 2) -> torch.Tensor:
    return torch.tensor([time] * count)


def step_of(kernel: Kernel, process: Process, schedule: Schedule, step: int, x, pred) -> Transition:
    return transition(process, kernel, x, *schedule.span(step, len(x)), pred)


# Schedules


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("to_one", [False, True])
def test_discrete_times_are_those_of_ddim(steps, to_one):
    config = {**SD, "set_alpha_to_one": to_one}
    times = sampling_schedule(config, {}, Process.from_scheduler(config), steps).times
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    assert times[:-1].tolist() == scheduler.timesteps.tolist()
    assert times[-1] == (CLEAN if to_one else 0)


def test_flow_and_consistency_times():
    # Shift 3 of 1, 0.5 (and the scheduler's last level): 3 s / (1 + 2 s).
    times = sampling_schedule(FLOW, {}, Process.from_scheduler(FLOW), 2).times
    assert times[0] == 1
    assert times[-1] == 0
    times = sampling_schedule(LCM, {}, Process.from_scheduler(LCM), 4).times
    assert times.tolist() == [999, 759, 499, 259, CLEAN]


def test_the_shift_of_a_flow_may_depend_on_the_size():
    config = {**FLOW, "shift": 1.0, "use_dynamic_shifting": True}
    options = patch_step_options(config, 2, (16, 64, 64))
    times = sampling_schedule(config, options, Process.from_scheduler(config), 2).times
    # 64 x 64 latents are 1024 patches: mu is 0.5 + 0.65 * 768 / 3840 = 0.63; exp(mu) / (exp(mu) + 1 / s - 1) at 0.5.
    assert times.tolist() == pytest.approx([1.0, math.exp(0.63) / (math.exp(0.63) + 1), 0.0])


def test_too_many_steps_are_refused():
    with pytest.raises(DiffalignError, match="cannot take 51 steps"):
        sampling_schedule(LCM, {}, Process.from_scheduler(LCM), 51)


# Against diffusers


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim_is_the_step_of_diffusers(prediction, eta, to_one):
    config = {**SD, "prediction_type": prediction, "set_alpha_to_one": to_one}
    process, scheduler = Process.from_scheduler(config), DDIMScheduler.from_config(config)
    scheduler.set_timesteps(10)
    schedule = sampling_schedule(config, {}, process, 10)
    x, pred, noise = (randn(2, 4, 3, 3, seed=s) for s in range(3))
    for step, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(pred, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        ours = step_of(Kernel("ddim", eta), process, schedule, step, x, pred)
        # Both round where t is small and the noise is (x - alpha x0) / sigma.
        torch.testing.assert_close(ours.sample(noise), theirs, atol=1e-4, rtol=1e-5)
        before = int(t) - scheduler.config.num_train_timesteps // 10
        variance = float(scheduler._get_variance(int(t), before))
        assert ours.std.tolist() == pytest.approx([eta * math.sqrt(max(variance, 0))] * 2, rel=1e-4, abs=1e-7)


def test_ancestral_is_the_ddpm_posterior():
    process, scheduler = Process.from_scheduler(SD), DDPMScheduler.from_config(SD)
    scheduler.set_timesteps(20)
    x, pred = randn(2, 4, 3, 3, dtype=torch.float64), randn(2, 4, 3, 3, seed=1, dtype=torch.float64)
    for t in (951, 501, 51):
        ours = transition(process, Kernel("ancestral"), x, rows(t), rows(t - 50), pred)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        theirs = scheduler.step(pred, t, x, generator=torch.Generator().manual_seed(5)).prev_sample
        torch.testing.assert_close(ours.sample(noise), theirs, atol=1e-5, rtol=1e-5)


def test_lcm_is_the_step_of_diffusers(monkeypatch):
    process, scheduler = Process.from_scheduler(LCM), LCMScheduler.from_config(LCM)
    scheduler.set_timesteps(4)
    schedule = sampling_schedule(LCM, {}, process, 4)
    x, pred, noise = (randn(2, 4, 3, 3, seed=s) for s in range(3))
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: noise)
    for step, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(pred, t, x).prev_sample
        ours = step_of(Kernel("lcm"), process, schedule, step, x, pred)
        torch.testing.assert_close(ours.sample(noise), theirs, atol=2e-5, rtol=1e-5)
    # The last step gives the denoised latents, without noise.
    assert ours.std.tolist() == [0, 0]


@pytest.mark.parametrize(
    "kernel", [Kernel("flow_sde", 0), Kernel("dance", 0), Kernel("cps", 0), Kernel("ddim", 0)]
)
def test_flow_kernels_without_noise_are_the_euler_step_of_diffusers(kernel):
    process, scheduler = Process.from_scheduler(FLOW), FlowMatchEulerDiscreteScheduler.from_config(FLOW)
    scheduler.set_timesteps(5)
    schedule = sampling_schedule(FLOW, {}, process, 5)
    x, pred = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    for step, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(pred, t, x).prev_sample
        ours = step_of(kernel, process, schedule, step, x, pred)
        torch.testing.assert_close(ours.mean, theirs, atol=2e-6, rtol=1e-6)
        assert ours.std.tolist() == [0, 0]


def test_flow_sde_is_the_formula_of_flow_grpo():
    """`x (1 + s^2 dt / 2t) + v (1 + s^2 (1 - t) / 2t) dt`, s = a sqrt(t / (1 - t)): by hand at t 0.8 to 0.5, a 0.7."""
    process = Process.from_scheduler(FLOW)
    x, v = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    t, t_prev = torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    step = transition(process, Kernel("flow_sde"), x, t, t_prev, v)
    # s^2 = 0.49 * 4 = 1.96; x part: 2 (1 - 1.96 * 0.3 / 1.6) = 1.265; v part: 0.5 (1 + 1.96 * 0.2 / 1.6) (-0.3)
    assert step.mean.item() == pytest.approx(1.265 - 0.18675, abs=1e-7)
    assert step.std.item() == pytest.approx(1.4 * math.sqrt(0.3), abs=1e-7)
    # At pure noise the release puts the next level into 1 - t: s^2 = 0.49 / 0.2.
    first = coefficients(
        process, Kernel("flow_sde"), torch.tensor([1.0]).double(), torch.tensor([0.8]).double()
    )
    assert first.std.item() == pytest.approx(math.sqrt(0.49 / 0.2 * 0.2), abs=1e-7)


def test_dance_and_cps_are_their_formulas():
    process = Process.from_scheduler(FLOW)
    x, v = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    t, t_prev = torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    dance = transition(process, Kernel("dance"), x, t, t_prev, v)
    # x0 = 2 - 0.4 = 1.6; score = -(2 - 1.6 * 0.2) / 0.64 = -2.625; mean = 2 - 0.15 + 0.5 * 0.09 * -2.625 * 0.3
    assert dance.mean.item() == pytest.approx(1.85 - 0.0354375, abs=1e-6)
    assert dance.std.item() == pytest.approx(0.3 * math.sqrt(0.3), abs=1e-9)
    cps = transition(process, Kernel("cps"), x, t, t_prev, v)
    # eps = 2 + 0.2 * 0.5 = 2.1; sin(0.4 pi) = 0.951057, cos = 0.309017
    assert cps.std.item() == pytest.approx(0.5 * 0.9510565163, abs=1e-9)
    assert cps.mean.item() == pytest.approx(0.8 + 2.1 * 0.5 * 0.3090169944, abs=1e-6)


# Laws


def gaussian_end(
    process: Process, kernel: Kernel, times: torch.Tensor, mean: float, std: float
) -> tuple[float, float]:
    """Mean and deviation after a whole rollout on data N(mean, std^2) with the exact network, without sampling.

    Everything is linear, so a step is known from what it does to 0 and to 1.
    """
    first = process.alpha_sigma(times[:1])
    m, variance = mean * float(first[0]), (std * float(first[0])) ** 2 + float(first[1]) ** 2
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for step in range(len(times) - 1):
        t, t_prev = times[step].expand(2), times[step + 1].expand(2)
        alpha, sigma = (level.double()[:, None] for level in process.alpha_sigma(t))
        total = (alpha * std).square() + sigma.square()
        x0 = mean + alpha * std**2 / total * (probe - alpha * mean)
        out = transition(process, kernel, probe, t, t_prev, process.from_x0(x0, probe, t))
        low, slope = out.mean[0].item(), (out.mean[1] - out.mean[0]).item()
        m, variance = low + slope * m, slope**2 * variance + out.std[0].item() ** 2
    return m, math.sqrt(variance)


@pytest.mark.parametrize(
    ("kernel", "deviations"),
    [
        (Kernel("flow_sde", 0.7), (0.421, 0.466, 0.498)),
        (Kernel("dance", 0.3), (0.376, 0.450, 0.493)),
        (Kernel("ddim", 0.0), (0.360, 0.443, 0.493)),
        (Kernel("cps", 0.8), (0.307, 0.358, 0.393)),
    ],
)
def test_marginals_on_gaussian_data_of_deviation_one_half(kernel, deviations):
    """The numbers of the method sheet at 10, 25 and 200 steps: the SDEs converge, Flow-CPS at 0.8 stays too narrow."""
    process = Process.from_scheduler(FLOW)
    for steps, expected in zip((10, 25, 200), deviations, strict=True):
        times = sampling_schedule(FLOW, {}, process, steps).times
        mean, std = gaussian_end(process, kernel, times, 0.0, 0.5)
        # Those numbers were measured on samples.
        assert std == pytest.approx(expected, abs=3e-3)
        assert mean == 0


@pytest.mark.parametrize(
    ("kernel", "limit"),
    [(Kernel("flow_sde"), 0.5), (Kernel("dance"), 0.5), (Kernel("ddim"), 0.5), (Kernel("cps"), 0.4034)],
)
def test_marginals_with_very_many_steps(kernel, limit):
    times = torch.linspace(1, 0, 1001, dtype=torch.float64)
    mean, std = gaussian_end(Process.from_scheduler(FLOW), kernel, times, 1.0, 0.5)
    assert mean == pytest.approx(1.0, abs=2e-3)
    assert std == pytest.approx(limit, abs=2e-3)


@pytest.mark.parametrize(
    "kernel", [Kernel("ddim", 0.0), Kernel("ddim", 0.5), Kernel("ddim", 1.0), Kernel("ancestral")]
)
def test_discrete_kernels_converge_to_the_law_of_the_data(kernel):
    process = Process.from_scheduler(
        {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    )
    errors = []
    for stride in (100, 10, 1):
        times = torch.cat([torch.arange(999, -1, -stride), torch.tensor([CLEAN])])
        mean, std = gaussian_end(process, kernel, times, 2.0, 0.5)
        errors.append(abs(mean - 2.0) + abs(std - 0.5))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 6e-3


def test_samples_have_the_mean_and_deviation_of_the_transition():
    step = Transition(torch.full((1, 20000), 3.0), torch.tensor([0.25]))
    drawn = step.sample(randn(1, 20000))
    assert drawn.mean().item() == pytest.approx(3.0, abs=0.01)
    assert drawn.std().item() == pytest.approx(0.25, abs=0.005)


# Log-probabilities


def test_log_prob_against_torch_distributions():
    mean, x = randn(3, 4, 2, 2, dtype=torch.float64), randn(3, 4, 2, 2, seed=1, dtype=torch.float64)
    std = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    expected = Normal(mean, std.reshape(3, 1, 1, 1)).log_prob(x).flatten(1)
    step = Transition(mean, std)
    torch.testing.assert_close(step.log_prob(x), expected.mean(1))
    torch.testing.assert_close(step.log_prob(x, "sum"), expected.sum(1))
    assert step.log_prob(x, normalised=False).tolist() == (-(x - mean).square().flatten(1).mean(1)).tolist()


def test_kl_against_torch_distributions():
    mean, other = randn(3, 4, 2, 2, dtype=torch.float64), randn(3, 4, 2, 2, seed=1, dtype=torch.float64)
    std, wide = torch.tensor([0.1, 1.0, 3.0]).double(), torch.tensor([0.3, 1.0, 1.0]).double()
    expected = kl_divergence(Normal(mean, std.reshape(3, 1, 1, 1)), Normal(other, wide.reshape(3, 1, 1, 1)))
    step, reference = Transition(mean, std), Transition(other, wide)
    torch.testing.assert_close(step.kl(reference), expected.flatten(1).mean(1))
    torch.testing.assert_close(step.kl(reference, "sum"), expected.flatten(1).sum(1))
    assert step.kl(step).tolist() == [0, 0, 0]


def test_half_precision_latents_are_compared_in_float32():
    mean, x = randn(2, 4, 8, 8).bfloat16(), randn(2, 4, 8, 8, seed=1).bfloat16()
    step = Transition(mean, torch.tensor([0.5, 0.5]))
    assert step.log_prob(x).dtype == torch.float32
    exact = Transition(mean.double(), torch.tensor([0.5, 0.5]).double()).log_prob(x.double())
    assert (step.log_prob(x) - exact).abs().max() < 1e-5


def test_deterministic_steps_have_ratio_one_and_no_gradient():
    mean = randn(2, 3).requires_grad_()
    step = Transition(mean, torch.tensor([0.0, 1.0]))
    values = step.log_prob(randn(2, 3, seed=1))
    assert values[0] == 0
    values.sum().backward()
    assert mean.grad is not None
    assert mean.grad[0].tolist() == [0, 0, 0]
    assert mean.grad[1].abs().min() > 0
    assert step.kl(Transition(mean + 1, step.std))[0] == 0


# Refusals


@pytest.mark.parametrize("name", ["flow_sde", "dance"])
def test_flow_kernels_are_refused_on_other_models(name):
    process, x = Process.from_scheduler(SD), randn(2, 3)
    with pytest.raises(DiffalignError, match=f"kernel is {name}, but the model is not a flow"):
        transition(process, Kernel(name), x, rows(500), rows(400), x)


def test_the_consistency_kernel_is_refused_on_flows():
    x = randn(2, 3)
    with pytest.raises(DiffalignError, match="kernel is lcm, but the model is a flow"):
        transition(Process.from_scheduler(FLOW), Kernel("lcm"), x, rows(0.5), rows(0.4), x)


@pytest.mark.parametrize(
    ("name", "noise", "allowed"),
    [
        ("ddim", 1.5, r"\[0, 1\]"),
        ("cps", -0.1, r"\[0, 1\]"),
        ("lcm", 0.5, "expected 1"),
        ("dance", -1.0, "at least 0"),
    ],
)
def test_noise_out_of_range_is_refused(name, noise, allowed):
    with pytest.raises(DiffalignError, match=allowed):
        Kernel(name, noise)


def test_unknown_kernels_are_refused():
    with pytest.raises(DiffalignError, match=r"is 'euler'; expected one of: ddim"):
        Kernel("euler")  # type: ignore[arg-type]
