"""Weights of samples from the uncertainty of their scores."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import RewardOutput
from diffalign.rewards.combine.members import check_batch
from diffalign.rewards.combine.uncertainty import inverse_uncertainty
from diffalign.rewards.combine.wrapper import Of, Wrapper, only


class InverseUncertainty(Wrapper):
    """Leaves scores as they are and adds the part `weight`, `exp(-std / spread)` in (0, 1], for training.

    The gradient through the weight is kept, as in Ctrl-U; see `uncertainty_weighted_loss` for the loss that uses it.

    Args:
        of: a reward with a std: an ensemble, `mc-dropout`, `augmented`, or a scorer with its own.
        spread: std of the reward over samples, so that the uncertainty has no unit.
    """

    def __init__(self, of: Of, spread: float = 1.0) -> None:
        inner = only(of, "inverse-uncertainty")
        super().__init__(inner, f"inverse-uncertainty({getattr(inner, 'name', inner)})")
        if not spread > 0:
            raise DiffalignError(f"reward {self.name!r}: spread is {spread}; expected a positive number")
        self.spread = spread

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`.

        Raises:
            DiffalignError: the reward gave no std.
        """
        check_batch(self.name, media, prompts)
        output = self.of[0].score(media, prompts)
        if output.std is None:
            raise DiffalignError(
                f"reward {self.of[0].name!r} states no uncertainty, so it cannot give weights; wrap it in "
                "'augmented' or 'mc-dropout', or use an ensemble"
            )
        weight = inverse_uncertainty(output.std, 1 / self.spread)
        return RewardOutput(output.mean, output.std, output.parts | {"weight": weight})
