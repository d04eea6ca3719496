"""Losses of a pair as functions of its implicit rewards, and what any of them can carry.

Notation: `r = -(beta / 2) delta` is the implicit reward of a picture with beta inside it, `h = r_chosen - r_rejected`
the margin, p the probability that the chosen one is preferred. LLM papers write `beta log(pi / pi_ref)` for r, so
their formulas hold here with their beta set to 1. Every loss is the expectation over the label, so that a soft label,
a tie or an assumed rate of wrong labels means the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.objectives.pairwise import check_share

# exp of more than this overflows soon after in float32 products; TRL clamps there, too.
MAX_EXPONENT = 80.0


@dataclass(frozen=True)
class PairRewards:
    """Implicit rewards `[B]` of chosen and rejected, and the margin `[B]` between them."""

    chosen: Tensor
    rejected: Tensor
    margin: Tensor

    def swapped(self) -> PairRewards:
        """The same pairs with the opposite labels."""
        return PairRewards(self.rejected, self.chosen, -self.margin)


PairLoss = Callable[[PairRewards, Tensor], Tensor]
"""Rewards `[B]` and preference p `[B]` to losses `[B]`."""


def expected(certain: Callable[[PairRewards], Tensor]) -> PairLoss:
    """The loss of soft labels, `p L + (1 - p) L(labels swapped)`, from the loss of certain ones."""

    def loss(rewards: PairRewards, preference: Tensor) -> Tensor:
        return preference * certain(rewards) + (1 - preference) * certain(rewards.swapped())

    return loss


def _sigmoid(rewards: PairRewards) -> Tensor:
    return -F.logsigmoid(rewards.margin)


def _hinge(rewards: PairRewards) -> Tensor:
    return F.relu(1 - rewards.margin)


def _ipo(rewards: PairRewards) -> Tensor:
    return (rewards.margin - 0.5).square()


def _nca(rewards: PairRewards) -> Tensor:
    pushed_down = F.logsigmoid(-rewards.chosen) + F.logsigmoid(-rewards.rejected)
    return -F.logsigmoid(rewards.chosen) - 0.5 * pushed_down


def _bce(rewards: PairRewards) -> Tensor:
    return -F.logsigmoid(rewards.chosen) - F.logsigmoid(-rewards.rejected)


def _apo_zero(rewards: PairRewards) -> Tensor:
    return torch.sigmoid(-rewards.chosen) + torch.sigmoid(rewards.rejected)


def _apo_down(rewards: PairRewards) -> Tensor:
    return torch.sigmoid(rewards.chosen) + torch.sigmoid(-rewards.margin)


def exo_loss(rewards: PairRewards, preference: Tensor) -> Tensor:
    """`KL(sigmoid(h) || p)`, zero at `h = log(p / (1 - p))`; p must be inside (0, 1).

    Source: EXO (Ji et al. 2024, arXiv 2402.00856) with p = 1 - e; DMPO of Diffusion-SDPO's release is the same.
    """
    h = rewards.margin
    win = torch.sigmoid(h) * (F.logsigmoid(h) - torch.log(preference))
    return win + torch.sigmoid(-h) * (F.logsigmoid(-h) - torch.log1p(-preference))


def sppo_loss(rewards: PairRewards, preference: Tensor) -> Tensor:
    """`(r_chosen - (p - 1/2))^2 + (r_rejected + (p - 1/2))^2`: each side on its own towards its win probability.

    Source: SPPO (Wu et al. 2024, arXiv 2405.00675), times beta^2; p = 1 is TRL's `sppo_hard`.
    """
    goal = preference - 0.5
    return (rewards.chosen - goal).square() + (rewards.rejected + goal).square()


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": expected(_sigmoid),  # DPO (arXiv 2305.18290): -log sigmoid(h)
    "hinge": expected(_hinge),  # SLiC (arXiv 2305.10425): max(0, 1 - h)
    "ipo": expected(_ipo),  # IPO (arXiv 2310.12036), times beta^2: (h - 1/2)^2
    "exo": exo_loss,
    "sppo": sppo_loss,
    "nca": expected(_nca),  # NCA (arXiv 2402.05369) for pairs: keeps r_chosen finite
    "bce": expected(_bce),  # each picture alone (arXiv 2412.01981); TRL's bco_pair without its running mean
    "apo_zero": expected(_apo_zero),  # APO (arXiv 2408.06266): chosen up, rejected down
    "apo_down": expected(_apo_down),  # APO, eq. 8: both down, the rejected one more
}


def debiased_preference(preference: Tensor, flip_rate: float) -> Tensor:
    """`(p - e) / (1 - 2 e)`: undoes a known rate e of flipped labels; outside [0, 1] for certain ones.

    The expected loss at this p is robust DPO, `((1 - e) L(h) - e L(-h)) / (1 - 2 e)` (Chowdhury et al. 2024,
    arXiv 2403.00409): unbiased over the flips, but unbounded below for the sigmoid loss.

    Raises:
        ValueError: a rate outside [0, 0.5).
    """
    check_share(flip_rate, "flip_rate")
    return (preference - flip_rate) / (1 - 2 * flip_rate)


def divergence_reward(reward: Tensor, divergence: str, alpha: float = 0.5) -> Tensor:
    """`f'(u) - f'(1)` of an f-divergence at `u = exp(reward)`: 0 at 0, where all but `js` (1/2) have slope 1.

    reverse_kl `r`; forward_kl `1 - exp(-r)`; js `log sigmoid(r) + log 2`; alpha `(1 - exp(-a r)) / a`, which is the
    reverse KL for a to 0 and the forward KL for a = 1. Source: f-DPO (Wang et al. 2023, arXiv 2309.16240).
    It is applied to the reward with beta inside it: a mean over elements hides the scale of the true log-ratio.

    Raises:
        ValueError: unknown divergence.
    """
    if divergence == "reverse_kl":
        return reward
    if divergence == "forward_kl":
        return -torch.expm1((-reward).clamp(max=MAX_EXPONENT))
    if divergence == "js":
        return F.logsigmoid(reward) - F.logsigmoid(torch.zeros_like(reward))
    if divergence == "alpha":
        return -torch.expm1((-alpha * reward).clamp(max=MAX_EXPONENT)) / alpha
    raise ValueError(f"divergence is {divergence!r}; expected reverse_kl, forward_kl, js or alpha")


def dynamic_beta_factor(preference: Tensor, weight: float, sharpness: float = 0.5) -> Tensor:
    """`1 + w (1 - exp(-k m))`: the factor on a pair's beta for its reward gap m `[B]`.

    The gap is the one that the label states, `m = log(p / (1 - p))` for p > 1/2: 0 for a tie, infinite for a
    certain label. Source: MM-DPO (arXiv 2502.10391), w = k = 0.5 there.
    """
    gap = torch.logit(preference.clamp(min=0.5))
    return 1 + weight * -torch.expm1(-sharpness * gap)


def smoothed_margin(margin: Tensor, preference: Tensor, scale: float = 10.0) -> Tensor:
    """`c (2 p - 1) h`: a margin that counts as much as the label is sure; 0 for a tie.

    Source: SmPO-Diffusion (Lu et al. 2025, arXiv 2506.02698), c = 10 in the release.
    """
    return scale * (2 * preference - 1) * margin


def safeguarded_delta(rejected_delta: Tensor, chosen_error: Tensor, overlap: Tensor, mu: float) -> Tensor:
    """The rejected delta `[B]` with its value as it was and its gradient times lambda in [0, 1].

    `lambda = (1 - mu) |e_w|^2 / <e_w, e_l>`, 1 where the errors point apart: to first order a step in output space
    then lowers the chosen error at least mu times as fast as without the rejected side. Source: Diffusion-SDPO (arXiv
    2511.03317), one lambda per pair here, one per micro-batch in the release.

    Args:
        chosen_error: mean square of e_w. overlap: mean product of e_w and e_l, both `[B]` without gradient.
    """
    bound = (1 - mu) * chosen_error / overlap.clamp(min=1e-12)
    factor = torch.where(overlap > 0, bound.clamp(0, 1), 1.0)
    value = rejected_delta.detach()
    return value + factor * (rejected_delta - value)


def imitation_loss(rewards: PairRewards, preference: Tensor) -> Tensor:
    """`-(p r_chosen + (1 - p) r_rejected)`: fine-tuning on the preferred picture in the units of the rewards.

    The gradient is beta / 2 times that of its error, and the value 0 at the start. Added to a preference loss
    it is RPO (Liu et al. 2024, arXiv 2405.16436), whose factor 1 would do nothing to errors of about 0.1.
    """
    return -(preference * rewards.chosen + (1 - preference) * rewards.rejected)
