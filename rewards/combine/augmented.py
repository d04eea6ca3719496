"""Uncertainty of one scorer from how its score moves under small changes of the picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import RewardOutput
from diffalign.rewards.combine.members import check_batch, prefixed
from diffalign.rewards.combine.passes import spread_over_passes
from diffalign.rewards.combine.views import apply_view, draw_views
from diffalign.rewards.combine.wrapper import Of, Wrapper, only


class Augmented(Wrapper):
    """Mean and std over the picture and changed views of it; the mean is also harder to hack than a single score.

    Views are the same for every picture of a batch, so a score does not depend on its neighbours. Gradients flow
    through all views, which multiplies the memory of a gradient by their number.

    Args:
        of: a reward on pictures. views: changed views beside the picture itself.
        crop: largest share of each side that a crop loses. jitter: brightness, contrast and saturation change by up to
            this share. noise: std of Gaussian noise on pixels in [0, 1].
        flip: mirror half of the views; off, because it swaps left and right, which prompts may name, and mirrors text.
        seed: of the views, the same at every call; None draws new ones each time.
    """

    def __init__(
        self,
        of: Of,
        views: int = 4,
        crop: float = 0.1,
        jitter: float = 0.1,
        noise: float = 0.02,
        flip: bool = False,
        seed: int | None = 0,
    ) -> None:
        inner = only(of, "augmented")
        super().__init__(inner, f"augmented({getattr(inner, 'name', inner)})")
        if self.modality != "image" or self.kind != "sample":
            raise DiffalignError(
                f"reward {self.name!r}: augmented needs a reward on single pictures; got {self.modality}, {self.kind}"
            )
        if views < 1 or not 0 <= crop < 1 or not 0 <= jitter < 1 or noise < 0:
            raise DiffalignError(
                f"reward {self.name!r}: views {views}, crop {crop}, jitter {jitter}, noise {noise}; expected "
                "at least 1 view, crop and jitter in [0, 1), noise of at least 0"
            )
        self.views, self.crop, self.jitter, self.noise = views, crop, jitter, noise
        self.flip, self.seed = flip, seed

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures `[B, 3, H, W]` in [0, 1]; parts are those of the unchanged picture."""
        check_batch(self.name, media, prompts)
        inner = self.of[0]
        generator = torch.Generator("cpu")
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        drawn = draw_views(self.views, generator, self.crop, self.jitter, self.noise, self.flip)
        plain = inner.score(media, prompts)
        outputs = [plain] + [inner.score(apply_view(media, view), prompts) for view in drawn]
        mean, std = spread_over_passes(outputs)
        return RewardOutput(mean, std, prefixed(inner.name, plain))
