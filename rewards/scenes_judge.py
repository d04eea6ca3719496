"""The exact judge of the embedded world as a reward: whether a picture shows what its caption says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import RewardOutput
from diffalign.samples.judge import Verdict, judge
from diffalign.samples.scenes import CATEGORIES, RESOLUTION

Measure = Literal["correct", "score"]


class ScenesJudge:
    """Right (1) or wrong (0) per picture.

    Args:
        measure: `correct`, or `score`: the share of checks that hold, in [0, 1], which also tells wrong pictures apart.

    Parts: `score`, the share of checks that hold; `quality`, how clean the shapes are; and one part per
    category, which equals the mean for prompts of that category and is NaN for the others.
    """

    modality: Literal["image", "audio"] = "image"
    differentiable = False
    kind: Literal["sample", "set"] = "sample"

    def __init__(self, measure: Measure = "correct") -> None:
        if measure not in get_args(Measure):
            raise DiffalignError(
                f"measure of scenes-judge is {measure!r}; expected {' or '.join(get_args(Measure))}"
            )
        self.measure = measure
        self.name = "scenes-judge" if measure == "correct" else f"scenes-judge-{measure}"

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Judge pictures `[B, 3, 64, 64]` in [0, 1].

        Raises:
            DiffalignError: a prompt is not a scene caption, or the pictures are not 64 x 64.
        """
        if media.shape[-2:] != (RESOLUTION, RESOLUTION):
            raise DiffalignError(
                f"scenes-judge got pictures of {media.shape[-1]}x{media.shape[-2]} pixels; the embedded "
                f"world's are {RESOLUTION}x{RESOLUTION}"
            )
        pixels = (media.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        verdicts = [_judged(image, prompt) for image, prompt in zip(pixels, prompts, strict=True)]
        correct = _tensor([v.correct for v in verdicts])
        parts = {
            "score": _tensor([v.score for v in verdicts]),
            "quality": _tensor([v.quality for v in verdicts]),
        }
        for category in CATEGORIES:
            belongs = torch.tensor([v.category == category for v in verdicts])
            parts[category] = torch.where(belongs, correct, torch.nan)
        return RewardOutput(correct if self.measure == "correct" else parts["score"], parts=parts)


def _judged(image: np.ndarray, prompt: str) -> Verdict:
    try:
        return judge(image, prompt)
    except ValueError as error:
        raise DiffalignError(
            f"scenes-judge cannot judge {prompt!r}: {error}. It knows captions of the embedded world only, "
            "such as 'a red circle left of a blue star'; use scenes:held-out prompts or another reward."
        ) from error


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
