"""What a network is told besides the noisy latent: a small bundle of tensors, one row per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of a batch; a field that a family does not use is None.

    Fields:
        embeddings: text states `[B, L, D]`.
        pooled: pooled text embedding `[B, P]` (SDXL, SD3, FLUX).
        time_ids: SDXL micro-conditioning `[B, 6]` in float32:
            original height, original width, crop top, crop left, target height, target width.
        mask: text mask `[B, L]`.
        guidance: guidance scale `[B]` in float32 that a guidance-distilled network is told (LCM, FLUX.1 dev); None is
            `model.guidance_embedding`.
    """

    embeddings: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    mask: Tensor | None = None
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply a function to every tensor present."""
        return Conditioning(**{name: function(value) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors present, by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Move to a device; `dtype` applies to text embeddings only, since time ids above 256 are not exact in bf16."""
        moved = self.map(lambda x: x.to(device))
        if dtype is None:
            return moved
        pooled = None if moved.pooled is None else moved.pooled.to(dtype)
        return replace(moved, embeddings=moved.embeddings.to(dtype), pooled=pooled)

    def select(self, rows: Sequence[int] | Tensor) -> Conditioning:
        """The given rows, in the given order."""
        index = torch.as_tensor(rows, device=self.embeddings.device)
        return self.map(lambda x: x[index])

    def repeat(self, times: int) -> Conditioning:
        """Each row `times` times in a row."""
        return self.map(lambda x: x.repeat_interleave(times, 0))

    @staticmethod
    def concat(parts: Sequence[Conditioning]) -> Conditioning:
        """Stack batches along the first axis.

        Raises:
            ValueError: the parts do not carry the same fields.
        """
        names = [sorted(part.tensors()) for part in parts]
        if any(n != names[0] for n in names):
            raise ValueError(f"conditionings carry different fields: {names}")
        return Conditioning(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names[0]})
