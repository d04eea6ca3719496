"""Pair losses that know no reference: they compare the policy's errors of chosen and rejected directly.

All take errors `[B]` that are means over elements, at noise and time shared by the pair.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this the quotient's series has an error of 1e-13, and the quotient itself divides zero by zero.
SMALL = 1e-6


def likelihood_proxy(error: Tensor) -> Tensor:
    """`l / (e^l - 1)` with its limit 1 at l = 0: MaPO's stand-in for a likelihood of an error l.

    Decreasing in l, with slope -1/2 at 0. `expm1` keeps the digits that `exp(l) - 1` loses for small errors.
    """
    safe = error.clamp(min=SMALL)
    return torch.where(error < SMALL, 1 - error / 2, safe / torch.expm1(safe))


def mapo_margin(chosen: Tensor, rejected: Tensor, snr: float = 0.5, steps: int = 1000) -> Tensor:
    """`T (phi(s l_w) - phi(s l_l))` with `phi` = `likelihood_proxy`: near `-(T s / 2) (l_w - l_l)` for small errors."""
    return steps * (likelihood_proxy(snr * chosen) - likelihood_proxy(snr * rejected))


def mapo_loss(chosen: Tensor, rejected: Tensor, preference: Tensor, beta: float, snr: float = 0.5) -> Tensor:
    """MaPO as released: `l_w - beta log sigmoid(T (phi(s l_w) - phi(s l_l)))`, T = 1000, s = 0.5, beta 0.1.

    Soft labels weigh both orders. Source: Hong et al. 2024 (arXiv 2406.06424), `compute_loss` of the release.
    """
    return _soft(
        lambda w, l: w - beta * F.logsigmoid(mapo_margin(w, l, snr)),  # noqa: E741
        chosen,
        rejected,
        preference,
    )


def mapo_paper_loss(chosen: Tensor, rejected: Tensor, preference: Tensor, beta: float) -> Tensor:
    """MaPO as in the paper's second version: `l_w - (1 / beta) log sigmoid(phi(l_w)^beta - phi(l_l)^beta)`.

    Another parametrisation: beta 8 for general preferences, up to 1024 for personalisation. The exponent was read
    from the paper's extracted text, not from code.
    """

    def loss(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        margin = likelihood_proxy(w).pow(beta) - likelihood_proxy(l).pow(beta)
        return w - F.logsigmoid(margin) / beta

    return _soft(loss, chosen, rejected, preference)


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    preference: Tensor,
    beta: float,
    gamma: float = 0.0,
    sft_weight: float = 0.0,
) -> Tensor:
    """`-log sigmoid(-(beta / 2) (l_w - l_l) - gamma) + a (beta / 2) l_w`: target margin gamma, without reference.

    Source: SimPO (Meng et al. 2024, arXiv 2405.14734) with a = 0; CPO (Xu et al. 2024, arXiv 2401.08417) with
    gamma = 0 and a above 0, in units of beta / 2.
    """

    def loss(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return -F.logsigmoid(-0.5 * beta * (w - l) - gamma) + sft_weight * 0.5 * beta * w

    return _soft(loss, chosen, rejected, preference)


def imitation_error(chosen: Tensor, rejected: Tensor, preference: Tensor, temperature: float = 1.0) -> Tensor:
    """`q l_w + (1 - q) l_l`, q = sigmoid(logit(p) / temperature): fine-tuning on the preferred picture.

    For a label p = sigmoid(r_w - r_l) from rewards it is reward-weighted regression (Peters and Schaal 2007;
    Flow-RWR, arXiv 2501.13918) with the weights exp(r / temperature) normalised over the pair.
    """
    q = torch.sigmoid(torch.logit(preference) / temperature)
    return q * chosen + (1 - q) * rejected


def _soft(
    certain: Callable[[Tensor, Tensor], Tensor], chosen: Tensor, rejected: Tensor, preference: Tensor
) -> Tensor:
    """Expectation of a loss over the label."""
    return preference * certain(chosen, rejected) + (1 - preference) * certain(rejected, chosen)
