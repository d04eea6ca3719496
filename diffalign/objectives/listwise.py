"""Losses of ranked groups: K pictures of one prompt, scored or ordered.

Scores `s` `[B, K]` are implicit rewards `-(beta / 2) delta` of a policy, or a reward model's. Losses are `[B]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def plackett_luce_loss(scores: Tensor, values: Tensor) -> Tensor:
    """`-sum_k log (exp s_(k) / sum_{i >= k} exp s_(i))` with (k) the k-th best by `values` `[B, K]`.

    For K = 2 it is the DPO loss. Ties in `values` are ordered by position. Source: Plackett 1975 and Luce 1959; DPO
    (arXiv 2305.18290), appendix A.3; PRO (arXiv 2306.17492) without its temperatures.
    """
    ranked = scores.gather(1, values.argsort(dim=1, descending=True, stable=True))
    remaining = ranked.flip(1).logcumsumexp(1).flip(1)
    return (remaining - ranked).sum(1)


def lambda_weights(scores: Tensor, values: Tensor) -> Tensor:
    """`|2^y_i - 2^y_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|` `[B, K, K]`, without gradient.

    Ranks are those of the current scores, 1 for the largest: a pair weighs what swapping it would change in the
    discounted cumulative gain. `values` y are graded relevances, best in [0, 1].
    """
    order = scores.detach().argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(scores.shape[1]).to(order).expand_as(order)
    )
    discount = 1 / torch.log1p(rank.to(scores.dtype) + 1)
    gain = torch.exp2(values)
    return (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()


def lipo_lambda_loss(scores: Tensor, values: Tensor) -> Tensor:
    """`sum_{y_i > y_j} w_ij log(1 + exp(-(s_i - s_j)))` with `w` = `lambda_weights`.

    Source: LiPO-lambda (Liu et al. 2024, arXiv 2402.01878).
    """
    better = values[:, :, None] > values[:, None, :]
    losses = F.softplus(-(scores[:, :, None] - scores[:, None, :]))
    return (torch.where(better, losses, 0.0) * lambda_weights(scores, values)).sum((1, 2))


def softmax_matching_loss(scores: Tensor, values: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of softmax(s) to softmax(y / temperature): matches the reward-tilted distribution over the group.

    Zero gradient where the scores equal `values / temperature` up to a constant.
    """
    return -(torch.softmax(values / temperature, 1) * torch.log_softmax(scores, 1)).sum(1)


def all_pairs(values: Tensor, threshold: float = 0.0) -> Tensor:
    """Which ordered pairs (i better than j by more than `threshold`) a group holds: `[B, K, K]`, boolean."""
    return values[:, :, None] - values[:, None, :] > threshold
