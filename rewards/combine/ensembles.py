"""Ensembles: several rewards that should agree, and what their disagreement is worth.

Every class takes the same first options.

    of: the rewards, or one reward whose parts are the members.
    members: names of those parts (heads on one backbone, scored in one pass).
    normalise, statistics: bring members to mean 0 and std 1 first (see `WeightedSum`); a minimum or a variance of
        rewards on different scales means nothing, so leave it at `none` only where the scales agree.

Their `std` is that of the mixture of the members, `sqrt(variance over members (unbiased) + mean of std_k^2)`; parts
hold each member's own score, and `disagreement`, the standard deviation over (normalised) members.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import RewardOutput
from diffalign.rewards.combine.aggregate import (
    ensemble_mean,
    entropic,
    nominal_and_worst,
    root,
    total_std,
    uwo,
    variance,
    wco,
)
from diffalign.rewards.combine.members import Members
from diffalign.rewards.combine.normalise import Mode, Statistics
from diffalign.rewards.combine.panel import Panel
from diffalign.rewards.combine.wrapper import Of, Wrapper

Parts = Sequence[str] | None


class EnsembleMean(Wrapper):
    """Mean of the members."""

    def __init__(
        self, of: Of, members: Parts = None, normalise: Mode = "none", statistics: Statistics | None = None
    ) -> None:
        super().__init__(of, "ensemble-mean")
        self.panel = self.learnt["moments"] = _panel(self, members, normalise, statistics)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`."""
        members = self.panel.score(media, prompts, self.training)
        return _output(ensemble_mean(members.values), members)


class WorstCase(Wrapper):
    """The lowest member (WCO). A sample must please all; the most pessimistic member decides."""

    def __init__(
        self, of: Of, members: Parts = None, normalise: Mode = "none", statistics: Statistics | None = None
    ) -> None:
        super().__init__(of, "wco")
        self.panel = self.learnt["moments"] = _panel(self, members, normalise, statistics)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`."""
        members = self.panel.score(media, prompts, self.training)
        return _output(wco(members.values), members)


class UncertaintyWeighted(Wrapper):
    """`mean - risk * variance` of the members (UWO).

    Args:
        risk: 0.5 for best-of-N and 0.1 for PPO in the paper, with members normalised to std 1.
        unbiased: divide the variance by K - 1, as the paper's PPO code does (its best-of-N code divides by K).
    """

    def __init__(
        self,
        of: Of,
        risk: float = 0.5,
        unbiased: bool = True,
        members: Parts = None,
        normalise: Mode = "none",
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(of, "uwo")
        _at_least_zero(self.name, "risk", risk)
        self.risk, self.unbiased = risk, unbiased
        self.panel = self.learnt["moments"] = _panel(self, members, normalise, statistics)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`."""
        members = self.panel.score(media, prompts, self.training)
        return _output(uwo(members.values, self.risk, self.unbiased), members)


class Entropic(Wrapper):
    """Entropic risk of the members: between the minimum (beta 0) and the mean (beta infinite).

    Args:
        beta: aversion to risk is 1 / beta; UWO with risk 0.5 is its second-order form at the default 1.
    """

    def __init__(
        self,
        of: Of,
        beta: float = 1.0,
        members: Parts = None,
        normalise: Mode = "none",
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(of, "entropic")
        _at_least_zero(self.name, "beta", beta)
        self.beta = beta
        self.panel = self.learnt["moments"] = _panel(self, members, normalise, statistics)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`."""
        members = self.panel.score(media, prompts, self.training)
        return _output(entropic(members.values, self.beta), members)


class RewardRobust(Wrapper):
    """`weight * first member + (1 - weight) * lowest member`: the nominal reward, held back by the worst.

    Args:
        weight: of the first member, in [0, 1].
    """

    def __init__(
        self,
        of: Of,
        weight: float = 0.5,
        members: Parts = None,
        normalise: Mode = "none",
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(of, "reward-robust")
        if not 0 <= weight <= 1:
            raise DiffalignError(
                f"reward {self.name!r}: weight is {weight}; expected 0 (lowest) to 1 (nominal)"
            )
        self.weight = weight
        self.panel = self.learnt["moments"] = _panel(self, members, normalise, statistics)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`."""
        members = self.panel.score(media, prompts, self.training)
        return _output(nominal_and_worst(members.values, self.weight), members)


def _panel(wrapper: Wrapper, members: Parts, normalise: Mode, statistics: Statistics | None) -> Panel:
    panel = Panel(wrapper.name, wrapper.of, members, normalise, statistics)
    if panel.size < 2:
        raise DiffalignError(
            f"reward {wrapper.name!r} needs at least 2 members; got {panel.size}. List them under 'of', or name "
            "parts of one reward under 'members'"
        )
    return panel


def _output(mean: Tensor, members: Members) -> RewardOutput:
    between = variance(members.values)
    parts = members.parts | {"disagreement": root(between)}
    return RewardOutput(mean, total_std(between, members.stds), parts)


def _at_least_zero(name: str, option: str, value: float) -> None:
    if not value >= 0:
        raise DiffalignError(f"reward {name!r}: {option} is {value}; expected a number of at least 0")
