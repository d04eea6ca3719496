"""DNO: gradient ascent on all noises of a sampler (Tang et al. 2024, arXiv 2405.18881).

Minimised over the noises z of each prompt, the initial one and those that the steps draw (equation 5 with the
probability regularisation of section 4):

    L(z) = -r(G(z), prompt) + gamma R(z)

R (`regularisers.concentration_penalty`) is flat for typical noise and steep outside. Rewards without gradients get a
hybrid one (`hybrid.py`). Prompts are independent: optimiser, clip and penalty are per prompt.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.inference.ascent import Look, climb, nesterov
from diffalign.inference.hybrid import Around, extra_cost, probed_direction
from diffalign.inference.problem import Problem
from diffalign.inference.regularisers import concentration_penalty
from diffalign.inference.trace import Trace
from diffalign.strict import StrictModel


class DNOConfig(StrictModel):
    """Options of DNO; defaults are those of the release where nothing else is said."""

    method: Literal["dno"] = "dno"
    """Gradient ascent on all noises."""
    iterations: int = Field(default=100, ge=1)
    """Pictures per prompt, each but the last with a backward pass through the whole sampler."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`adamw`, as in the release; `sgd` with Nesterov momentum, whose steps keep the gradient's proportions."""
    lr: float = Field(default=0.01, gt=0)
    """Step size: of `adamw` about how far each element moves per iteration; of `sgd` times the clipped gradient."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of `sgd`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of `adamw`. The release leaves torch's 0.01, which shrinks all noises by 1 % in 100 iterations."""
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm of a prompt's noises."""
    weight: float = Field(default=1.0, gt=0)
    """Of the reward; below the clip it decides between reward and regulariser."""
    gamma: float = Field(default=0.0, ge=0)
    """Of the regulariser, which grows with the number of noise elements; the paper takes about 1 for rewards that lead
    away from pictures, the release 0."""
    permutations: int = Field(default=100, ge=0)
    """Random orders in which the regulariser looks at the elements, other ones at each iteration."""
    group: int = Field(default=4, ge=2)
    """Elements per group of the regulariser."""
    gradients: Literal["auto", "exact", "hybrid"] = "auto"
    """`exact` through the reward; `hybrid` estimates the reward's part; `auto`: exact if the reward has gradients."""
    around: Around = "noise"
    """What a hybrid gradient perturbs. `noise` as in the release: changes that the generator can make, for two
    generations a pair; `latent` or `picture`: any change, for two rewards a pair."""
    pairs: int = Field(default=4, ge=1)
    """Opposite perturbations per prompt and iteration of a hybrid gradient."""
    mu: float = Field(default=0.01, gt=0)
    """Standard deviation of a perturbation; rewards that jump need more."""


class DNO:
    """Climbs for all prompts of a problem at once."""

    def __init__(self, config: DNOConfig | None = None) -> None:
        self.config = config or DNOConfig()

    def run(self, problem: Problem, trace: Trace) -> None:
        """Climb; the best iterate by the reward alone is the trace's. The last iteration only looks."""
        options = self.config
        probes = 0 if self._is_exact(problem) else extra_cost(problem, options.around, options.pairs)
        climb(
            problem,
            trace,
            partial(self.look, problem),
            self._optimizer,
            iterations=options.iterations,
            clip=options.clip,
            cost=problem.generation.cost + probes,
        )

    def look(self, problem: Problem, noise: Tensor, iteration: int, wanted: bool = True) -> Look:
        """Rewards and media of noises `[B, *shape]`, and if wanted the losses that are to fall."""
        ways = self._exact if self._is_exact(problem) else self._hybrid
        rewards, media, rise = ways(problem, noise, iteration, wanted)
        if rise is None:
            return Look(rewards, media, None)
        return Look(rewards, media, self._penalty(noise, iteration) - self.config.weight * rise.to(noise))

    def _is_exact(self, problem: Problem) -> bool:
        return self.config.gradients != "hybrid" and problem.objective.reward.differentiable

    def _exact(
        self, problem: Problem, noise: Tensor, iteration: int, wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rewards, media, and what is to rise: the rewards."""
        rewards, media = problem.objective_of(noise)
        return rewards, media, rewards if wanted else None

    def _hybrid(
        self, problem: Problem, noise: Tensor, iteration: int, wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rewards, media, and what is to rise: the media, or latents, along the estimated direction."""
        options, generation = self.config, problem.generation
        problem.meter.spend(generation.cost)
        latents = generation.latents(problem.full(noise))
        with torch.set_grad_enabled(torch.is_grad_enabled() and options.around != "latent"):
            media = generation.decode(latents)
        with torch.no_grad():
            rewards = problem.objective(media, problem.texts)
        if not wanted:
            return rewards, media, None
        moved = latents if options.around == "latent" else media
        at = noise if options.around == "noise" else moved
        found = probed_direction(
            problem, options.around, at.detach(), mu=options.mu, pairs=options.pairs, iteration=iteration
        )
        return rewards, media, (found.to(moved) * moved).flatten(1).sum(1)

    def _penalty(self, noise: Tensor, iteration: int) -> Tensor | float:
        """`gamma R(z)` `[B]`."""
        options = self.config
        if not options.gamma:
            return 0.0
        penalty = concentration_penalty(
            noise, iteration, group=options.group, permutations=options.permutations
        )
        return options.gamma * penalty

    def _optimizer(self, noise: Tensor) -> torch.optim.Optimizer:
        options = self.config
        if options.optimizer == "adamw":
            return torch.optim.AdamW([noise], lr=options.lr, weight_decay=options.weight_decay)
        return nesterov(noise, options.lr, options.momentum)
