"""The sampler that a model's own pipeline runs, as kernel, times and scale of the first noise.

Equal noises then give the pictures of the pipeline, so that what is optimised here can be drawn by anyone with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from diffalign.backbones.base import Backbone
from diffalign.backbones.guidance import USUAL_SCALE, is_told_guidance
from diffalign.config import EvaluationConfig
from diffalign.errors import DiffalignError
from diffalign.sampling.rollout import Sampler
from diffalign.sampling.schedules import CLEAN, Schedule, schedule_of
from diffalign.sampling.transition import Kernel

KERNELS: dict[str, Kernel] = {
    "DDIMScheduler": Kernel("ddim", 0.0),
    "EulerDiscreteScheduler": Kernel("ddim", 0.0),
    "EulerAncestralDiscreteScheduler": Kernel("ancestral"),
    "LCMScheduler": Kernel("lcm"),
    "FlowMatchEulerDiscreteScheduler": Kernel("ddim", 0.0),
}
"""Schedulers of diffusers whose steps are one of our kernels: Euler's is DDIM's in other units (Song et al. 2021,
section 4.3), Euler's ancestral one is DDIM with eta 1."""
ALTERED = (
    "clip_sample",
    "thresholding",
    "stochastic_sampling",
    "use_karras_sigmas",
    "use_exponential_sigmas",
)
ORDINARY = EvaluationConfig()
FEWEST_STEPS = 5
"""Fewer steps than this show what a few-step model can do, and are blurs of an ordinary one."""


@dataclass(frozen=True)
class OwnSampler:
    """How a model's pipeline draws.

    Fields:
        sampler: kernel and times. scale: what the initial noise is multiplied with.
        exact: whether these are the pipeline's own steps; False: its solver is of higher order, and DDIM's steps with
            the same spacing stand for it.
        solver: name of the pipeline's scheduler.
    """

    sampler: Sampler
    scale: float
    exact: bool
    solver: str


def own_sampler(backbone: Backbone, steps: int, *, batch_size: int = 8) -> OwnSampler:
    """The sampler of a model's pipeline in `steps` steps.

    Raises:
        DiffalignError: the scheduler cannot take so many steps.
    """
    config, options = backbone.scheduler_options(steps)
    solver = str(config.get("_class_name"))
    schedule, kernel = schedule_of(backbone, steps), KERNELS.get(solver)
    if solver.startswith("Euler"):
        # Euler's last step goes to noise level 0, whatever DDIM would do with the same configuration.
        times = schedule.times.clone()
        times[-1] = CLEAN
        schedule = Schedule(times)
    exact = kernel is not None and _same_times(backbone, config, options, schedule)
    exact = exact and not any(config.get(name) for name in ALTERED)
    sampler = Sampler(schedule, kernel or Kernel("ddim", 0.0), batch_size=batch_size)
    return OwnSampler(sampler, _first_scale(backbone, config, solver, schedule), exact, solver)


def is_few_step(backbone: Backbone) -> bool:
    """Whether a model's configuration tells that it was distilled to few steps.

    True of consistency models, of SD-Turbo and SDXL-Turbo (Euler at the ends of equal intervals of time) and of FLUX.1
    schnell (told no guidance). Of other distilled models it does not say.
    """
    config, _ = backbone.scheduler_options(1)
    solver = str(config.get("_class_name"))
    turbo = solver.startswith("Euler") and config.get("timestep_spacing") == "trailing"
    network: Any = backbone.core.config
    return "LCM" in solver or turbo or getattr(network, "guidance_embeds", None) is False


def usual_settings(backbone: Backbone) -> tuple[int, float]:
    """Steps and guidance that a model is used with where nothing else is said."""
    guidance = USUAL_SCALE if is_told_guidance(backbone.core) else 0.0
    return (1, guidance) if is_few_step(backbone) else (ORDINARY.steps, ORDINARY.guidance)


def check_steps(backbone: Backbone, steps: int, distilled: bool | None) -> None:
    """Whether a number of steps fits a model.

    Args:
        distilled: whether it makes pictures in few steps; None: what its configuration tells.

    Raises:
        DiffalignError: few steps of an ordinary model.
    """
    few = is_few_step(backbone) if distilled is None else distilled
    if few or steps >= FEWEST_STEPS:
        return
    raise DiffalignError(
        f"generation.steps is {steps}, but {backbone.source.name} is an ordinary diffusion model, whose pictures in so "
        "few steps are blurs. Recipes with one to four steps fit few-step models: SDXL-Turbo, SD-Turbo, LCM, FLUX.1 "
        "schnell. Set generation.steps=20 or more, or generation.distilled=true if this model was made for few steps."
    )


def _same_times(
    backbone: Backbone, config: dict[str, Any], options: dict[str, Any], schedule: Schedule
) -> bool:
    """Whether the pipeline's scheduler visits the times of a schedule."""
    scheduler: Any = getattr(diffusers, str(config["_class_name"])).from_config(config)
    scheduler.set_timesteps(len(schedule), **options)
    times = scheduler.timesteps.double().cpu()
    ours = schedule.times[:-1].double() * (backbone.process.time_scale if backbone.process.is_flow else 1.0)
    return len(times) == len(ours) and bool(torch.allclose(times, ours, rtol=1e-5, atol=1e-3))


def _first_scale(backbone: Backbone, config: dict[str, Any], solver: str, schedule: Schedule) -> float:
    """Euler schedulers start at the largest noise level alone, without the trace of signal below it."""
    if solver.startswith("Euler") and config.get("timestep_spacing", "linspace") in ("linspace", "trailing"):
        return float(backbone.process.alpha_sigma(schedule.times[:1])[1])
    return 1.0
