"""Scores relative to the samples of the same group: win rates, ranks, disagreement. NaN scores take no part.

Nothing here depends on a reward's scale, and nothing here has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_win_rate(scores: Tensor) -> Tensor:
    """Share of the K - 1 others of its group that each sample beats, a tie counting one half: `[G, K]` to `[G, K]`.

    A sample without rivals gets 0.5, a NaN score NaN.
    """
    return _nan_where_unknown(_mean_over_rivals(_wins(scores), _rivals(scores), 0.5), scores)


def win_rate_among(scores: Tensor, groups: Tensor) -> Tensor:
    """The same for a flat batch `[B]` with group labels `[B]`, groups of any size."""
    rates = _mean_over_rivals(_wins(scores), _rivals(scores, groups), 0.5)
    return _nan_where_unknown(rates, scores)


def win_rate_std(scores: Tensor, stds: Tensor, groups: Tensor) -> Tensor:
    """Std `[B]` of the win rate of scores that are uncertain by `stds` `[B]` (normal, independent).

    `mean_j sqrt(p_ij (1 - p_ij))` with `p_ij = Phi((r_i - r_j) / sqrt(s_i^2 + s_j^2))`: an upper bound, reached when
    the comparisons of a sample are all wrong together, as they are when its own score is off.
    """
    spread = (stds[:, None].square() + stds[None].square()).sqrt()
    gap = scores[:, None] - scores[None]
    p = torch.where(spread > 0, torch.special.ndtr(gap / spread), _wins(scores))
    bound = _mean_over_rivals((p * (1 - p)).clamp_min(0).sqrt(), _rivals(scores, groups), 0.0)
    return _nan_where_unknown(bound, scores)


def rank_average(scores: Tensor, groups: Tensor | None = None) -> Tensor:
    """Mean over the rewards `[R, B]` of each sample's rank in its group, scaled to 0 (worst) .. 1 (best): `[B]`.

    Ties share their mean rank, which makes the scaled rank equal to the win rate.
    """
    labels = torch.zeros(scores.shape[1], dtype=torch.long, device=scores.device)
    labels = labels if groups is None else groups
    return torch.stack([win_rate_among(row, labels) for row in scores]).mean(0)


def disagreement(proxy: Tensor, auxiliaries: Tensor) -> Tensor:
    """GARDO's uncertainty `win rate(proxy) - mean win rate(auxiliaries)`: `[G, K]`, `[M, G, K]` to `[G, K]`.

    High where the optimised reward ranks a sample above what the held-out ones do (arXiv 2512.24138).
    """
    return group_win_rate(proxy) - group_win_rate(auxiliaries).mean(0)


def most_disputed(uncertainty: Tensor, share: float = 0.1) -> Tensor:
    """Mask of the share of samples with the highest uncertainty, at least one: GARDO regularises only these.

    Raises:
        ValueError: share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of samples is {share}; expected a value in (0, 1]")
    flat = uncertainty.flatten()
    chosen = flat.nan_to_num(-torch.inf).topk(max(1, round(share * flat.numel()))).indices
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[chosen] = True
    return mask.view_as(uncertainty)


def _wins(scores: Tensor) -> Tensor:
    """`[..., K]` to `[..., K, K]`: 1 where row beats column, 0.5 for a tie."""
    row, column = scores.unsqueeze(-1), scores.unsqueeze(-2)
    return (row > column).float() + 0.5 * (row == column).float()


def _rivals(scores: Tensor, groups: Tensor | None = None) -> Tensor:
    """Which columns `[..., K, K]` a row is compared with: the others of its group that have a score."""
    k = scores.shape[-1]
    known = ~scores.isnan()
    rivals = known.unsqueeze(-1) & known.unsqueeze(-2) & ~torch.eye(k, dtype=torch.bool, device=scores.device)
    return rivals if groups is None else rivals & (groups[:, None] == groups[None])


def _mean_over_rivals(values: Tensor, rivals: Tensor, alone: float) -> Tensor:
    """Mean of `[..., K, K]` over the rivals of each row; `alone` for rows that have none."""
    count = rivals.sum(-1)
    mean = torch.where(rivals, values, 0.0).sum(-1) / count.clamp_min(1)
    return torch.where(count > 0, mean, alone)


def _nan_where_unknown(values: Tensor, scores: Tensor) -> Tensor:
    return torch.where(scores.isnan(), torch.nan, values)
