"""Gradients of rewards that have none: how a black box rises around a picture, and the generator's own derivative.

DNO's hybrid gradient (Tang et al. 2024, arXiv 2405.18881, section 3): a direction g in the space of pictures (or
latents) is estimated by asking the reward at points around the current one; then `<g, picture>` is differentiated, so
that only the generator has to be. The release's g is `sum_i (r_i - r_0) (x_i - x_0)`; here points come in opposite
pairs, whose differences have no second-order error.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffalign.inference.problem import Problem
from diffalign.inference.search import draw
from diffalign.process import expand_as
from diffalign.sampling.rollout import chunks

Around = Literal["noise", "latent", "picture"]
"""What is perturbed: the noises, and their pictures are compared; the clean latents; or the pixels."""


def direction(steps: Tensor, rises: Tensor) -> Tensor:
    """Where a reward rises, `[B, *]` of norm 1: steps weighted by their rises; 0 where no step makes a difference.

    For independent normal steps u and rises `r(x + u) - r(x - u)` of a quadratic reward, the sum is on average
    proportional to the gradient, whatever the curvature.

    Args:
        steps: `[B, P, *]`. rises: `[B, P]`, NaN where the reward failed, which counts as no rise.
    """
    known = torch.where(rises.isfinite(), rises, 0.0).to(steps)
    total = torch.einsum("bp...,bp->b...", steps, known)
    norms = total.flatten(1).norm(dim=1)
    return total / expand_as(torch.where(norms > 0, norms, 1.0), total)


def probed_direction(
    problem: Problem, around: Around, at: Tensor, *, mu: float, pairs: int, iteration: int
) -> Tensor:
    """The direction `[B, *]` in pictures or latents in which each prompt's reward rises; nothing has gradients.

    Args:
        at: what is perturbed, `[B, *]`: noises `[B, *shape]`, latents or pictures. mu: standard deviation of the
            perturbation. pairs: of perturbations per prompt; each costs two rewards, and two generations around noises.
    """
    with torch.no_grad():
        steps = mu * draw(problem.seeds, pairs, at.shape[1:], iteration, "probe").to(at)
        up, down = (_pictures(problem, around, at[:, None] + sign * steps) for sign in (1, -1))
        rises = _rewards(problem, up) - _rewards(problem, down)
        return direction(up - down if around == "noise" else steps, rises.to(at.device))


def extra_cost(problem: Problem, around: Around, pairs: int) -> int:
    """Network evaluations of one direction per prompt."""
    return 2 * pairs * problem.generation.cost if around == "noise" else 0


def _pictures(problem: Problem, around: Around, points: Tensor) -> Tensor:
    """Pictures `[B, P, 3, H, W]` of points `[B, P, *]`; pixels are clamped to what rewards take."""
    if around == "picture":
        return points.clamp(0, 1)
    many, flat = points.shape[1], points.flatten(0, 1)
    if around == "noise":
        rows = [row for row in range(len(points)) for _ in range(many)]
        problem.meter.spend(problem.generation.cost * many)
        media = problem.generation.media(problem.full(flat, rows), rows)
    else:
        size = problem.generation.sampler.batch_size
        parts = [problem.generation.decode(flat[p.start : p.stop]) for p in chunks(len(flat), size)]
        media = torch.cat(parts)
    return media.unflatten(0, (-1, many)).to(points.device)


def _rewards(problem: Problem, pictures: Tensor) -> Tensor:
    """Scores `[B, P]` on the CPU of pictures `[B, P, 3, H, W]`."""
    many, flat = pictures.shape[1], pictures.flatten(0, 1)
    texts = [text for text in problem.texts for _ in range(many)]
    size = problem.generation.sampler.batch_size
    found = [
        problem.objective(flat[part.start : part.stop], texts[part.start : part.stop]).float().cpu()
        for part in chunks(len(flat), size)
    ]
    return torch.cat(found).unflatten(0, (-1, many))
