"""Implicit accuracy on held-out pairs: does the policy prefer what people preferred? No picture is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign.evaluation.statistics import wilson
from diffalign.randomness import Draw, derive_seed

DRAWS = 4


def draws_seed(seed: int) -> int:
    """Seed of the fixed draws that `implicit_accuracy` measures at."""
    return derive_seed(seed, "held_out")


def implicit_accuracy(
    trainer: Any, backbone: Any, cache: Any, *, seed: int, batch_size: int, draws: int = DRAWS
) -> dict[str, float]:
    """Share of held-out pairs whose mean margin over `draws` fixed (time, noise) draws is above 0.

    The draws depend on (`seed`, draw, record) only: two calls, at any point of a run or with another batch
    size, see the same noise and times, and the times of a draw cover the range evenly over the whole set.
    Ties (preference one half) are left out; a margin of exactly 0 counts as half right, so that an untrained
    policy has accuracy one half.

    Args:
        trainer: gives `deltas(batch, draw) -> (chosen [B], rejected [B])`, policy minus reference error,
            and `margin(chosen, rejected) -> [B]`, positive when the chosen picture gained more.
        cache: held-out pairs with `len` and `fetch(draw) -> PairBatch`.

    Returns:
        `implicit_accuracy` with its 95 % Wilson interval `implicit_accuracy_low`, `implicit_accuracy_high`;
        means of `margin`, `chosen_delta`, `rejected_delta`; counts `pairs` (used) and `ties` (left out).
        With no decided pair, all but the counts are NaN.
    """
    size = len(cache)
    key = draws_seed(seed)
    per_draw = []
    with backbone.inference():
        for step in range(draws if size else 0):
            starts = range(0, size, batch_size)
            indices = [range(start, min(start + batch_size, size)) for start in starts]
            rows = [_measure(trainer, backbone, cache, Draw(key, step, part, part, size)) for part in indices]
            per_draw.append(torch.cat(rows, 1))
    return _summary(torch.stack(per_draw).mean(0) if per_draw else torch.empty(4, 0))


def _measure(trainer: Any, backbone: Any, cache: Any, draw: Draw) -> Tensor:
    """Margin, chosen and rejected error change and preference of a batch, `[4, B]` in float64 on the CPU."""
    batch = cache.fetch(draw).to(backbone.device)
    chosen, rejected = trainer.deltas(batch, draw)
    columns = (trainer.margin(chosen, rejected), chosen, rejected, batch.preference)
    return torch.stack([column.double().cpu() for column in columns])


def _summary(columns: Tensor) -> dict[str, float]:
    """The result from margin, chosen and rejected error change and preference of all pairs, `[4, N]`."""
    margin, chosen, rejected, preference = columns[:, columns[3] != 0.5]
    pairs = len(margin)
    counts = {"pairs": float(pairs), "ties": float(columns.shape[1] - pairs)}
    names = ("implicit_accuracy", "implicit_accuracy_low", "implicit_accuracy_high")
    if pairs == 0:
        return dict.fromkeys((*names, "margin", "chosen_delta", "rejected_delta"), float("nan")) | counts
    agrees = torch.where(preference > 0.5, margin, -margin)
    right = float((agrees > 0).sum()) + 0.5 * float((agrees == 0).sum())
    return {
        **dict(zip(names, (right / pairs, *wilson(right, pairs)), strict=True)),
        "margin": float(margin.mean()),
        "chosen_delta": float(chosen.mean()),
        "rejected_delta": float(rejected.mean()),
        **counts,
    }
