"""ReNO: gradient ascent on the noise of a one-step or few-step generator (Eyring et al. 2024, arXiv 2406.04312).

Minimised over the noise of each prompt, equation 5 with the regulariser of equation 6:

    L(eps) = -r(G(eps), prompt) + lambda K(eps),   K(eps) = |eps|^2 / 2 - (d - 1) log |eps|

K is the negative log-density of the norm of d standard normals, lowest at `|eps|^2 = d - 1`. It says nothing of the
noise's shape: `gaussianity.py` looks at that afterwards. Prompts are independent: clip and momentum are per prompt.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.inference.ascent import Look, climb, nesterov
from diffalign.inference.problem import Problem
from diffalign.inference.regularisers import norm_penalty
from diffalign.inference.trace import Trace
from diffalign.strict import StrictModel


class RenoConfig(StrictModel):
    """Options of ReNO; defaults are those of the release for 512 px models."""

    method: Literal["reno"] = "reno"
    """Gradient ascent on the noise."""
    iterations: int = Field(default=50, ge=1)
    """Pictures per prompt, each but the last with a backward pass. More climb on, and leave the prompt sooner."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """`sgd` with Nesterov momentum, as in the paper; `adam` with eps 0.01."""
    lr: float = Field(default=5.0, gt=0)
    """Step size; a step moves the noise by at most lr clip, about ten times that once momentum has built up. 10 at
    1024 px; for adam about 0.01."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of `sgd`."""
    clip: float = Field(default=0.1, gt=0)
    """Largest gradient norm of a prompt's noises. Rewards on other scales then differ in direction only."""
    weight: float = Field(default=1.0, gt=0)
    """Of the reward; below the clip it decides between reward and regulariser."""
    regularisation: float = Field(default=0.01, ge=0)
    """lambda: keeps the noise at its usual norm; 0 lets it drift off to where the model was never trained."""


class Reno:
    """Climbs for all prompts of a problem at once."""

    def __init__(self, config: RenoConfig | None = None) -> None:
        self.config = config or RenoConfig()

    def run(self, problem: Problem, trace: Trace) -> None:
        """Climb; the best iterate by the reward alone is the trace's. The last iteration only looks.

        A prompt whose reward or gradient is not finite stops at its best noise, and the trace is told why.
        """
        options, generation = self.config, problem.generation

        def look_at(noise: Tensor, iteration: int, wanted: bool) -> Look:
            rewards, media = problem.objective_of(noise)
            if not wanted:
                return Look(rewards, media, None)
            loss = options.regularisation * penalty(noise, len(generation.backbone.latent_shape))
            return Look(rewards, media, loss - options.weight * rewards.to(loss))

        climb(
            problem,
            trace,
            look_at,
            self._optimizer,
            iterations=options.iterations,
            clip=options.clip,
            cost=generation.cost,
        )

    def _optimizer(self, noise: Tensor) -> torch.optim.Optimizer:
        options = self.config
        if options.optimizer == "adam":
            return torch.optim.Adam([noise], lr=options.lr, eps=1e-2)
        return nesterov(noise, options.lr, options.momentum)


def penalty(noise: Tensor, dims: int = 3) -> Tensor:
    """`norm_penalty` of each noise of a prompt, added: `[B]` of `[B, ..., C, h, w]`; a noise has `dims` dimensions."""
    each = norm_penalty(noise.flatten(0, -dims - 1))
    return each.view(len(noise), -1).sum(1)
