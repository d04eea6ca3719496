"""Scores against the base model's: log-sigmoid (LSC) and PAR, with the slopes that carry an uncertainty through."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Percentile = Literal["normal", "empirical"]


def log_sigmoid(scores: Tensor, reference: Tensor | float, scale: Tensor | float = 1.0) -> Tensor:
    """`log sigmoid((r - r_ref) / scale)`: saturates for good samples, linear for bad ones (arXiv 2402.00742).

    A sum of such terms over rewards is high only where every reward is ("good in every respect").
    """
    return F.logsigmoid((scores - reference) / scale)


def log_sigmoid_slope(scores: Tensor, reference: Tensor | float, scale: Tensor | float = 1.0) -> Tensor:
    """Derivative of `log_sigmoid` with respect to the score."""
    return torch.sigmoid(-(scores - reference) / scale) / scale


def par(scores: Tensor, references: Tensor, k: float = 1.0) -> Tensor:
    """Preference as reward: `mean_m sigmoid(k (r - r_ref^m))`, bounded in (0, 1) (arXiv 2502.18770).

    Args:
        scores: `[B]`. references: base scores of each sample's prompt `[B, M]`, NaN where there are fewer than M.
    """
    preferred, known = _preferred(scores, references, k)
    return (preferred * known).sum(1) / known.sum(1)


def par_slope(scores: Tensor, references: Tensor, k: float = 1.0) -> Tensor:
    """Derivative of `par` with respect to the score `[B]`."""
    p, known = _preferred(scores, references, k)
    return (k * p * (1 - p) * known).sum(1) / known.sum(1)


def _preferred(scores: Tensor, references: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """`sigmoid(k (r - r_ref))` `[B, M]`, and which are known; NaN inside would reach the gradient of its row."""
    known = ~references.isnan()
    return torch.sigmoid(k * (scores[:, None] - references.nan_to_num(0.0))), known


def reference_std(references: Tensor) -> Tensor:
    """Unbiased std of each row of `[B, M]` without its NaNs; 0 for a single score."""
    known = (~references.isnan()).sum(1)
    squares = (references - references.nanmean(1, keepdim=True)).square().nansum(1)
    return (squares / (known - 1).clamp_min(1)).sqrt()


def reference_percentile(references: Tensor, q: float = 0.85, method: Percentile = "normal") -> Tensor:
    """The q-quantile of each row of `[B, M]`, NaNs left out.

    `normal` fits a normal distribution (mean + z_q std): steadier with the ten or so samples that a prompt has.
    `empirical` interpolates between the sorted scores.

    Raises:
        ValueError: q outside (0, 1).
    """
    if not 0 < q < 1:
        raise ValueError(f"a percentile is {q}; expected a value between 0 and 1")
    if method == "empirical":
        return references.nanquantile(q, dim=1)
    z = torch.special.ndtri(torch.tensor(q, dtype=torch.float64)).to(references)
    return references.nanmean(1) + z * reference_std(references)
