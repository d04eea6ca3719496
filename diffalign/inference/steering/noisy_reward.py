"""Guidance by a reward of noisy latents (Flow-NRG): no decoding, and no gradient through the network.

Liu et al. 2025 (VideoAlign), arXiv 2501.13918, section 4.3: with a reward r(x_t, t) that was trained on noisy latents,

    v' = v - w t / (1 - t) grad_{x_t} r(x_t, t)

which on a flow (alpha = 1 - t, sigma = t) is the score plus w times the gradient, as in `guidance.py`; so it is done on
models of all processes, and flows start at the pole t = 1 without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.inference.generation import Generation
from diffalign.inference.objective import Objective
from diffalign.inference.problem import Problem
from diffalign.inference.steering.guidance import Guided, Pull, Push
from diffalign.inference.steering.walk import Walk, Window, network
from diffalign.inference.trace import Trace
from diffalign.rewards import load_reward, place
from diffalign.sampling.step_scores import StepReward, attach
from diffalign.strict import StrictModel


class NoisyRewardConfig(StrictModel):
    """Options of guidance by a reward of noisy latents."""

    method: Literal["noisy_reward"] = "noisy_reward"
    """A reward of noisy latents moves every step."""
    scorer: str | dict[str, Any] | None = None
    """What judges noisy latents: a run of `trainer.method: latent_reward`, `scenes-latent`, or `module:Name` of a
    reward with `score_step(latents, times, prompts)` that has gradients; null: the run's own reward, if it is one."""
    strength: float = Field(default=100.0, ge=0)
    """w; 100 in the paper, for its rewards. 0 is plain sampling."""
    clip: float | None = Field(default=0.3, gt=0)
    """Largest change of the predicted noise, as a share of its norm; null: none, as in the paper."""
    window: Window = (0.0, 1.0)
    """The steps that are guided lie between these shares of all."""

    @property
    def iterations(self) -> int:
        """What a run costs, in pictures."""
        return 1


class NoisyReward:
    """Guides one picture for each prompt of a problem; the problem's own reward judges the pictures at the end."""

    def __init__(self, config: NoisyRewardConfig | None = None) -> None:
        self.config = config or NoisyRewardConfig()

    def check(self, generation: Generation, objective: Objective) -> None:
        """Refuse a reward that cannot judge noisy latents."""
        self._scorer(generation, objective)

    def run(self, problem: Problem, trace: Trace) -> None:
        """Guide; no noise gives these pictures again. A prompt whose gradient is not finite goes on without."""
        options = self.config
        scorer = self._scorer(problem.generation, problem.objective)
        push = Push(options.strength, options.clip, options.window)
        Guided(problem, trace, push, Scored(scorer)).run()

    def _scorer(self, generation: Generation, objective: Objective) -> StepReward:
        spec = self.config.scorer
        found: Any = objective.reward if spec is None else load_reward(spec)
        if isinstance(found, StepReward):
            attach(found, generation.backbone)
            return place(found, generation.backbone.device)  # type: ignore[arg-type, return-value]
        raise DiffalignError(
            f"method noisy_reward needs a reward of noisy latents, but {found.name!r} has no method "
            "`score_step(latents, times, prompts)`. Set method.scorer to one that has (a run of `diffalign train "
            "scenes/latent_reward`, or scenes-latent for scenes:tiny-sdxl), or take method=universal_guidance, which "
            "guides by rewards of pictures."
        )


@dataclass(frozen=True)
class Scored:
    """Where a reward of noisy latents pulls; the network is asked without gradients."""

    scorer: StepReward

    def __call__(self, walk: Walk, x: Tensor, step: int, rows: Sequence[int]) -> Pull:
        """See `guidance.Puller`."""
        t, _ = walk.generation.sampler.schedule.span(step, len(x), x.device)
        with torch.no_grad():
            prediction = network(walk.generation, x, t, rows)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            rewards = self.scorer.score_step(x, t, [walk.problem.texts[row] for row in rows])
            if not rewards.requires_grad:
                raise DiffalignError(
                    "method.scorer gives scores without gradients; its score_step has to be differentiable in latents."
                )
            (gradient,) = torch.autograd.grad(rewards.sum(), x)
        return Pull(prediction, gradient, rewards.detach())
