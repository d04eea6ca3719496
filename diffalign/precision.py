"""Number formats."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """`values` themselves in float32 or float64, otherwise converted to float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
