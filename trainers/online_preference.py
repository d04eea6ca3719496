"""Online preference rounds: draw, judge, pair, and a preference update with any pairwise loss.

In each round the policy draws a group of samples per prompt; a reward, a rule or a person prefers; pairs of a group are
learned from with DPO's implicit rewards r. `elbo`: online DPO, `r = -(beta / 2) (error - reference error)` of noised
samples, as in Flow-GRPO's comparison (arXiv 2505.05470). `d3po`: `r = beta log rho` of every step of two trajectories
(Yang et al. 2023, arXiv 2311.13231). `spo`: the same of one step, at which the trajectories of a group part: all start
from one state, so only that step is compared (Liang et al. 2024, arXiv 2406.04314, with the finished pictures judged
instead of noisy candidates).

The reference may follow the policy, which makes of DPO a sequence of improvements; the step between two references can
be lengthened (ExPO, Zheng et al. 2024, arXiv 2404.16792), and pictures of the reference be made less likely whatever
their reward (XPO, Xie et al. 2024, arXiv 2405.21046).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.backbones.guidance import is_told_guidance
from diffalign.backbones.snapshots import Snapshot
from diffalign.data.labelling import Labeller, check_labels, open_labeller
from diffalign.errors import DiffalignError
from diffalign.objectives.group_pairs import GroupPairs, PairChoice, judged_pairs, scored_pairs
from diffalign.objectives.pair_losses import PAIR_LOSSES, PairRewards
from diffalign.objectives.pairwise import error_delta, smoothed_preference, squared_error
from diffalign.objectives.transitions import step_log_ratio
from diffalign.randomness import Draw, batch_records, derive_seed
from diffalign.sampling.collection import Collected
from diffalign.sampling.rollout import Sampler, Told, policy_transition, predict
from diffalign.strict import UnitRange
from diffalign.trainers.dpo import PairLossName
from diffalign.trainers.online import Losses, OnlineOptions, OnlineTrainer, State, sample_weights, updates_of
from diffalign.trainers.online_pairs import PairTable, PreferenceRows, verdicts
from diffalign.trainers.online_rows import Rows
from diffalign.trainers.pairs import elements_of, pair_metrics
from diffalign.trainers.step_preference import used_steps

BETAS = {"elbo": 2000.0, "d3po": 0.1, "spo": 10.0}
"""For means over elements: a common value of online DPO, and those of the releases of D3PO and SPO."""


class OnlinePreferenceConfig(OnlineOptions):
    """Online DPO, D3PO and SPO."""

    method: Literal["online_preference"] = "online_preference"
    form: Literal["elbo", "d3po", "spo"] = "elbo"
    """What is compared. elbo: noised samples; any sampler, no guidance in training. d3po: every step of two
    trajectories. spo: one step per round, at which the samples of a group part."""
    labels: str = "reward"
    """Who prefers: reward, `rule:module:function` (see `diffalign.data.labelling`), or person, in the terminal. The
    reward is drawn in any case, and logged: for a person or a rule take a cheap one."""
    pairs: PairChoice = "best_worst"
    """Pairs of a group: its best and worst sample, all, or disjoint ones (first and second, and so on). best_worst
    asks a rule or a person about every two samples; disjoint asks least."""
    min_gap: float = Field(default=0.0, ge=0)
    """Samples whose rewards differ by no more are ties, which are left out."""
    label_temperature: float | None = Field(default=None, gt=0)
    """Soft labels sigmoid(reward gap / temperature); null: the better one is certainly better."""
    loss: PairLossName = "sigmoid"
    """What is made of the margin, as for `dpo`."""
    beta: float | None = Field(default=None, gt=0)
    """Strength of the pull to the reference. null: 2000 for elbo (errors), 0.1 for d3po and 10 for spo (log-ratios),
    which belong to means over elements; they do not compare. A reference that follows wants less."""
    reduction: Literal["mean", "sum"] = "mean"
    """Errors and log-ratios are means or sums over latent elements; `beta` and `clip` belong to what is chosen."""
    clip: float | None = Field(default=0.1, gt=0, lt=1)
    """d3po, spo: ratios are clamped to 1 - clip and 1 + clip, outside of which a sample has no gradient."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of wrong labels."""
    time_weighting: Literal["uniform", "logit_normal"] = "uniform"
    """elbo: distribution of training times."""
    time_range: UnitRange = (0.0, 1.0)
    """d3po, spo: which steps are used, by their place between clean (0) and noise (1)."""
    reference_every: int | None = Field(default=None, ge=1)
    """Rounds after which the reference becomes the policy. null: it is the base model, which bounds how far the run can
    go and how much it can be fooled; 1 goes furthest. Costs a copy of the trained weights, no second network."""
    reference_average: float | None = Field(default=None, ge=0, lt=1)
    """Instead: the reference is a moving average of the policy, of which each optimiser step keeps this share."""
    optimism: float = Field(default=0.0, ge=0)
    """XPO: weight of the implicit reward of a random sample of the round, which is pushed down so that the policy
    leaves what the reference draws. In units of beta (alpha / beta there); half as large as sigmoid's first gradient
    is 0.25. Needs reference_every of 1, since then the samples are the reference's, and half as many forwards more."""
    extrapolation: float = Field(default=0.0, ge=0)
    """ExPO: when the reference becomes the policy, the weights first go on by this share of their way from the last
    one. 0.5 is much; adapters are extrapolated factor by factor."""

    @field_validator("labels")
    @classmethod
    def _labels_exist(cls, value: str) -> str:
        return check_labels(value)

    @model_validator(mode="after")
    def _options_fit(self) -> OnlinePreferenceConfig:
        if self.samples < 2:
            raise ValueError("samples should be at least 2: pairs are made within a group")
        if self.loss == "exo" and not self.label_smoothing:
            raise ValueError("label_smoothing should be above 0 for loss=exo, such as 0.01: it is the target")
        if self.reference_every is not None and self.reference_average is not None:
            raise ValueError(
                "reference_every or reference_average should be null: the reference follows in one way"
            )
        if self.optimism and self.reference_every != 1:
            raise ValueError(
                "reference_every should be 1 for optimism: the samples have to be the reference's"
            )
        if self.extrapolation and self.reference_every is None:
            raise ValueError(
                "reference_every should be a number for extrapolation: it goes on from the last reference"
            )
        if self.form == "spo" and self.sampling.window is not None:
            raise ValueError("sampling.window should be null for form=spo, which draws a step per round")
        if self.form == "spo" and not self.sampling.same_start:
            raise ValueError("sampling.same_start should be true for form=spo: samples part from one state")
        self.beta = BETAS[self.form] if self.beta is None else self.beta
        return self


class OnlinePreferenceTrainer(OnlineTrainer):
    """Pairs of the policy's own samples."""

    Config = OnlinePreferenceConfig

    def __init__(self, config: OnlinePreferenceConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self.needs_trajectory = config.form != "elbo"  # type: ignore[misc]
        self.labeller: Labeller | None = None
        self._parameters = backbone.trainable_parameters()
        self._anchor = Snapshot(self._parameters) if follows(config) else None
        self._table: PairTable | None = None

    @classmethod
    def needs_frozen_copy(cls, config: Any, tune: str) -> bool:
        """Whether a second network has to be loaded: not for a reference that follows, a copy of the weights."""
        return not follows(config) and super().needs_frozen_copy(config, tune)

    @property
    def beta(self) -> float:
        """The beta of means over elements."""
        elements = elements_of(self.backbone) if self.config.reduction == "sum" else 1
        return float(self.config.beta) * elements

    def sampler(self, number: int) -> Sampler:
        """How a round is drawn; for `spo` with noise at one step only, another one each round."""
        sampler = super().sampler(number)
        if self.config.form != "spo":
            return sampler
        steps = used_steps(self.config, self.backbone, sampler)
        place = batch_records(derive_seed(self.seed, "step of a round"), number, 1, len(steps))[0]
        return Sampler(sampler.schedule, sampler.kernel, (steps[place], steps[place] + 1), sampler.batch_size)

    # A round

    def learn(self, collected: Collected) -> tuple[Rows, dict[str, float]]:
        """Pairs of the round's samples as rows: one per pair, or one per pair and step.

        Raises:
            DiffalignError: a rule cannot be used, or a person ended the session.
        """
        pairs, steps = self._pairs(collected), None
        first = pairs.group * collected.samples
        sides = [first + pairs.chosen, first + pairs.rejected]
        weight = self._weights(collected, *sides)
        if self.config.optimism:
            sides.append(first + self._random_places(collected, pairs))
        if collected.trajectory is not None:
            steps = used_steps(self.config, self.backbone, collected.trajectory.sampler)
        shared = self.config.form == "spo"
        self._table = PairTable(collected, torch.stack(sides), pairs.preference, weight, steps, shared)
        return self._table.rows, self._measured(collected, pairs)

    def _pairs(self, collected: Collected) -> GroupPairs:
        config = self.config
        if config.labels == "reward":
            scores = collected.rewards.reshape(-1, collected.samples)
            return scored_pairs(scores, config.pairs, config.min_gap, config.label_temperature)
        if config.labels == "person" and collected.groups < config.prompts_per_round:
            raise DiffalignError(
                "trainer.labels is person, but several processes train; expected one. Start the run without a launcher."
            )
        if self.labeller is None:
            self.labeller = open_labeller(config.labels, self.folder / "labels")
        assert self.labeller is not None, "labels are not the reward's"
        size = config.sampling.batch_size
        return judged_pairs(
            verdicts(collected, self.labeller, config.pairs, self.backbone, size), config.pairs
        )

    def _random_places(self, collected: Collected, pairs: GroupPairs) -> Tensor:
        """A place `[M]` in the group of each pair, drawn whatever the rewards are."""
        places = collected.places[pairs.group * collected.samples].tolist()
        keys = zip(places, pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)
        draws = [derive_seed(self.seed, "random sample", collected.round, *key) for key in keys]
        return torch.tensor([draw % collected.samples for draw in draws]).long()

    def _weights(self, collected: Collected, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Weights `[M]` of pairs: the geometric means of those of their samples, where the reward prefers."""
        if self.config.labels != "reward":
            return torch.ones(len(chosen))
        weights = sample_weights(collected, self.config.uncertainty)
        return (weights[chosen] * weights[rejected]).sqrt()

    def _measured(self, collected: Collected, pairs: GroupPairs) -> dict[str, float]:
        """Pairs of the whole round, the share of groups that gave any, their mean gap; agreement with the reward."""
        rewards = collected.rewards.reshape(-1, collected.samples)
        difference = rewards[pairs.group, pairs.chosen] - rewards[pairs.group, pairs.rejected]
        agrees = (difference > 0).double() + 0.5 * (difference == 0).double()
        own = [len(pairs), len(pairs.group.unique()), collected.groups, pairs.gap.sum(), agrees.sum()]
        count, used, groups, gap, agreed = self.gather(torch.tensor([own]).double()).sum(0).tolist()
        found = {"pairs": count, "used_groups": used / groups}
        if count:
            found["gap"] = gap / count
        if count and self.config.labels != "reward":
            found["label_agreement"] = agreed / count
        return found

    # A step

    def batch(self, rows: Sequence[int], draw: Draw) -> PreferenceRows:
        """The tensors of some rows."""
        assert self._table is not None, "learn comes first"
        return self._table.take(rows, draw, self.backbone.process, self.config.time_weighting)

    def loss(self, batch: PreferenceRows) -> Losses:
        """Losses `[B]` and metrics `[B]`; the margin is that before any clamp."""
        implicit = self._error_rewards if self.config.form == "elbo" else self._step_rewards
        rewards, named = implicit(batch)
        chosen, rejected, *random = self._clamped(rewards).split(len(batch))
        believed = smoothed_preference(batch.preference, self.config.label_smoothing)
        losses = PAIR_LOSSES[self.config.loss](PairRewards(chosen, rejected, chosen - rejected), believed)
        losses = losses * batch.weight
        if random:
            losses = losses + self.config.optimism * random[0]
        margin = rewards[: len(batch)] - rewards[len(batch) : 2 * len(batch)]
        return losses, pair_metrics(margin, named)

    def _error_rewards(self, batch: PreferenceRows) -> tuple[Tensor, dict[str, Tensor]]:
        """Implicit rewards `[n B]`, `-(beta / 2) (error - reference error)`."""
        # A network that is told its guidance scale is always told; others are trained without guidance.
        told = batch.told_each
        told = told if is_told_guidance(self.backbone.core) else Told(told.conditioning)
        inputs = (self.backbone, batch.x_t, batch.t.repeat(batch.states), told)
        with self.as_reference():
            reference = predict(*inputs)
        policy = predict(*inputs)
        delta = error_delta(policy, reference, batch.goal)
        error = squared_error(policy.detach(), batch.goal)
        named = by_side("delta", delta, len(batch)) | by_side("error", error, len(batch))
        return -0.5 * self.beta * delta, named

    def _step_rewards(self, batch: PreferenceRows) -> tuple[Tensor, dict[str, Tensor]]:
        """Implicit rewards `[n B]`, `beta log rho`."""
        assert self.collected is not None
        assert self.collected.trajectory is not None
        kernel, states = self.collected.trajectory.sampler.kernel, batch.states
        t, t_prev = batch.t.repeat(states), batch.t_prev.repeat(states)
        inputs = (self.backbone, kernel, batch.x_t, t, t_prev, batch.told_each)
        with self.as_reference():
            reference = policy_transition(*inputs)
        policy = policy_transition(*inputs)
        each = batch.sides // states
        means = [torch.cat([found.mean] * each) for found in (policy, reference)]
        ratios = step_log_ratio(batch.goal, means[0], means[1], policy.std.repeat(each))
        rewards = self.beta * ratios
        outside = (self._clamped(rewards) != rewards).float()
        named = by_side("log_ratio", ratios, len(batch)) | by_side("clipped", outside, len(batch))
        return rewards, named

    def _clamped(self, rewards: Tensor) -> Tensor:
        """Rewards of steps with their ratios inside 1 - clip and 1 + clip; those of errors as they are."""
        clip = self.config.clip
        if clip is None or self.config.form == "elbo":
            return rewards
        beta = float(self.config.beta)
        return rewards.clamp(beta * math.log1p(-clip), beta * math.log1p(clip))

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """A block in which the model answers as the reference, without gradients."""
        if self._anchor is None:
            with torch.no_grad(), self.backbone.reference():
                yield
            return
        with self._anchor.applied(self._parameters), self.backbone.inference():
            yield

    # The reference

    def after_step(self, step: int) -> None:
        """Let the reference follow: a little after each step, or to the policy at the end of a round."""
        config = self.config
        if self._anchor is None:
            return
        if config.reference_average is not None:
            self._anchor.blend(self._parameters, config.reference_average)
            return
        rounds, part = divmod(step + 1, updates_of(config))
        if part or rounds % config.reference_every:
            return
        if config.extrapolation:
            extrapolate(self._parameters, self._anchor.state(), config.extrapolation)
        self._anchor.blend(self._parameters, 0.0)

    def state(self) -> State:
        """The reference that follows."""
        return ({} if self._anchor is None else self._anchor.state()), {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue with an earlier reference."""
        if self._anchor is not None:
            self._anchor.load(tensors)


def follows(config: OnlinePreferenceConfig) -> bool:
    """Whether the reference follows the policy."""
    return config.reference_every is not None or config.reference_average is not None


def by_side(name: str, values: Tensor, rows: int) -> dict[str, Tensor]:
    """The part `[B]` of chosen and of rejected samples of values `[n B]`, by name."""
    return {f"chosen_{name}": values[:rows], f"rejected_{name}": values[rows : 2 * rows]}


@torch.no_grad()
def extrapolate(parameters: Sequence[tuple[str, Tensor]], before: dict[str, Tensor], share: float) -> None:
    """`theta <- theta + share (theta - before)`, in place (ExPO, arXiv 2404.16792)."""
    for name, parameter in parameters:
        parameter.add_(parameter - before[name].to(parameter.device), alpha=share)
