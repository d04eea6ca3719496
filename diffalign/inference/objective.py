"""What is optimised: a reward's score per picture, or a lower confidence bound of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.evaluation.catalogue import catalogue
from diffalign.rewards import Reward
from diffalign.rewards.guard import ask


class Objective:
    """`mean - caution std` of a reward `[N]`; higher is better.

    Args:
        caution: k of the lower confidence bound, in deviations of the reward's own uncertainty; 0: the mean alone.

    Raises:
        DiffalignError: the reward judges sets, not pictures.
    """

    def __init__(self, reward: Reward, caution: float = 0.0) -> None:
        if reward.kind == "set":
            raise DiffalignError(
                f"reward {reward.name!r} judges a set as a whole; a noise is optimised for its own picture. "
                "Choose a reward of single pictures: diffalign rewards lists them."
            )
        self.reward, self.caution = reward, caution
        self.name = reward.name if caution == 0 else f"{reward.name} - {caution:g} std"
        if hasattr(reward, "eval"):
            reward.eval()

    def __call__(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores `[N]` of media `[N, 3, H, W]` in [0, 1], with gradients where enabled and the reward has them.

        Raises:
            DiffalignError: the reward failed, or has no uncertainty where one is asked for.
        """
        output = ask(self.reward, media, prompts)
        if self.caution == 0:
            return output.mean
        if output.std is None:
            raise DiffalignError(
                f"caution is {self.caution:g}, but reward {self.reward.name!r} states no uncertainty; set caution=0, "
                "or take an ensemble (scenes-ensemble, ensemble-mean, mc-dropout)."
            )
        return output.mean - self.caution * output.std


def check_differentiable(objective: Objective, method: str, fitting: Sequence[str]) -> None:
    """Whether a gradient method can use a reward.

    Args:
        fitting: methods that need no gradient.

    Raises:
        DiffalignError: it cannot; says which methods and which rewards fit.
    """
    if objective.reward.differentiable:
        return
    raise DiffalignError(
        f"method {method} needs gradients, but reward {objective.reward.name!r} has none. Methods for it: "
        f"{', '.join(fitting)}. Rewards with gradients: {', '.join(differentiable_rewards())}."
    )


def differentiable_rewards() -> list[str]:
    """Names of the catalogue's scorers that have gradients; wrappers have them when all that they wrap have."""
    return [entry.name for entry in catalogue() if entry.differentiable and entry.kind == "sample"]


def calibrated(objective: Objective, media: Tensor, prompts: Sequence[str]) -> None:
    """Fit a reward that compares with the untouched model to its pictures `[N, 3, H, W]`, if it needs that."""
    reward = objective.reward
    if getattr(reward, "uncalibrated", False):
        with torch.no_grad():
            reward.calibrate(media, prompts)  # type: ignore[attr-defined]
