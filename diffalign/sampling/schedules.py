"""The times that a sampler visits, taken from the schedulers that the model was made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.process import Process

if TYPE_CHECKING:
    from diffalign.backbones.base import Backbone

CLEAN = -1
"""The time of clean data of a discrete process: alpha = 1, sigma = 0. Its timestep 0 still has some noise; the time of
clean data of a flow is 0."""


@dataclass(frozen=True)
class Schedule:
    """The times of a sampler, noise first.

    Fields:
        times: `[S + 1]`, the start of each of the S steps and the end of the last one: integers (`CLEAN` or 0 at the
            end) of a discrete process, or float32 in [0, 1] of a flow.
    """

    times: Tensor

    def __len__(self) -> int:
        return len(self.times) - 1

    def span(self, step: int, rows: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Start and end of a step, each `[rows]`."""
        start, end = self.times[step : step + 2].to(device)
        return start.expand(rows), end.expand(rows)


def schedule_of(backbone: Backbone, steps: int) -> Schedule:
    """The times that a model's own sampler visits in `steps` steps (see `sampling_schedule`)."""
    return sampling_schedule(*backbone.scheduler_options(steps), backbone.process, steps)


def sampling_schedule(
    config: dict[str, Any], options: dict[str, Any], process: Process, steps: int
) -> Schedule:
    """The times that a model's own sampler visits in `steps` steps.

    Discrete processes are sampled as DDIM does it with the model's spacing, whatever solver its pipeline has;
    consistency models at the times of `LCMScheduler`; flows at those of `FlowMatchEulerDiscreteScheduler`.

    Args:
        config: the model's scheduler configuration.
        options: what its pipeline gives `set_timesteps` besides the number of steps (FLUX: levels and shift).

    Raises:
        DiffalignError: the scheduler cannot take so many steps.
    """
    try:
        if process.is_flow:
            flow = FlowMatchEulerDiscreteScheduler.from_config(config)
            flow.set_timesteps(steps, **options)
            return Schedule(flow.sigmas.float().cpu())
        consistency = "LCM" in str(config.get("_class_name", ""))
        scheduler: Any = (LCMScheduler if consistency else DDIMScheduler).from_config(config)
        scheduler.set_timesteps(steps, **options)
    except ValueError as error:
        raise DiffalignError(f"the model's sampler cannot take {steps} steps: {error}") from error
    # The last step of consistency sampling gives the denoised latents.
    last = CLEAN if consistency or scheduler.config.set_alpha_to_one else 0
    return Schedule(torch.cat([scheduler.timesteps.long(), torch.tensor([last])]))
