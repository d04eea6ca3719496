"""The loop of gradient methods: look, climb, keep the best; every prompt by itself although all climb at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.inference.problem import Problem
from diffalign.inference.search import where_rows
from diffalign.inference.trace import Trace
from diffalign.process import expand_as


@dataclass(frozen=True)
class Look:
    """What a method finds at noises of B prompts.

    Fields:
        rewards: `[B]`, without penalties. media: `[B, 3, H, W]`.
        losses: `[B]`, what is to fall, with the graph; None where nobody asks for it.
    """

    rewards: Tensor
    media: Tensor
    losses: Tensor | None


LookAt = Callable[[Tensor, int, bool], Look]
"""Looks at noises `[B, *shape]` in an iteration; the flag says whether losses are wanted."""


def climb(
    problem: Problem,
    trace: Trace,
    look_at: LookAt,
    optimizer_of: Callable[[Tensor], torch.optim.Optimizer],
    *,
    iterations: int,
    clip: float,
    cost: int,
) -> None:
    """Climb from the problem's first noises; the best iterate by the reward alone is the trace's.

    The last iteration only looks. A prompt whose reward or gradient is not finite stops at its best noise, and the
    trace is told why.

    Args:
        optimizer_of: of the noises, elementwise, so that prompts stay independent. clip: largest gradient norm of a
            prompt. cost: network evaluations of an iteration with a loss.
    """
    meter, plain = problem.meter, problem.generation.cost
    noise = problem.first.clone().to(problem.generation.backbone.device).requires_grad_()
    optimizer = optimizer_of(noise)
    for iteration in range(iterations):
        if not meter.affordable(plain):
            break
        last = iteration == iterations - 1 or not meter.affordable(cost + plain)
        optimizer.zero_grad()
        with torch.set_grad_enabled(not last):
            look = look_at(noise, iteration, not last)
        if look.losses is not None:
            look.losses.sum().backward()  # type: ignore[no-untyped-call]
            meter.spend(0, backwards=plain)
        trace.saw(look.rewards, look.media, problem.full(noise.detach()))
        if last:
            break
        _step(noise, optimizer, look.rewards, trace, iteration, clip)


def nesterov(noise: Tensor, lr: float, momentum: float) -> torch.optim.Optimizer:
    """SGD of a noise with Nesterov momentum; plain SGD for momentum 0."""
    return torch.optim.SGD([noise], lr=lr, momentum=momentum, nesterov=momentum > 0)


def clipped(gradient: Tensor, most: float) -> Tensor:
    """Gradients `[B, ...]`, each row scaled to a norm of at most `most`, as `clip_grad_norm_` does with one."""
    norms = gradient.flatten(1).norm(dim=1)
    return gradient * expand_as((most / (norms + 1e-6)).clamp(max=1.0), gradient)


def _step(
    noise: Tensor,
    optimizer: torch.optim.Optimizer,
    rewards: Tensor,
    trace: Trace,
    iteration: int,
    clip: float,
) -> None:
    """One step of every prompt that is well; the others stay where they are for good."""
    assert noise.grad is not None
    well = noise.grad.flatten(1).isfinite().all(1) & rewards.detach().isfinite().to(noise.device)
    for row in (~well).nonzero().flatten().tolist():
        trace.fail(row, _not_finite(rewards[row], iteration))
    well = well & torch.tensor([row not in trace.failures for row in range(len(noise))]).to(noise.device)
    before = noise.detach().clone()
    noise.grad = clipped(torch.where(expand_as(well, noise), noise.grad, 0.0), clip)
    optimizer.step()
    with torch.no_grad():
        noise.copy_(where_rows(well, noise, before))


def _not_finite(reward: Tensor, iteration: int) -> str:
    what = "gradient" if bool(reward.isfinite()) else "reward"
    return (
        f"the {what} is not a finite number at iteration {iteration}; the best picture before it is kept. Try "
        "model.precision=fp32 or bf16, a smaller lr, or a VAE that is safe in half precision (model.vae)."
    )
