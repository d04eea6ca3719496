"""Preferences on single denoising steps: D3PO, SPO and LPO on stored rollouts.

A stochastic step has a density, so preferences can be learned without an evidence lower bound:
`-log sigmoid(beta (log rho_chosen - log rho_rejected))` with `rho = p(x_prev | x_t) / p_ref(x_prev | x_t)`, clamped.

D3PO (Yang et al. 2023, arXiv 2311.13231) compares every step of two whole trajectories by the reward of their final
pictures. SPO (Liang et al. 2024, arXiv 2406.04314) draws candidates for the next state from one state and compares
those; LPO (Zhang et al. 2025, arXiv 2502.01051) is that with a sharper beta and thresholds that follow the step's
noise. Both candidates then have the same mean, so one forward each of policy and reference does what the releases do
with two; the loss and its gradient are the same. The base model draws the data once, before training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.data.rollouts import Kind, RolloutJob, RolloutStore
from diffalign.data.step_pairs import StepBatch, StepPairs, candidate_pairs, trajectory_pairs
from diffalign.errors import DiffalignError
from diffalign.objectives.pairwise import dpo_loss
from diffalign.objectives.transitions import clipped_ratio_loss, shared_start_margin, step_log_ratio
from diffalign.randomness import Draw
from diffalign.sampling.rollout import Sampler, Told, default_kernel, policy_transition
from diffalign.sampling.schedules import Schedule, schedule_of
from diffalign.sampling.transition import Kernel, KernelName, Transition, coefficients
from diffalign.strict import StrictModel, UnitRange
from diffalign.trainers.pairs import Losses, elements_of, pair_metrics


@dataclass(frozen=True)
class Form:
    """The authors' values: beta for means over elements, thresholds, and share of the noise levels that is used."""

    kind: Kind
    beta: float
    threshold: tuple[float, float]
    time_range: tuple[float, float]


FORMS = {
    "d3po": Form("trajectories", 0.1, (0.0, 0.0), (0.0, 1.0)),
    "spo": Form("candidates", 10.0, (0.3, 0.3), (0.0, 0.75)),
    "lpo": Form("candidates", 500.0, (0.35, 0.5), (0.0, 1.0)),
}


class RolloutOptions(StrictModel):
    """How the training data is drawn."""

    prompts: int = Field(default=256, ge=1)
    """Prompts, drawn from the captions of `data.source`."""
    held_out_prompts: int = Field(default=32, ge=0)
    """Prompts of `data.held_out` for the accuracy on steps that are never trained on; 0: none."""
    samples: int = Field(default=4, ge=2)
    """d3po: pictures per prompt. spo, lpo: candidates per step, each scored: nearly all of the drawing's time."""
    steps: int = Field(default=20, ge=1)
    """Denoising steps of a picture."""
    kernel: KernelName | None = None
    """How a step draws noise: ddim, ancestral, cps, lcm for consistency models, flow_sde or dance for flows. null: lcm
    for LCM, flow_sde for flows, ddim for others."""
    noise: float | None = Field(default=None, ge=0)
    """Amount of noise: eta of ddim and dance, a of flow_sde, share of cps. null: as in the papers, 1, 0.3, 0.7, 0.8."""
    guidance: float = 5.0
    """Guidance scale while drawing and, as in the releases, in training; 1 or less halves the cost of both."""
    batch_size: int = Field(default=16, ge=1)
    """Samples that go through the network at once while drawing."""
    same_start: bool = True
    """d3po: the pictures of a prompt start from the same noise, as in the release."""


class StepPreferenceConfig(StrictModel):
    """D3PO, SPO and LPO."""

    method: Literal["step_preference"] = "step_preference"
    form: Literal["d3po", "spo", "lpo"] = "spo"
    """d3po: steps of two pictures, the better picture's are chosen. spo: best and worst of several next states of one
    state. lpo: the same with its authors' beta and thresholds."""
    reward: str | dict[str, Any]
    """Which reward prefers, written as in `evaluation.rewards`. spo and lpo score a noisy candidate with its
    `score_step`, where it has one, else by the picture that the network sees in it."""
    rollouts: RolloutOptions = RolloutOptions()
    """How the data is drawn; it is stored in `data.cache_dir` and drawn anew only when something changes."""
    beta: float | None = Field(default=None, gt=0)
    """Sharpness, for log-ratios reduced as `reduction` says. null: d3po 0.1, spo 10, lpo 500, which belong to means.
    Not comparable to the beta of dpo."""
    reduction: Literal["mean", "sum"] = "mean"
    """Log-ratios are means (all releases) or sums over latent elements; `beta` and `clip` belong to what is chosen."""
    clip: float | None = Field(default=0.1, gt=0, lt=1)
    """Ratios are clamped to 1 - clip and 1 + clip, outside of which a sample has no gradient. null: no clamp, and then
    nothing but beta brakes spo and lpo."""
    threshold: float | tuple[float, float] | None = None
    """spo, lpo: smallest difference of the softmax of best and worst score; two values: at the step with the least and
    with the most noise (LPO). null: spo 0.3, lpo 0.35 to 0.5. SPO for SDXL: 0.4; LPO for SDXL: 0.45 to 0.6."""
    reward_scale: float = Field(default=1.0, gt=0)
    """Factor on scores before that softmax: about 1 / (their spread between candidates)."""
    time_range: UnitRange | None = None
    """Which steps are used, by their place between clean (0) and noise (1). null: all; spo leaves out those above
    0.75."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """d3po: one pair per prompt, or every two of its pictures."""
    min_gap: float = Field(default=0.0, ge=0)
    """d3po: pictures whose rewards differ by no more are ties and left out."""
    reference: Literal["adapters_off", "frozen_copy"] = "adapters_off"
    """Where the reference's steps come from. adapters_off: the same network without its adapters (LoRA only).
    frozen_copy: a second network; full fine-tuning always uses one."""

    @model_validator(mode="after")
    def _values_of_the_form(self) -> StepPreferenceConfig:
        form = FORMS[self.form]
        self.beta = form.beta if self.beta is None else self.beta
        self.time_range = form.time_range if self.time_range is None else self.time_range
        self.threshold = form.threshold if self.threshold is None else self.threshold
        return self


class StepPreferenceTrainer:
    """The loss of D3PO, SPO and LPO on pairs of stored steps."""

    Config = StepPreferenceConfig
    data_kinds: ClassVar[tuple[str, ...]] = ("rollouts",)
    tunes = ("lora", "full")

    def __init__(self, config: StepPreferenceConfig, backbone: Backbone, seed: int = 0) -> None:
        self.config, self.backbone, self.seed = config, backbone, seed
        # Filled in from the form by the configuration.
        self.beta = float(config.beta or 0.0)
        self._kernel = Kernel("ddim")
        self._pairs: StepPairs | None = None

    @staticmethod
    def needs_frozen_copy(config: StepPreferenceConfig, tune: str) -> bool:
        """Whether a second network has to be loaded."""
        return config.reference == "frozen_copy" or tune == "full"

    @staticmethod
    def job(
        config: StepPreferenceConfig, backbone: Backbone, prompts: tuple[str, ...], seed: int
    ) -> RolloutJob:
        """What has to be drawn to train on these prompts.

        Raises:
            DiffalignError: the model cannot be sampled in this way, or no step is in `time_range`.
        """
        options = config.rollouts
        kernel = Kernel(options.kernel or default_kernel(backbone), options.noise)
        kernel.check(backbone.process)
        sampler = Sampler(schedule_of(backbone, options.steps), kernel, batch_size=options.batch_size)
        steps = tuple(used_steps(config, backbone, sampler))
        kind, start = FORMS[config.form].kind, options.same_start
        used = steps if kind == "candidates" else None
        return RolloutJob(kind, prompts, options.samples, sampler, options.guidance, used, start, seed)

    @staticmethod
    def pairs(config: StepPreferenceConfig, backbone: Backbone, store: RolloutStore) -> StepPairs:
        """The pairs of steps that stored rollouts hold.

        Raises:
            DiffalignError: none differ.
        """
        if store.kind == "trajectories":
            steps = used_steps(config, backbone, store.sampler)
            return trajectory_pairs(store, steps, config.pairs, config.min_gap)
        assert config.threshold is not None
        spread = step_deviations(backbone, store.kernel, store.schedule)[store.steps]
        return candidate_pairs(store, thresholds(config.threshold, spread), config.reward_scale)

    def prepare(self, pairs: StepPairs) -> None:
        """Take the training pairs."""
        self._pairs, self._kernel = pairs, pairs.store.kernel

    def fetch(self, draw: Draw) -> StepBatch:
        """The batch of a draw.

        Raises:
            RuntimeError: `prepare` was not called.
        """
        if self._pairs is None:
            raise RuntimeError("StepPreferenceTrainer.fetch needs data; call prepare(pairs) first")
        return self._pairs.fetch(draw)

    def loss(self, batch: StepBatch) -> Losses:
        """Per-pair losses `[B]` and metrics `[B]`."""
        policy, reference = self._steps(batch), self._steps(batch, reference=True)
        chosen, rejected = self._log_ratios(batch, policy, reference)
        preference, weight = batch.preference.to(chosen.device), batch.weight.to(chosen.device)
        margin = self._margin(batch, policy, reference)
        if self.config.clip is None:
            losses = dpo_loss(margin, preference)
        else:
            losses = clipped_ratio_loss(chosen, rejected, preference, self.beta, self.config.clip)
        named = {
            "chosen_log_ratio": chosen,
            "rejected_log_ratio": rejected,
            "clipped": self._clipped(chosen, rejected),
        }
        return losses * weight, pair_metrics(margin, named)

    def margin(self, batch: StepBatch) -> Tensor:
        """`beta (log rho_chosen - log rho_rejected)` `[B]` before any clamp, without gradients."""
        with torch.no_grad():
            return self._margin(batch, self._steps(batch), self._steps(batch, reference=True))

    def _steps(self, batch: StepBatch, reference: bool = False) -> Transition:
        """The transition from every state of the batch."""
        sides = 1 if batch.shared else 2
        t, t_prev = batch.t.repeat(sides), batch.t_prev.repeat(sides)
        told = batch.told if batch.shared else doubled(batch.told)
        inputs = (self.backbone, self._kernel, batch.x_t, t, t_prev, told)
        return policy_transition(*inputs, reference=reference)

    def _margin(self, batch: StepBatch, policy: Transition, reference: Transition) -> Tensor:
        """The logit `[B]` before any clamp; of a shared state in its linear form."""
        if not batch.shared:
            chosen, rejected = self._log_ratios(batch, policy, reference)
            return self.beta * (chosen - rejected)
        means = (policy.mean, reference.mean, policy.std)
        return self.beta * self._elements() * shared_start_margin(batch.chosen, batch.rejected, *means)

    def _log_ratios(
        self, batch: StepBatch, policy: Transition, reference: Transition
    ) -> tuple[Tensor, Tensor]:
        """Log-ratios `[B]` of chosen and rejected next states; both compare with the one mean of a shared state."""
        means, others, std = policy.mean, reference.mean, policy.std
        if batch.shared:
            chosen = step_log_ratio(batch.chosen, means, others, std)
            rejected = step_log_ratio(batch.rejected, means, others, std)
        else:
            both = step_log_ratio(torch.cat([batch.chosen, batch.rejected]), means, others, std)
            chosen, rejected = both.chunk(2)
        return chosen * self._elements(), rejected * self._elements()

    def _elements(self) -> int:
        return elements_of(self.backbone) if self.config.reduction == "sum" else 1

    def _clipped(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Share of the two ratios that are outside the clamp, `[B]`."""
        if self.config.clip is None:
            return torch.zeros_like(chosen)
        low, high = math.log1p(-self.config.clip), math.log1p(self.config.clip)
        outside = [((side < low) | (side > high)).float() for side in (chosen, rejected)]
        return (outside[0] + outside[1]) / 2


def used_steps(config: StepPreferenceConfig, backbone: Backbone, sampler: Sampler) -> list[int]:
    """Steps of a schedule that draw noise and start inside `trainer.time_range`.

    Raises:
        DiffalignError: there is none.
    """
    process, times = backbone.process, sampler.schedule.times
    place = times.double() / (1 if process.is_flow else process.num_timesteps)
    low, high = config.time_range or (0.0, 1.0)
    possible = sampler.stochastic(process)
    steps = [step for step in possible if low <= float(place[step]) <= high]
    if not steps:
        raise DiffalignError(
            f"trainer.time_range is [{low:g}, {high:g}], but the steps that draw noise start at "
            f"{[round(float(place[step]), 3) for step in possible]}; expected a range that holds some of them."
        )
    return steps


def step_deviations(backbone: Backbone, kernel: Kernel, schedule: Schedule) -> Tensor:
    """Standard deviation `[S]` of each step."""
    return coefficients(backbone.process, kernel, schedule.times[:-1], schedule.times[1:]).std


def thresholds(threshold: float | tuple[float, float], deviations: Tensor) -> list[float]:
    """A threshold per step: linear in the step's deviation between the least and the most noisy one, as in LPO."""
    low, high = threshold if isinstance(threshold, tuple) else (threshold, threshold)
    spread = (deviations.max() - deviations.min()).clamp(min=1e-12)
    return (low + (high - low) * (deviations - deviations.min()) / spread).tolist()


def doubled(told: Told) -> Told:
    """The rows twice, one after the other: chosen, then rejected."""
    return told.select(list(range(len(told))) * 2)
