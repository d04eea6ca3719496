"""Trusting a sample less the more uncertain its score is (Ctrl-U, arXiv 2410.11236)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def inverse_uncertainty(uncertainty: Tensor, scale: float = 1.0) -> Tensor:
    """Weight `exp(-scale u)` in (0, 1] of samples with uncertainty `u >= 0`, such as a std over the reward's spread.

    In Ctrl-U the weight is not detached: with `uncertainty_weighted_loss` its gradient asks for certain samples.
    """
    return torch.exp(-scale * uncertainty)


def uncertainty_weighted_loss(
    loss: Tensor, uncertainty: Tensor, penalty: float = 1.0, scale: float = 1.0
) -> Tensor:
    """`L exp(-scale u) + penalty u` per sample (Ctrl-U, eq. 4), the heteroscedastic form.

    For a given loss the best u is `log(scale L / penalty) / scale`, so u cannot grow without bound.
    """
    return loss * inverse_uncertainty(uncertainty, scale) + penalty * uncertainty


def paired_uncertainty(first: Tensor, second: Tensor, spread: float = 1.0) -> Tensor:
    """`|r1 - r2| / spread` of two scores of one sample, such as of its predictions at times t and t + 1.

    Ctrl-U's form for depth and edges, carried over to a reward with std `spread`.
    """
    return (first - second).abs() / spread


def class_uncertainty(first: Tensor, second: Tensor) -> Tensor:
    """`KL(softmax(second) || softmax(first))` of logits `[B, C, ...]` to `[B, ...]`, in float32.

    Ctrl-U's form for segmentation.
    """
    log_p, log_q = F.log_softmax(second.float(), 1), F.log_softmax(first.float(), 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)
