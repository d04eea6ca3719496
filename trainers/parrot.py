"""Parrot: several rewards without weights; only samples that no other sample beats in all of them are learned from.

Lee et al., ECCV 2024, arXiv 2401.05675; no code was released. Every sample is told which reward it is for by words put
before its prompt; of each batch the Pareto front is found, samples that are dominated have reward 0, and the policy
gradient of the others goes with the reward they were told:
`1 / n(P) sum_(i in P) sum_t r_k(x_i) grad log p(x_(t-1) | x_t, c_k)`. At inference all words come before the prompt.
The paper also trains a language model that expands prompts; that part is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.errors import DiffalignError, did_you_mean
from diffalign.objectives.policy import clipped_surrogate
from diffalign.randomness import Draw
from diffalign.rewards.combine.pareto import hypervolume, pareto_front
from diffalign.sampling.collection import Collected
from diffalign.trainers.online import Losses, OnlineOptions, OnlineTrainer, sample_weights, whole_round
from diffalign.trainers.online_rows import Rows, StepRows, StepTable

Scaling = Literal["range", "deviation", "group", "raw"]


class ParrotConfig(OnlineOptions):
    """Batch-wise Pareto selection over several rewards."""

    method: Literal["parrot"] = "parrot"
    rewards: list[str] = Field(min_length=2)
    """Components of `reward` that are traded against each other, by name: of a `weighted-sum` the names of its
    members; its weights mean nothing here. Their order numbers the prefixes."""
    prefix: str = "<reward {}>, "
    """Put before the prompt of a sample, with the number of the reward that it is for; all of them in
    `model.prompt_prefix` for inference. Empty: no sample is told anything, and goes with all rewards in turn."""
    scope: Literal["round", "prompt"] = "round"
    """Among which samples one may be dominated: all of the round (the paper's batch), where easy prompts beat hard
    ones, or those of its prompt."""
    scaling: Scaling = "range"
    """What a reward becomes before dominated samples get 0, among the samples that are for it: range: 0 to 1 between
    the worst and the best; deviation: standardised, so that some samples of the front are pushed away; group: the lead
    over the mean of the prompt's samples, in deviations of such leads; raw: as it is, which needs rewards above 0."""
    clip_range: float = Field(default=1e-4, gt=0)
    """Ratios outside of 1 +- this have no gradient away from 1; for log-probabilities that are means over elements."""
    worst: list[float] | None = None
    """A value of each reward that is worse than what is wanted: the log's `hypervolume` measures what the round's
    samples reach beyond it. null: not measured."""

    @model_validator(mode="after")
    def _rewards_fit(self) -> ParrotConfig:
        count = len(self.rewards)
        if len(set(self.rewards)) < count:
            raise ValueError(f"rewards is {self.rewards}; should name each once")
        if self.samples % count:
            raise ValueError(
                f"samples is {self.samples}; should be a multiple of {count}, the number of rewards"
            )
        if self.worst is not None and len(self.worst) != count:
            raise ValueError(f"worst holds {len(self.worst)} values; should hold {count}, one per reward")
        return self


class ParrotTrainer(OnlineTrainer):
    """Policy gradient of the samples on the Pareto front."""

    Config = ParrotConfig
    needs_trajectory: ClassVar[bool] = True
    asks_reference: ClassVar[bool] = False

    def __init__(self, config: ParrotConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        wanted = all_prefixes(config)
        if backbone.prompt_prefix != wanted:
            raise DiffalignError(
                f"model.prompt_prefix is {backbone.prompt_prefix!r}, but parrot trains with prefixes that belong "
                f"before every prompt at inference. Set model.prompt_prefix={wanted!r}."
            )
        self._kernel = self.kernel()
        self._value = torch.zeros(0)
        self._table: StepTable | None = None

    def say(self, prompt: str, k: int) -> str:
        """The prompt with the prefix of the reward that sample k of a group is for."""
        return self.config.prefix.format(k % len(self.config.rewards) + 1) + prompt

    def learn(self, collected: Collected) -> tuple[Rows, dict[str, float]]:
        """Find the front of the whole round.

        Raises:
            DiffalignError: the reward has no such components, or no step draws noise.
        """
        points = components(collected, self.config.rewards)
        whole = whole_round(self.gather, collected, {"points": points})
        points, places, own = whole["points"], whole.places, whole.own
        front = front_mask(points, places if self.config.scope == "prompt" else torch.zeros_like(places))
        told = whole["numbers"] % collected.samples % len(self.config.rewards)
        if self.config.scaling == "group":
            points = leads(points, places)
        values = masked_rewards(points, told, front, self.config.scaling)
        self._value = values[own] * sample_weights(collected, self.config.uncertainty)
        self._table = StepTable(collected, self._noisy_steps(collected))
        self._table.keep(front[own][self._table.sample])
        return self._table.rows, self._facts(whole["points"], front)

    def batch(self, rows: Sequence[int], draw: Draw) -> StepRows:
        """Steps of some rows."""
        assert self._table is not None, "learn comes first"
        return self._table.take(rows, draw)

    def loss(self, batch: StepRows) -> Losses:
        """Losses and metrics, each `[B]`."""
        log_prob = batch.transition(self.backbone, self._kernel).log_prob(batch.x_prev)
        log_ratio = log_prob - batch.old
        value = self._value[batch.sample.cpu()].to(log_ratio.device)
        losses = clipped_surrogate(log_ratio, value, self.config.clip_range)
        ratio = log_ratio.detach().exp()
        outside = ((ratio - 1).abs() > self.config.clip_range).float()
        return losses, {"ratio": ratio, "clipped": outside, "value": value}

    def _noisy_steps(self, collected: Collected) -> list[int]:
        assert collected.trajectory is not None, "needs_trajectory"
        steps = collected.trajectory.sampler.stochastic(self.backbone.process)
        if not steps:
            raise DiffalignError(
                "no denoising step draws noise, and parrot learns from those that do. Set trainer.sampling.noise above "
                "0, or more trainer.sampling.steps."
            )
        return steps

    def _facts(self, points: Tensor, front: Tensor) -> dict[str, float]:
        """Share of the front, hypervolume."""
        found = {"front": float(front.float().mean())}
        if self.config.worst is not None:
            known = points[~points.isnan().any(1)]
            found["hypervolume"] = hypervolume(known, torch.tensor(self.config.worst))
        return found


def all_prefixes(config: ParrotConfig) -> str:
    """What belongs before every prompt at inference: the prefixes of all rewards."""
    return "".join(config.prefix.format(k + 1) for k in range(len(config.rewards)))


def components(collected: Collected, names: Sequence[str]) -> Tensor:
    """The named rewards of samples as points `[N, M]`.

    Raises:
        DiffalignError: the reward has no component of such a name.
    """
    for name in names:
        if name not in collected.parts:
            known = sorted(collected.parts)
            raise DiffalignError(
                f"trainer.rewards names {name!r}, but the parts of trainer.reward are: {', '.join(known) or 'none'}."
                f"{did_you_mean(name, known)} Give several rewards as "
                "trainer.reward={reward: weighted-sum, of: [...]}."
            )
    return torch.stack([collected.parts[name] for name in names], 1)


def front_mask(points: Tensor, groups: Tensor) -> Tensor:
    """Mask `[N]` of the points `[N, M]` that no point of their group dominates; never of one with a NaN.

    Source: Parrot (Lee et al. 2024), section 3.2: i dominates j if it is nowhere worse and somewhere better.
    """
    front = torch.zeros(len(points), dtype=torch.bool)
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        front[rows] = pareto_front(points[rows])
    return front


def masked_rewards(points: Tensor, told: Tensor, front: Tensor, scaling: Scaling) -> Tensor:
    """What each sample is rewarded with `[N]`: the reward it was told, scaled; exactly 0 off the front.

    Args:
        points: `[N, M]`. told: `[N]` long, which reward each sample is for. front: `[N]`.
    """
    own = points.gather(1, told[:, None])[:, 0]
    values = torch.zeros_like(own)
    for reward in told.unique():
        rows = told == reward
        values[rows] = scaled(own[rows], scaling)
    return torch.where(front, values, 0.0)


def leads(points: Tensor, groups: Tensor) -> Tensor:
    """Points `[N, M]` minus the mean of their group, whose NaNs do not count; a group `[N]` of one leads by 0."""
    found = points.clone()
    for group in groups.unique():
        rows = groups == group
        found[rows] -= points[rows].nanmean(0)
    return found


def scaled(values: Tensor, scaling: Scaling) -> Tensor:
    """Values `[N]` between 0 and 1, standardised, or as they are; 1 (range) or 0 (deviation) where all are equal.

    `group` divides by the root mean square: leads over a prompt's mean have no other zero.
    """
    known = values[values.isfinite()]
    if scaling == "raw" or not len(known):
        return values
    if scaling == "group":
        return values / known.square().mean().sqrt().clamp(min=1e-8)
    if scaling == "deviation":
        return (values - known.mean()) / known.std(correction=0).clamp(min=1e-8)
    low, high = known.min(), known.max()
    return (values - low) / (high - low) if high > low else torch.ones_like(values)
