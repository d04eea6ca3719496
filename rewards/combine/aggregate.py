"""One score out of an ensemble's: members `values` `[K, ...]`, the result `[...]`. Higher is better.

Members must share a scale (mean 0, std 1 on the same media) before a minimum or a variance means anything.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def root(variance: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 instead of infinite: members that agree exactly are no reason for NaN."""
    positive = variance > 0
    return torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)


def variance(values: Tensor, unbiased: bool = True) -> Tensor:
    """Variance over the members, divided by K - 1 (unbiased) or K.

    Raises:
        ValueError: fewer than two members.
    """
    if len(values) < 2:
        raise ValueError(f"a variance over members needs at least 2; got {len(values)}")
    return values.var(0, unbiased=unbiased)


def ensemble_mean(values: Tensor) -> Tensor:
    """Plain mean over the members."""
    return values.mean(0)


def wco(values: Tensor) -> Tensor:
    """Worst-case optimisation: the lowest member (Coste et al. 2023, arXiv 2310.02743)."""
    return values.amin(0)


def uwo(values: Tensor, risk: float, unbiased: bool = True) -> Tensor:
    """Uncertainty-weighted optimisation, `mean - risk * variance` (Coste et al. 2023, arXiv 2310.02743).

    The variance, not the standard deviation. Their PPO code divides by K - 1, their best-of-N code by K.
    """
    return values.mean(0) - risk * variance(values, unbiased)


def entropic(values: Tensor, beta: float) -> Tensor:
    """Entropic risk `-beta log mean exp(-r / beta)` (arXiv 2606.09073); the mean at infinity, the minimum at 0.

    Never below the minimum and never above the mean, unlike its second-order expansion `mean - var / (2 beta)`, which
    is UWO with `risk = 1 / (2 beta)`. The minimum is taken out of the exponential, and expm1/log1p keep the digits
    that a large beta would otherwise lose.

    Raises:
        ValueError: beta is negative.
    """
    if beta < 0 or math.isnan(beta):
        raise ValueError(f"beta is {beta}; expected 0 (minimum) to infinity (mean)")
    if beta == 0:
        return wco(values)
    if math.isinf(beta):
        return ensemble_mean(values)
    lowest = values.detach().amin(0)
    return lowest - beta * torch.log1p(torch.expm1((lowest - values) / beta).mean(0))


def nominal_and_worst(values: Tensor, weight: float, nominal: int = 0) -> Tensor:
    """Reward-robust RLHF (arXiv 2409.15360): `weight * nominal member + (1 - weight) * lowest member`."""
    return weight * values[nominal] + (1 - weight) * wco(values)


def total_std(between: Tensor, within: Tensor | None) -> Tensor:
    """Std `[...]` of an ensemble as a mixture of its members (law of total variance).

    Args:
        between: variance of the members' scores `[...]`. within: the members' own std `[K, ...]`, if they have any.
    """
    return root(between if within is None else between + within.square().mean(0))
