"""Checks that every set metric makes of its feature matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.errors import DiffalignError


def as_matrix(features: Tensor, what: str = "features", at_least: int = 1) -> Tensor:
    """Features as float64 `[N, D]`; gradients pass.

    Raises:
        DiffalignError: not a matrix, fewer than `at_least` rows, or numbers that are not finite.
    """
    if features.ndim != 2:
        raise DiffalignError(f"{what} have shape {tuple(features.shape)}; expected [N, D], a row per picture")
    if len(features) < at_least:
        raise DiffalignError(f"{what} have {len(features)} rows; this needs at least {at_least} pictures")
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).any(1).sum())
        raise DiffalignError(
            f"{what} hold NaN or infinity in {bad} of {len(features)} rows; look at the encoder's input"
        )
    return features.double()


def same_width(features: Tensor, reference_width: int) -> None:
    """Check that features come from the encoder that made the reference.

    Raises:
        DiffalignError: the widths differ.
    """
    if features.shape[-1] != reference_width:
        raise DiffalignError(
            f"features have {features.shape[-1]} numbers, the reference {reference_width}; "
            "embed both with the same encoder"
        )


def unit_rows(features: Tensor, what: str = "features") -> Tensor:
    """Rows of length 1.

    Raises:
        DiffalignError: a row is all zeros and has no direction.
    """
    lengths = features.norm(dim=1, keepdim=True)
    if (lengths == 0).any():
        raise DiffalignError(
            f"{what} have {int((lengths == 0).sum())} rows of zeros; a cosine needs a direction, so leave them out"
        )
    return features / lengths


def replacements(rows: Tensor, candidates: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[m]` or `[1]` of a set `[n, D]` and what may replace them, `[m, D]` float64, both on the set's device.

    Raises:
        DiffalignError: an index outside of the set, or candidates of another width or number.
    """
    candidates = as_matrix(candidates.detach(), "candidates").to(features.device)
    if candidates.shape[1] != features.shape[1] or len(rows) not in (1, len(candidates)):
        raise DiffalignError(
            f"{len(rows)} rows of width {features.shape[1]} were to be replaced by candidates of shape "
            f"{tuple(candidates.shape)}; expected a candidate of that width per row, or one row for all"
        )
    if int(rows.min()) < 0 or int(rows.max()) >= len(features):
        raise DiffalignError(
            f"rows {int(rows.min())} to {int(rows.max())} were to be replaced; the set has {len(features)} rows, from 0"
        )
    return rows.to(features.device), candidates
