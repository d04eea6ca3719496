"""Pair losses that also know rewards: several objectives, calibrated gaps, and weights of single samples.

Margins `h` `[B]` are differences of implicit rewards with beta inside them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def modpo_margin(margin: Tensor, other_gaps: Tensor, weights: Tensor) -> Tensor:
    """`(h - w_rest . (r_rest(chosen) - r_rest(rejected))) / w_1` `[B]`: the DPO logit under several objectives.

    The labels judge the first objective; the others are known as rewards. The optimum is that of the weighted sum.

    Args:
        other_gaps: gaps of the other rewards `[B, N - 1]`. weights: `[N]`, the first above 0.

    Source: MODPO (Zhou et al. 2023, arXiv 2310.03708), as its release computes it.

    Raises:
        ValueError: the numbers of weights and gaps do not fit, or the first weight is not above 0.
    """
    if len(weights) != other_gaps.shape[1] + 1 or not weights[0] > 0:
        raise ValueError(
            f"weights are {weights.tolist()} for {other_gaps.shape[1]} other rewards; expected one more weight than "
            "rewards, the first above 0"
        )
    return (margin - other_gaps @ weights[1:]) / weights[0]


def reward_gap_loss(margin: Tensor, reward_gap: Tensor) -> Tensor:
    """`(h - (R_chosen - R_rejected))^2`: regression of the implicit on the real reward gap.

    With a constant gap of 1/2 it is IPO. Source: CoPG (Flet-Berliac et al. 2024, arXiv 2406.19185) and, with clipping,
    PRDP (Deng et al. 2024, arXiv 2402.08714); CaPO (Lee et al. 2025, arXiv 2502.02588) with calibrated gaps.
    """
    return (reward_gap - margin).square()


def calibrated_rewards(rewards: Tensor) -> Tensor:
    """Mean probability `[B, K]` that each picture of a group beats the others, from rewards `[B, K]`.

    Source: CaPO (arXiv 2502.02588), `mean_j sigmoid(R_i - R_j)`, itself left out.
    """
    wins = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])
    return (wins.sum(2) - 0.5) / (rewards.shape[1] - 1)


def harmonic_reward(fidelity: Tensor, alignment: Tensor, share: float) -> Tensor:
    """`1 / (share / s_fidelity + (1 - share) / s_alignment)` of similarities in (0, 1].

    Source: lambda-Harmonic reward of RPO for subject-driven generation (Miao et al. 2024, arXiv 2407.12164), with
    similarities (1 + cosine) / 2 of ALIGN; share 0.3 to 0.7 in validation and 0 in training.
    """
    return 1 / (share / fidelity + (1 - share) / alignment)


def harmonic_rpo_loss(
    photo_error: Tensor,
    photo_delta: Tensor,
    sample_delta: Tensor,
    preference: Tensor,
    beta: float,
    imitation: float = 1.0,
) -> Tensor:
    """`a l_photo - y log sigmoid(beta k) - (1 - y) log sigmoid(-beta k)`, `k = delta_sample - delta_photo`; `[B]`.

    Args:
        photo_error: policy's error on the photograph of the subject, `[B]`.
        photo_delta, sample_delta: policy minus reference errors of the photograph and of a sample of the model, `[B]`.
        preference: y = sigmoid(r_photo - r_sample) of their `harmonic_reward`, `[B]`. The release draws a coin with it.
        imitation: weight a of the photograph's error; 1 in the release. The photograph is imitated whatever y says.

    Source: RPO (arXiv 2407.12164), `train_sdxl.py` of the release with beta 1; `train.py` has none. k has no factor
    1/2, so a beta here is half of a DPO beta.
    """
    margin = beta * (sample_delta - photo_delta)
    ranked = -preference * F.logsigmoid(margin) - (1 - preference) * F.logsigmoid(-margin)
    return imitation * photo_error + ranked


def exponential_weights(rewards: Tensor, temperature: float = 1.0) -> Tensor:
    """`exp(r / temperature)` `[B]` scaled to mean 1: weights of reward-weighted regression.

    Source: Peters and Schaal 2007; Flow-RWR (arXiv 2501.13918), where the weighted error is that of the velocity.
    """
    return torch.softmax(rewards / temperature, 0) * len(rewards)
