"""What keeps optimised noise like noise: the norm term of ReNO and the concentration term of DNO.

Both are penalties to add to a loss, differentiable, one per noise, computed in float32 at the least: squares of a
half-precision latent overflow in a sum of 16,384 terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.precision import at_least_float32
from diffalign.randomness import generator

# DNO's floor: each of two bounds is at most 1/2, so each log is at most -ln 2, in the given order and on average over
# permutations.
CONCENTRATION_FLOOR = 4 * math.log(2)


def norm_penalty(noises: Tensor) -> Tensor:
    """`|e|^2 / 2 - (d - 1) log |e|` per noise `[B]`: the negative log-density of the norm of Gaussian noise.

    ReNO (Eyring et al. 2024, arXiv 2406.04312), after Samuel et al. 2023. The norm of d Gaussian numbers is
    chi-distributed and the penalty least at `|e|^2 = d - 1`. It says nothing about the direction: structured noise of
    the right norm costs nothing.

    Args:
        noises: `[B, ...]`, d numbers each. The log of a noise of zeros is infinite.
    """
    flat = at_least_float32(noises.flatten(1))
    square = flat.square().sum(1)
    return square / 2 - (flat.shape[1] - 1) * square.log() / 2


def norm_penalty_minimum(elements: int) -> float:
    """The least value of `norm_penalty` for noises of d > 1 elements, `(d - 1) (1 - log(d - 1)) / 2`."""
    return (elements - 1) * (1 - math.log(elements - 1)) / 2


def concentration_penalty(
    noises: Tensor, seed: int = 0, *, group: int = 4, permutations: int = 100
) -> Tensor:
    """How unlikely the mean and covariance of groups of elements are for Gaussian noise, `[B]`, at least 4 ln 2.

    DNO (Tang et al. 2024, arXiv 2405.18881, section 4): elements are cut into groups of k numbers, in the given order
    and in random ones, and concentration bounds on the mean and on the covariance of these vectors give
    log-probabilities p1 and p2. The penalty is `-(p1 + p2)` in the given order plus its average over permutations. It
    is at its floor, with gradient 0, for typical noise.

    Args:
        noises: `[B, ...]`; elements that do not fill a group are left out. seed: of the permutations, the same for
            all rows; a new one at each iteration averages over more of them. group: k. permutations: 0 leaves their
            term out.

    Returns:
        The penalty; `2 ln 2` at the least without permutations.
    """
    flat = at_least_float32(noises.flatten(1))
    found = -log_bounds(flat, group)
    if not permutations:
        return found
    average = torch.zeros_like(found)
    for number in range(permutations):
        # A permuted copy of all elements per permutation would be held for the backward pass: 100 times the noise.
        average = average + checkpoint(_permuted_bounds, flat, (seed, number), group, use_reentrant=False)
    return found - average / permutations


def log_bounds(flat: Tensor, group: int) -> Tensor:
    """`p1 + p2` of rows `[B, N]` cut into n vectors of k = `group` consecutive elements, `[B]`, at most -2 ln 2.

    `p1 = min(-n |mean|^2 / (2 k), -ln 2)` and `p2 = min(-n/2 max(sqrt(1 + D) - 1 - sqrt(k / n), 0)^2, -ln 2)`, D the
    spectral norm of `S^T S / n - I`, whose mean is not taken out. Neither norm is taken as a root: the gradient of
    one is not defined at 0, nor that of singular vectors where singular values are equal.
    """
    count = flat.shape[1] // group
    vectors = flat[:, : count * group].view(len(flat), count, group)
    mean_square = vectors.mean(1).square().sum(1)
    excess = vectors.transpose(1, 2) @ vectors / count - torch.eye(
        group, dtype=flat.dtype, device=flat.device
    )
    deviation = torch.linalg.eigvalsh(excess).abs().amax(1)
    beyond = ((1 + deviation).sqrt() - 1 - math.sqrt(group / count)).clamp(min=0)
    first = (-count * mean_square / (2 * group)).clamp(max=-math.log(2))
    second = (-count * beyond.square() / 2).clamp(max=-math.log(2))
    return first + second


def _permuted_bounds(flat: Tensor, keys: Sequence[int], group: int) -> Tensor:
    order = torch.randperm(flat.shape[1], generator=generator("concentration", *keys))
    return log_bounds(_Permuted.apply(flat, order.to(flat.device)), group)


class _Permuted(torch.autograd.Function):
    """Columns `[B, N]` in another order. The gradient of indexing adds up repeated columns, 50 times slower."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return flat.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return torch.empty_like(grad).index_copy_(1, order, grad), None
