"""A sampling run that is acted upon between its steps: K states of each of B prompts are seen, judged and moved on.

Every call of the network goes through `Walk`, which counts it, charges it to the meter and splits it into batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.inference.generation import Generation
from diffalign.inference.problem import Problem
from diffalign.inference.search import draw, failed_as_nan
from diffalign.process import Process, expand_as
from diffalign.randomness import generator
from diffalign.sampling.rollout import chunks, predict
from diffalign.sampling.transition import Transition, levels, transition


def _checked_window(window: tuple[float, float]) -> tuple[float, float]:
    """A window, if it is one.

    Raises:
        ValueError: shares outside of [0, 1], or not in rising order.
    """
    if not 0 <= window[0] <= window[1] <= 1:
        raise ValueError(f"window is {window}; expected two rising shares of the steps in [0, 1]")
    return window


Window = Annotated[tuple[float, float], AfterValidator(_checked_window)]
"""First and last step at which a method acts, as shares of all steps."""


@dataclass(frozen=True)
class Seen:
    """What the network makes of states.

    Fields:
        clean: the clean latents that it sees in them `[B, K, C, h, w]`. mean, std: of the next states,
            `[B, K, C, h, w]` and `[B, K]`.
    """

    clean: Tensor
    mean: Tensor
    std: Tensor

    def take(self, index: Tensor) -> Seen:
        """States `index` `[B, J]` of each prompt."""
        return Seen(pick(self.clean, index), pick(self.mean, index), pick(self.std, index))

    def next(self, noise: Tensor | None) -> Tensor:
        """Next states `[B, J, C, h, w]` for noises `[B, J, C, h, w]`, J = K or K = 1; None: a step without noise."""
        return self.mean if noise is None else self.mean + self.std[..., None, None, None] * noise


@dataclass(frozen=True)
class Look:
    """Judged pictures.

    Fields:
        rewards: `[B, K]`, NaN where the reward is not finite. best: `[B]`, the highest, NaN without one. index: whose
            it is `[B]`. media: its picture `[B, 3, H, W]`.
    """

    rewards: Tensor
    best: Tensor
    index: Tensor
    media: Tensor


class Walk:
    """The steps of a problem's sampler, without gradients.

    Fields:
        steps: how many there are. forwards: network evaluations of a state at a step.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.generation, self.meter = problem, problem.generation, problem.meter
        self.steps = len(self.generation.sampler.schedule)
        self.forwards = self.generation.cost // self.steps

    @property
    def late(self) -> bool:
        """Whether the time is over: what is begun is finished without further choices."""
        return self.meter.late

    def runs(self, calls: Callable[[int], int], most: int) -> Iterator[tuple[int, int]]:
        """Numbers of runs from 0 on, and how many candidates each may have.

        Without a budget there is one run. With one, runs follow until it is spent; the last has fewer candidates.

        Args:
            calls: states of a prompt that the network sees in a run, for a number of candidates. most: candidates.
        """
        for number in count():
            if number and not self.meter.budget.limited:
                return
            left = self.meter.affordable(self.forwards)
            fitting = [k for k in range(1, most + 1) if calls(k) <= left]
            if not fitting:
                return
            yield number, fitting[-1]

    def paths(self, number: int, many: int) -> Tensor:
        """All noises of `many` states per prompt `[B, K, S, C, h, w]`, of a run; the very first are the start."""
        drawn = draw(self.problem.seeds, many, self.generation.noise_shape, "steering", number)
        if number == 0:
            drawn[:, 0] = self.problem.start
        return drawn

    def candidates(self, path: Tensor, step: int, many: int, number: int) -> Tensor:
        """Noises of a step `[B, M, C, h, w]`, the path's own first; `path` is `[B, 1, S, C, h, w]`."""
        shape = self.generation.noise_shape[1:]
        own = path[:, :, self.column(step)]
        if many == 1:
            return own
        return torch.cat([own, draw(self.problem.seeds, many - 1, shape, "candidates", number, step)], 1)

    def uniform(self, many: int, number: int, step: int) -> Tensor:
        """Numbers in [0, 1) `[B, many]`, a function of seed, run and step."""
        seeds = self.problem.seeds
        rows = [torch.rand(many, generator=generator(s, "steering-uniform", number, step)) for s in seeds]
        return torch.stack(rows).double()

    def begin(self, paths: Tensor) -> Tensor:
        """First states `[B, K, C, h, w]` on the backbone's device."""
        return self._there(paths[:, :, 0]) * self.generation.scale

    def column(self, step: int) -> int:
        """Which of a path's noises is drawn at a step; of a step that draws none, the first that comes after it."""
        return 1 + sum(other < step for other in self.generation.random)

    def noise(self, paths: Tensor, step: int) -> Tensor | None:
        """Noises of a step `[B, K, C, h, w]`, None where it draws none."""
        if step not in self.generation.random:
            return None
        return self._there(paths[:, :, self.column(step)])

    def see(self, x: Tensor, step: int) -> Seen:
        """What the network makes of states `[B, K, C, h, w]` at the start of a step."""
        parts = [_seen(self.generation, part, step, rows) for part, rows in self._batches(x)]
        clean, mean, std = (torch.cat(values) for values in zip(*parts, strict=True))
        return Seen(*(value.unflatten(0, x.shape[:2]) for value in (clean, mean, std)))

    def along(self, x: Tensor, first: int, end: int) -> Tensor:
        """States `[B, K, C, h, w]` at the start of a step taken to that of another by deterministic steps.

        At the end of the sampler they are the clean latents that the network sees last.
        """
        return self._through(x, range(first, end + 1))

    def ahead(self, x: Tensor, step: int, calls: int) -> Tensor:
        """Clean latents that states `[B, K, C, h, w]` at the start of a step lead to without further noise.

        Args:
            calls: of the network, at times that are spread over the steps left; 1: what it sees at once.
        """
        return self._through(x, stops(step, self.steps, calls))

    def _through(self, x: Tensor, steps: Sequence[int]) -> Tensor:
        """States taken through the starts of steps by DDIM."""
        for first, end in pairwise(steps):
            parts = [_jump(self.generation, part, first, end, rows) for part, rows in self._batches(x)]
            x = torch.cat(parts).unflatten(0, x.shape[:2])
        return x

    def judge(self, clean: Tensor) -> Look:
        """Rewards of clean latents `[B, K, C, h, w]`."""
        many, scores, media = clean.shape[1], [], []
        for part, rows in self._batches(clean, counted=False):
            with torch.no_grad():
                pictures = self.generation.decode(part)
                found = self.problem.objective(pictures, [self.problem.texts[row] for row in rows])
            scores.append(failed_as_nan(found))
            media.append(pictures.float().cpu())
        rewards = torch.cat(scores).view(-1, many)
        known = torch.where(rewards.isnan(), -math.inf, rewards)
        top, index = known.max(1)
        best = torch.where(top.isinf(), math.nan, top)
        chosen = pick(torch.cat(media).unflatten(0, (-1, many)), index[:, None])[:, 0]
        return Look(rewards, best, index, chosen)

    def _batches(self, x: Tensor, counted: bool = True) -> Iterator[tuple[Tensor, list[int]]]:
        """States in batches `[n, C, h, w]` with the prompt of each; counted: the network sees them."""
        rows = [row for row in range(len(x)) for _ in range(x.shape[1])]
        if counted:
            self.generation.count(len(rows))
            self.meter.spend(self.forwards * x.shape[1])
        flat = x.flatten(0, 1)
        for part in chunks(len(rows), self.generation.sampler.batch_size):
            yield flat[part.start : part.stop], rows[part.start : part.stop]

    def _there(self, values: Tensor) -> Tensor:
        return values.to(self.generation.backbone.device)


def network(generation: Generation, x: Tensor, t: Tensor, rows: Sequence[int]) -> Tensor:
    """The network's output for states `[n, C, h, w]` at times `[n]`, guided; who calls it counts it."""
    backbone = generation.backbone
    return predict(backbone, x, t, generation.told.select(rows).to(backbone.device))


def moved(generation: Generation, x: Tensor, step: int, prediction: Tensor) -> Transition:
    """The distribution of the states after a step that starts at `x` `[n, C, h, w]`, for a network output."""
    t, t_prev = generation.sampler.schedule.span(step, len(x), generation.backbone.device)
    return transition(
        generation.backbone.process, generation.sampler.kernel_at(step), x, t, t_prev, prediction
    )


def renoised(process: Process, x_prev: Tensor, t: Tensor, t_prev: Tensor, noise: Tensor) -> Tensor:
    """States `[n, C, h, w]` at times `t_prev` `[n]` taken back to the higher noise of times `t` by the forward process.

    `x_t = a x_prev + sqrt(sigma_t^2 - a^2 sigma_prev^2) noise`, `a = alpha_t / alpha_prev`.
    """
    (alpha, sigma), (alpha_prev, sigma_prev) = levels(process, t), levels(process, t_prev)
    kept = alpha / alpha_prev
    fresh = (sigma.square() - (kept * sigma_prev).square()).clamp(min=0).sqrt()
    return expand_as(kept.to(x_prev), x_prev) * x_prev + expand_as(fresh.to(x_prev), x_prev) * noise


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Entries `index` `[B, J]` of each row of values `[B, K, ...]`, as `[B, J, ...]`."""
    index = index.to(values.device)
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def acting(window: Window, steps: int) -> list[int]:
    """The steps that lie between two shares of all steps, both ends included."""
    first, last = window
    return [step for step in range(steps) if first * steps <= step <= last * steps]


def stops(step: int, steps: int, calls: int) -> list[int]:
    """Steps at which a look ahead calls the network, evenly spread from `step` on, and the end: 0, 3, 7, 10."""
    if step == steps:
        return [step]
    calls = min(calls, steps - step)
    return [step + round(i * (steps - step) / calls) for i in range(calls + 1)]


def check_noise(generation: Generation, method: str) -> None:
    """Whether the sampler draws noise that a method can choose.

    Raises:
        DiffalignError: it is deterministic.
    """
    if generation.random:
        return
    kernel, steps = generation.sampler.kernel, len(generation.sampler.schedule)
    name, noise = ("flow_sde", 0.7) if generation.backbone.process.is_flow else ("ddim", 1)
    raise DiffalignError(
        f"method {method} chooses among the noises of the sampler's steps, but this one draws none: "
        f"{generation.solver} in {steps} steps, kernel {kernel.name} with noise {kernel.level:g}. Set "
        f"generation.kernel={name} generation.noise={noise} and at least 2 generation.steps."
    )


def _seen(generation: Generation, x: Tensor, step: int, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    t, _ = generation.sampler.schedule.span(step, len(x), generation.backbone.device)
    with torch.no_grad():
        prediction = network(generation, x, t, rows)
        after = moved(generation, x, step, prediction)
        return generation.backbone.process.to_x0(prediction, x, t), after.mean, after.std


def _jump(generation: Generation, x: Tensor, first: int, end: int, rows: Sequence[int]) -> Tensor:
    """DDIM's step from the start of one step to that of another; to the end: the clean latents seen."""
    times, process = (
        generation.sampler.schedule.times.to(generation.backbone.device),
        generation.backbone.process,
    )
    t, t_prev = times[first].expand(len(x)), times[end].expand(len(x))
    with torch.no_grad():
        prediction = network(generation, x, t, rows)
        if end == len(times) - 1:
            return process.to_x0(prediction, x, t)
        return transition(process, generation.sampler.kernel.deterministic(), x, t, t_prev, prediction).mean
