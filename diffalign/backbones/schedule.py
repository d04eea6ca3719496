"""The forward process of a model from its scheduler's configuration, and the times that a few-step model is used at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler

from diffalign.backbones.loading import Source, loading
from diffalign.errors import DiffalignError
from diffalign.process import Process

StepOptions = Callable[[dict[str, Any], int], dict[str, Any]]
"""From a scheduler's configuration and a number of steps to what a pipeline gives its `set_timesteps` besides."""


def scheduler_config(source: Source) -> dict[str, Any]:
    """The configuration of a model's scheduler.

    Raises:
        DiffalignError: it is missing.
    """
    revision = {"revision": source.revision} if source.revision else {}
    return loading(
        f"scheduler of {source.name}",
        lambda: dict(DDPMScheduler.load_config(source.path, subfolder="scheduler", **revision)),
    )


def scheduler_process(
    source: Source, few_steps: int | None = None, step_options: StepOptions | None = None
) -> Process:
    """The forward process of a model, from its scheduler's configuration.

    Args:
        few_steps: train only at the times that the model's sampler visits with this many steps; None: all times, or
            for a consistency model those it was distilled at.
        step_options: how the model's pipeline asks its scheduler for steps; None: by their number alone.

    Raises:
        DiffalignError: the configuration is missing or describes a process that is not known here.
    """
    config = scheduler_config(source)
    try:
        process = Process.from_scheduler(config)
    except ValueError as error:
        raise DiffalignError(f"the scheduler of {source.name} is not supported: {error}") from error
    if few_steps is None:
        return process
    options = step_options(config, few_steps) if step_options else {}
    return replace(process, grid=visited_times(config, process, few_steps, options))


def visited_times(
    config: dict[str, Any], process: Process, steps: int, options: dict[str, Any] | None = None
) -> torch.Tensor:
    """Times `[steps]`, ascending, that the scheduler of a configuration visits, as `process` counts them.

    Args:
        options: what the pipeline gives `set_timesteps` besides the number of steps.

    Raises:
        DiffalignError: the scheduler cannot take so many steps, visits a time twice, or starts far from noise.
    """
    scheduler_class = getattr(diffusers, str(config.get("_class_name")))
    scheduler = scheduler_class.from_config(config)
    try:
        scheduler.set_timesteps(steps, **(options or {}))
    except ValueError as error:
        raise DiffalignError(f"model.few_steps is {steps}: {error}") from error
    times = scheduler.timesteps.double().flip(0)
    if process.is_flow:
        return (times / process.time_scale).float()
    whole = times.round().long().unique()
    # Schedulers with spacing "leading" take their single step at t = 1, and with as many steps as times leave them.
    if len(whole) != len(times) or not process.num_timesteps // 2 <= int(whole[-1]) < process.num_timesteps:
        raise DiffalignError(
            f"model.few_steps is {steps}, but {config.get('_class_name')} with timestep_spacing "
            f"{config.get('timestep_spacing', 'leading')!r} visits {times.tolist()}; expected different timesteps "
            "that start near noise. Set few_steps to what the model was made for (1, 2 or 4), and timestep_spacing: "
            "trailing in the model's scheduler/scheduler_config.json."
        )
    return whole


def patch_step_options(
    config: dict[str, Any], steps: int, latent_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """What the pipelines of FLUX and Z-Image give `set_timesteps` for latents `(C, h, w)` in 2 x 2 patches.

    Even noise levels from 1 to 1 / steps, and mu, the logarithm of the shift of a scheduler with
    `use_dynamic_shifting`: linear in the number of patches, between the two that the configuration names.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    patches = math.prod(latent_shape[1:]) // 4
    mu = least + (most - least) * (patches - low) / (high - low)
    return {"sigmas": torch.linspace(1, 1 / steps, steps).tolist(), "mu": mu}
