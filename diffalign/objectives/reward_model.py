"""Losses of reward models on judged pairs, and the geometry of pluralistic (ideal-point) rewards.

Notation: the margin `d = r_chosen - r_rejected`; `preference` p in [0, 1] is the probability that the chosen one
is preferred, 0.5 for a tie. All functions are elementwise, take float tensors of any shape, and broadcast.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# 1 / sqrt(1 + pi v / 8) times a logit: the sigmoid's mean under a Gaussian of variance v, nearly (MacKay 1992).
PROBIT = math.pi / 8


def smoothed(preference: Tensor, label_smoothing: float) -> Tensor:
    """Preferences when a share `label_smoothing` of the labels is wrong: `p (1 - e) + (1 - p) e`; ties stay ties.

    Raises:
        ValueError: a share outside [0, 0.5).
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a value in [0, 0.5)")
    return preference * (1 - label_smoothing) + (1 - preference) * label_smoothing


def bradley_terry_loss(margin: Tensor, preference: Tensor) -> Tensor:
    """`-p log sigmoid(d) - (1 - p) log sigmoid(-d)`: Bradley and Terry 1952, with soft labels."""
    return -preference * F.logsigmoid(margin) - (1 - preference) * F.logsigmoid(-margin)


def ties_loss(margin: Tensor, preference: Tensor, k: float = 5.0) -> Tensor:
    """Bradley-Terry with ties in the form of Rao and Kupper 1967, with tie parameter k (5 in VideoReward).

    `P(win) = sigmoid(d - log k)`, `P(loss) = sigmoid(-d - log k)` and
    `P(tie) = (k^2 - 1) P(win) P(loss)` sum to 1. A label p between tie and win is a mixture of the two: the tie's
    share is `1 - |2 p - 1|`. Source: arXiv 2501.13918 (VideoReward), with k = 5.

    Raises:
        ValueError: k is not above 1 (at k = 1 ties are impossible).
    """
    if not k > 1.0:
        raise ValueError(f"the tie parameter k is {k}; expected a value above 1")
    win, loss = F.logsigmoid(margin - math.log(k)), F.logsigmoid(-margin - math.log(k))
    tie = math.log(k * k - 1) + win + loss
    decided = 2 * preference - 1
    return -(decided.clamp(min=0) * win + (-decided).clamp(min=0) * loss + (1 - decided.abs()) * tie)


def probit_loss(margin: Tensor, variance: Tensor, preference: Tensor) -> Tensor:
    """Loss of a Gaussian margin by the probit approximation: `-log sigmoid(d / sqrt(1 + pi v / 8))` for p = 1.

    `variance` is that of the margin, `sigma_chosen^2 + sigma_rejected^2`. A large variance makes wrong answers
    cheap and right ones dear, so that sigma learns where the labels are noisy.
    """
    return bradley_terry_loss(margin * torch.rsqrt(1 + PROBIT * variance), preference)


def sampled_loss(margin: Tensor, variance: Tensor, preference: Tensor, noise: Tensor) -> Tensor:
    """`-log E_z sigmoid(z)`, z ~ N(d, v), with standard normal `noise` `[S, ...]`: what `probit_loss` approximates."""
    samples = margin + variance.sqrt() * noise
    count = math.log(len(noise))
    win = F.logsigmoid(samples).logsumexp(0) - count
    loss = F.logsigmoid(-samples).logsumexp(0) - count
    return -preference * win - (1 - preference) * loss


def hpsv3_loss(margin: Tensor, variance: Tensor, preference: Tensor, noise: Tensor) -> Tensor:
    """`-E_z log sigmoid(z)`, z ~ N(d, v): the loss of HPSv3's release (arXiv 2508.03789), 1000 samples there.

    The logarithm stands inside the mean, so by Jensen any variance makes it larger: it always pulls sigma down.
    """
    samples = margin + variance.sqrt() * noise
    return bradley_terry_loss(samples, preference).mean(0)


def win_probability(margin: Tensor, variance: Tensor | None = None, k: float = 1.0) -> Tensor:
    """Probability that the chosen one is preferred, given that the pair is decided.

    With a `variance` of the margin by the probit approximation; with `k` above 1 under `ties_loss`,
    `P(win) / (P(win) + P(loss))`.
    """
    if variance is not None:
        margin = margin * torch.rsqrt(1 + PROBIT * variance)
    if k == 1.0:
        return torch.sigmoid(margin)
    win, loss = torch.sigmoid(margin - math.log(k)), torch.sigmoid(-margin - math.log(k))
    return win / (win + loss)


def credit(margin: Tensor, preference: Tensor) -> Tensor:
    """1 where margin and label agree, 0 where they differ, one half where either of them is undecided."""
    agreement = torch.sign(margin) * torch.sign(preference - 0.5)
    return (1 + agreement) / 2


def ideal_points(weights: Tensor, points: Tensor) -> Tensor:
    """Ideal points `[B, D]` as mixtures of prototypes.

    Args:
        weights: `[B, K]`, each row sums to 1. points: prototypes `[K, D]`, or `[B, K, D]` when they follow a prompt.

    Source: PAL (arXiv 2406.08469), `a_u = sum_k w_uk p_k`.
    """
    return torch.einsum("bk,kd->bd" if points.dim() == 2 else "bk,bkd->bd", weights, points)


def distance_reward(items: Tensor, ideals: Tensor) -> Tensor:
    """PAL-A: minus the Euclidean distance of each item `[B, D]` to its judge's ideal point `[B, D]`."""
    return -torch.linalg.vector_norm(items - ideals, dim=-1)


def angle_reward(items: Tensor, ideals: Tensor) -> Tensor:
    """PAL-B: cosine of each item `[B, D]` with its judge's ideal direction `[B, D]`."""
    return F.cosine_similarity(items, ideals, dim=-1)


def bounded(points: Tensor, norm: float = 4.0) -> Tensor:
    """Points `[..., D]` pulled back to norm `norm` where they are longer (PAL bounds its prototypes by 4)."""
    lengths = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    return points * (norm / lengths.clamp(min=norm))
