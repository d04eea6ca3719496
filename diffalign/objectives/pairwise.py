"""Preference losses on pairs.

Notation: `error` is the mean squared error of a prediction over the elements of one sample, `delta` is the
policy's error minus the reference's at the same `x_t`, `t` and target, and the margin
`h = -(beta / 2) (delta_chosen - delta_rejected)` is the difference of the implicit rewards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, `[B, ...]` to `[B]`, in float32 whatever the inputs' dtype."""
    return (pred.float() - target.float()).square().flatten(1).mean(1)


def error_delta(pred: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """Policy error minus reference error per sample, `[B, ...]` to `[B]`, in float32.

    Computed as `mean[(p - p_ref) ((p - y) + (p_ref - y))]`: the difference of two nearly equal errors would lose
    the digits that beta then multiplies by thousands.
    """
    pred, reference, target = pred.float(), reference.float(), target.float()
    return ((pred - reference) * ((pred - target) + (reference - target))).flatten(1).mean(1)


def error_overlap(pred: Tensor, target: Tensor) -> Tensor:
    """Mean product of the error vectors of row i and row B + i, `[2B, ...]` to `[B]`, in float32, no gradient."""
    chosen, rejected = (pred.detach().float() - target.float()).flatten(1).chunk(2)
    return (chosen * rejected).mean(1)


def dpo_margin(chosen_delta: Tensor, rejected_delta: Tensor, beta: float | Tensor) -> Tensor:
    """The DPO logit `-(beta / 2) (delta_chosen - delta_rejected)` per pair `[B]`.

    Source: Wallace et al. 2023 (arXiv 2311.12908), eq. 14, with the constants of the released code: beta belongs to
    errors that are means over elements, T and the time weight are inside it.
    """
    return -0.5 * beta * (chosen_delta - rejected_delta)


def dpo_loss(margin: Tensor, preference: Tensor | float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """`-p log sigmoid(h) - (1 - p) log sigmoid(-h)` per pair `[B]`.

    `preference` p in [0, 1] is the probability that the chosen one is preferred (0.5 for a tie). Label smoothing e
    mixes p towards its opposite, `p (1 - e) + (1 - p) e` (conservative DPO, Mitchell 2023), which puts the optimum
    for p = 1 at `h = log((1 - e) / e)`.

    Raises:
        ValueError: label smoothing outside [0, 0.5).
    """
    p = torch.as_tensor(preference, dtype=margin.dtype, device=margin.device)
    p = smoothed_preference(p, label_smoothing)
    return -p * F.logsigmoid(margin) - (1 - p) * F.logsigmoid(-margin)


def smoothed_preference(preference: Tensor, label_smoothing: float) -> Tensor:
    """`p (1 - e) + (1 - p) e`: labels of which a share e is taken to be wrong (conservative DPO, Mitchell 2023).

    Raises:
        ValueError: a share outside [0, 0.5).
    """
    check_share(label_smoothing, "label_smoothing")
    return preference * (1 - label_smoothing) + (1 - preference) * label_smoothing


def check_share(value: float, name: str) -> None:
    """A share of wrong labels.

    Raises:
        ValueError: it is outside [0, 0.5).
    """
    if not 0.0 <= value < 0.5:
        raise ValueError(f"{name} is {value}; expected a value in [0, 0.5)")
