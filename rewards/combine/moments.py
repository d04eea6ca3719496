"""Mean and standard deviation of a stream, one pair per member."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningMoments:
    """Welford's algorithm for `members` streams at once, in float64 on the CPU.

    Scores that are not finite are left out. Statistics carry no gradient. `merge` adds another process's or shard's
    moments (Chan et al. 1979), so the result does not depend on how a stream was split.
    """

    def __init__(self, members: int) -> None:
        self.count = torch.zeros(members, dtype=torch.float64)
        self.center = torch.zeros(members, dtype=torch.float64)
        self.squares = torch.zeros(members, dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """Add a batch of scores `[K, B]`."""
        batch = RunningMoments(len(values))
        scores = values.detach().double().cpu()
        known = scores.isfinite()
        scores = torch.where(known, scores, 0.0)
        batch.count = known.sum(1).double()
        batch.center = scores.sum(1) / batch.count.clamp_min(1)
        batch.squares = ((scores - batch.center[:, None]).square() * known).sum(1)
        self.merge(batch)

    def merge(self, other: RunningMoments) -> None:
        """Add the moments of another part of the stream."""
        total = self.count + other.count
        share = other.count / total.clamp_min(1)
        gap = other.center - self.center
        self.squares = self.squares + other.squares + gap.square() * self.count * share
        self.center = self.center + gap * share
        self.count = total

    def reset(self) -> None:
        """Forget everything seen."""
        self.count, self.center, self.squares = (torch.zeros_like(self.count) for _ in range(3))

    @property
    def mean(self) -> Tensor:
        """Means `[K]`, 0 where nothing was seen."""
        return self.center

    @property
    def std(self) -> Tensor:
        """Unbiased standard deviations `[K]`; 1 where fewer than two scores, or only equal ones, were seen."""
        deviation = (self.squares / (self.count - 1).clamp_min(1)).sqrt()
        return torch.where(deviation > 0, deviation, 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `load_state_dict` takes back."""
        return {"count": self.count.clone(), "center": self.center.clone(), "squares": self.squares.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.count, self.center, self.squares = (
            state[key].double().cpu().clone() for key in ("count", "center", "squares")
        )
