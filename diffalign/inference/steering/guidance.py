"""Universal guidance: the gradient of a reward of the predicted picture moves every step.

Bansal et al. 2023, arXiv 2302.07121, algorithm 1 (forward guidance and per-step self-recurrence), with r = -loss:

    eps' = eps - sigma_t s grad_{x_t} r(D(x0(x_t))),   x0' = (x_t - sigma_t eps') / alpha_t

which is the score plus s times the gradient of the reward. So it moves the mean of whatever kernel takes the step, on
flows as well: the velocity changes by `-s sigma_t / alpha_t grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.inference.problem import Problem
from diffalign.inference.search import norms
from diffalign.inference.steering.walk import Walk, Window, acting, moved, network, renoised
from diffalign.inference.trace import Trace
from diffalign.process import Process, expand_as
from diffalign.randomness import generator
from diffalign.sampling.rollout import chunks
from diffalign.strict import StrictModel

POLE = 1e-3
"""Signal level below which there is no guidance: x0 moves by sigma^2 / alpha, and a flow starts at alpha = 0."""
SMALLEST = 1e-30


@dataclass(frozen=True)
class Pull:
    """What the network says of states, and where a reward pulls them.

    Fields:
        prediction: the network's output `[n, C, h, w]`. gradient: of the reward in the states `[n, C, h, w]`.
        rewards: `[n]`. media: what was judged `[n, 3, H, W]`, None where that is no picture.
        through: whether the gradient went through the network.
    """

    prediction: Tensor
    gradient: Tensor
    rewards: Tensor
    media: Tensor | None = None
    through: bool = False


Puller = Callable[[Walk, Tensor, int, Sequence[int]], Pull]
"""Looks at states `[n, C, h, w]` at the start of a step, of the given prompts."""


@dataclass(frozen=True)
class Push:
    """How a gradient moves the steps.

    Fields:
        strength: what it is multiplied with. clip: largest change of eps, as a share of its norm; None: any.
        window: where it acts. recurrence: how often a step is taken.
    """

    strength: float
    clip: float | None
    window: tuple[float, float]
    recurrence: int = 1


class UniversalGuidanceConfig(StrictModel):
    """Options of universal guidance."""

    method: Literal["universal_guidance"] = "universal_guidance"
    """The reward's gradient moves every step."""
    strength: float = Field(default=1.0, ge=0)
    """s, in units of 1 / reward: the log-density of pictures changes by s times their reward. 0 is plain sampling."""
    clip: float | None = Field(default=0.3, gt=0)
    """Largest change of the predicted noise, as a share of its norm; null: none, as in the paper."""
    recurrence: int = Field(default=1, ge=1)
    """How often a step is taken, with noise in between; time grows with it, and pictures stay nearer to the model's."""
    window: Window = (0.0, 1.0)
    """The steps that are guided lie between these shares of all."""

    @property
    def iterations(self) -> int:
        """What a run costs, in pictures; backward passes come on top."""
        return self.recurrence


class UniversalGuidance:
    """Guides one picture for each prompt of a problem by a reward with gradients."""

    def __init__(self, config: UniversalGuidanceConfig | None = None) -> None:
        self.config = config or UniversalGuidanceConfig()

    def run(self, problem: Problem, trace: Trace) -> None:
        """Guide; no noise gives these pictures again. A prompt whose gradient is not finite goes on without."""
        options = self.config
        push = Push(options.strength, options.clip, options.window, options.recurrence)
        Guided(problem, trace, push, through_network).run()


class Guided:
    """A run whose steps a gradient moves, for all prompts of a problem at once.

    Args:
        push: how. puller: where to.
    """

    def __init__(self, problem: Problem, trace: Trace, push: Push, puller: Puller) -> None:
        self.walk, self.trace, self.push, self.puller = Walk(problem), trace, push, puller
        self.guided = acting(push.window, self.walk.steps)

    def run(self) -> None:
        """Sample, as often as the budget allows; the trace gets the pictures, which no noises give again."""
        walk, steps = self.walk, self.walk.steps
        again = len(self.guided)
        for number, turns in walk.runs(lambda k: steps + again * (k - 1), self.push.recurrence):
            path = walk.paths(number, 1)
            x = walk.begin(path)
            for step in range(steps):
                noise = walk.noise(path, step)
                if step in self.guided and not walk.late:
                    x = self._taken(x, step, noise, turns, number)
                else:
                    x = walk.see(x, step).next(noise)
            look = walk.judge(x)
            self.trace.saw(look.best, look.media, None)

    def _taken(self, x: Tensor, step: int, noise: Tensor | None, turns: int, number: int) -> Tensor:
        """The states after a step `[B, 1, C, h, w]`, which is taken `turns` times."""
        for turn in range(turns - 1):
            own = None if noise is None else self._noise("step", number, step, turn)
            x = self._moved(x[:, 0], step, own)[:, None]
            x = self._back(x[:, 0], step, self._noise("recurrence", number, step, turn))[:, None]
        return self._moved(x[:, 0], step, None if noise is None else noise[:, 0])[:, None]

    def _moved(self, x: Tensor, step: int, noise: Tensor | None) -> Tensor:
        """The states `[B, C, h, w]` after a step that is moved by the gradient."""
        walk, generation = self.walk, self.walk.generation
        states, pulls = [], []
        for part in chunks(len(x), generation.sampler.batch_size):
            rows, own = list(part), x[part.start : part.stop]
            pull = self._fine(self.puller(walk, own, step, rows), rows, step)
            t, _ = generation.sampler.schedule.span(step, len(rows), x.device)
            after = moved(generation, own, step, pushed(generation.backbone.process, pull, own, t, self.push))
            states.append(after.mean if noise is None else after.sample(noise[part.start : part.stop]))
            pulls.append(pull)
        generation.count(len(x))
        walk.meter.spend(walk.forwards, backwards=walk.forwards if pulls[0].through else 0)
        if pulls[0].media is not None:
            media = torch.cat([pull.media.cpu() for pull in pulls if pull.media is not None])
            self.trace.passed(torch.cat([pull.rewards.cpu() for pull in pulls]), media)
        return torch.cat(states)

    def _fine(self, pull: Pull, rows: Sequence[int], step: int) -> Pull:
        """The pull without the rows that are not finite, or were not once before; the trace is told."""
        fine = pull.gradient.flatten(1).isfinite().all(1) & pull.rewards.isfinite().to(pull.gradient.device)
        for i in (~fine).nonzero().flatten().tolist():
            self.trace.fail(
                rows[i],
                f"the reward or its gradient is not a finite number at step {step}; the picture is not guided from "
                "there on. Try model.precision=fp32 or bf16, or a VAE that is safe in half precision (model.vae).",
            )
        fine = fine & torch.tensor([row not in self.trace.failures for row in rows]).to(fine.device)
        return replace(pull, gradient=torch.where(expand_as(fine, pull.gradient), pull.gradient, 0.0))

    def _back(self, x_prev: Tensor, step: int, noise: Tensor) -> Tensor:
        """States after a step taken back to its start."""
        generation = self.walk.generation
        t, t_prev = generation.sampler.schedule.span(step, len(x_prev), x_prev.device)
        return renoised(generation.backbone.process, x_prev, t, t_prev, noise)

    def _noise(self, *keys: int | str) -> Tensor:
        """Noise `[B, C, h, w]` that no path holds."""
        shape, seeds = self.walk.generation.noise_shape[1:], self.walk.problem.seeds
        rows = [torch.randn(shape, generator=generator(seed, "guidance", *keys)) for seed in seeds]
        return torch.stack(rows).to(self.walk.generation.backbone.device)


def through_network(walk: Walk, x: Tensor, step: int, rows: Sequence[int]) -> Pull:
    """The gradient of the reward of the picture that the network sees, back through decoder and network."""
    generation, process = walk.generation, walk.generation.backbone.process
    t, _ = generation.sampler.schedule.span(step, len(x), x.device)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        prediction = network(generation, x, t, rows)
        media = generation.decode(process.to_x0(prediction, x, t))
        rewards = walk.problem.objective(media, [walk.problem.texts[row] for row in rows])
        (gradient,) = torch.autograd.grad(rewards.sum(), x)
    return Pull(prediction.detach(), gradient, rewards.detach(), media.detach(), through=True)


def pushed(process: Process, pull: Pull, x: Tensor, t: Tensor, push: Push) -> Tensor:
    """The network's output with `strength gradient` added to the score, `[n, C, h, w]`; as it is where alpha is 0.

    Args:
        x: states `[n, C, h, w]`. t: their times `[n]`.
    """
    alpha, sigma = (expand_as(level, x) for level in process.alpha_sigma(t))
    x0, eps = process.to_x0(pull.prediction, x, t), process.to_eps(pull.prediction, x, t)
    change = sigma * push.strength * pull.gradient.to(x0)
    if push.clip is not None:
        change = change * (push.clip * norms(eps) / norms(change).clamp(min=SMALLEST)).clamp(max=1)
    shifted = process.target(x0 + sigma / alpha.clamp(min=POLE) * change, eps - change, t)
    return torch.where((alpha < POLE) | (norms(change) == 0), pull.prediction, shifted)
