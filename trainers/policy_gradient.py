"""Policy gradients on denoising steps: DDPO, DPOK, RLCM, Flow-GRPO and its relatives.

Every stochastic step is an action of a Gaussian policy, the reward of the final picture is the return of all of them:
`loss = w_k surrogate(p / p_old, A) + kl KL(p || p_ref)`, a mean over (sample, step) rows.

DDPO: Black et al. 2023 (arXiv 2305.13301). DPOK: Fan et al. 2023 (arXiv 2305.16381). RLCM: Oertell et al. 2024 (arXiv
2404.03673). Flow-GRPO: Liu et al. 2025 (arXiv 2505.05470), with GRPO-Guard (2510.22319), Flow-DPPO (2606.11025),
TempFlow-GRPO (2508.04324), Flash-GRPO (2605.15980), Flow-CPS (2509.05952). DanceGRPO: Xue et al. 2025 (arXiv
2505.07818). MixGRPO: Li et al. 2025 (arXiv 2507.21802). `FORMS` in `policy_forms.py` holds what they differ in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.backbones.guidance import is_told_guidance
from diffalign.conditioning import Conditioning
from diffalign.errors import DiffalignError
from diffalign.objectives import advantages as adv
from diffalign.objectives import policy
from diffalign.process import Process, expand_as
from diffalign.randomness import Draw
from diffalign.rewards.combine.groups import disagreement, most_disputed
from diffalign.sampling.collection import Collected
from diffalign.sampling.rollout import Sampler, Told, step_noise
from diffalign.sampling.transition import Kernel, Transition, coefficients
from diffalign.trainers.online import Losses, OnlineTrainer, State, WholeRound, sample_weights, whole_round
from diffalign.trainers.online_rows import Rows, StepRows, StepTable, moved
from diffalign.trainers.pairs import elements_of
from diffalign.trainers.policy_forms import (
    PolicyGradientConfig,
    drawn_steps,
    round_window,
    window_range,
)


@dataclass(frozen=True)
class Factors:
    """What the steps `[S]` of a schedule multiply.

    Fields:
        weight: the surrogate. log_ratio: the log-ratio that is a mean over elements. kl: the exact divergence.
    """

    weight: Tensor
    log_ratio: Tensor
    kl: Tensor

    def at(self, step: Tensor) -> Factors:
        """Factors `[B]` of the steps of a batch."""
        return Factors(*(value.to(step.device)[step] for value in (self.weight, self.log_ratio, self.kl)))


@dataclass(frozen=True)
class PolicyBatch:
    """Steps of trajectories with the advantages `[B]` of their samples.

    Fields:
        held: `[B]` 1 where the KL holds the sample, else 0. noise: what the old policy drew `[B, C, h, w]`, if needed.
    """

    steps: StepRows
    advantage: Tensor
    held: Tensor
    noise: Tensor | None
    draw: Draw

    def __len__(self) -> int:
        return len(self.steps)

    def to(self, device: torch.device) -> PolicyBatch:
        """The same batch on a device."""
        return moved(self, device)


class PolicyGradientTrainer(OnlineTrainer):
    """The surrogate losses of (sample, step) rows."""

    Config = PolicyGradientConfig
    needs_trajectory = True

    def __init__(self, config: PolicyGradientConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self.buffer = adv.PromptBuffer(config.buffer, config.min_count)
        whole = super().sampler(0)
        first, end = window_range(config, len(whole.schedule))
        possible = [k for k in whole.stochastic(backbone.process) if self._is_trained(k, len(whole.schedule))]
        possible = [k for k in possible if config.window_size is None or first <= k < end]
        self.factors = step_factors(config, backbone.process, whole, possible, elements_of(backbone))
        self._needs_noise = config.correction == "guard" or config.surrogate == "divergence"
        self._kernel = self.kernel()
        self._table: StepTable | None = None
        self._advantage = self._held = torch.zeros(0)

    @classmethod
    def needs_frozen_copy(cls, config: PolicyGradientConfig, tune: str) -> bool:
        """Whether a second network has to be loaded: only for the KL."""
        return config.kl > 0 and super().needs_frozen_copy(config, tune)

    def sampler(self, number: int) -> Sampler:
        """How the samples of a round are drawn: its window of stochastic steps is one for all groups.

        Raises:
            DiffalignError: the model cannot be sampled in this way.
        """
        sampler = super().sampler(number)
        steps = len(sampler.schedule)
        if self.config.window_size is not None:
            sampler = replace(sampler, window=round_window(self.config, steps, number, self.seed))
        elif self.config.last_step == "deterministic":
            first, end = sampler.window or (0, steps)
            sampler = replace(sampler, window=(first, min(end, steps - 1)))
        return sampler

    def learn(self, collected: Collected) -> tuple[Rows, dict[str, float]]:
        """Advantages of the round, and the rows of the steps that are trained."""
        whole = self._whole(collected)
        rewards, groups, own = whole.rewards, whole.places, whole.own
        found = self._advantages(whole).clamped(self.config.advantage_clip)
        judged = replace(collected, rewards=rewards, std=whole.columns.get("std"))
        found = found.weighted(sample_weights(judged, self.config.uncertainty))
        self._advantage, self._held = found.values[own], self._disputed(whole)[own]
        usable = found.used if self.config.filter_flat else rewards.isfinite()
        self._table = self._steps(collected, usable[own])
        return self._table.rows, {
            "flat_groups": adv.flat_groups(rewards, groups),
            "used_samples": float(usable.float().mean()),
            "advantage_size": float(found.values.abs().mean()),
        }

    def batch(self, rows: Sequence[int], draw: Draw) -> PolicyBatch:
        """The steps of some rows."""
        assert self._table is not None, "learn comes before batch"
        steps = self._table.take(rows, draw)
        noise = None
        if self._needs_noise:
            seeds = [self._table.trajectory.seeds[sample] for sample in steps.sample.tolist()]
            noise = step_noise(steps.x_t.shape[1:], seeds, steps.step.tolist())
        return PolicyBatch(steps, self._advantage[steps.sample], self._held[steps.sample], noise, draw)

    def loss(self, batch: PolicyBatch) -> Losses:
        """Losses and metrics, each `[B]`."""
        factors, config = self.factors.at(batch.steps.step), self.config
        current = self._current(batch.steps)
        log_ratio, divergence = self._log_ratio(batch, current, factors)
        losses = factors.weight * self._surrogate(log_ratio, batch.advantage, divergence)
        metrics = ratio_metrics(log_ratio.detach(), config.clip_range)
        if config.kl:
            reference = batch.steps.transition(self.backbone, self._kernel, reference=True)
            kl = factors.kl * current.kl(reference)
            losses = losses + config.kl * batch.held * kl
            metrics["kl"] = kl.detach()
        return losses, metrics

    def state(self) -> State:
        """The rewards that prompts had."""
        return {}, ({"buffer": self.buffer.state()} if self.config.advantage == "per_prompt" else {})

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take the rewards that prompts had."""
        self.buffer.restore(values.get("buffer", {}))

    def _is_trained(self, step: int, steps: int) -> bool:
        return step < steps - 1 or self.config.last_step == "trained"

    def _whole(self, collected: Collected) -> WholeRound:
        """The round of all processes: rewards with their parts and deviations, and which prompts they are of."""
        more = {"chosen": collected.chosen} | ({} if collected.std is None else {"std": collected.std})
        more |= {f"part.{name}": collected.parts[name] for name in sorted(collected.parts)}
        return whole_round(self.gather, collected, more)

    def _advantages(self, whole: WholeRound) -> adv.Advantages:
        """Of the whole round."""
        rewards, groups, form = whole.rewards, whole.places, self.config.advantage
        if form == "per_prompt":
            return self.buffer.advantages(rewards, [str(prompt) for prompt in whole["chosen"].tolist()])
        if form in ("per_reward", "per_reward_sum"):
            parts, weights = weighted_parts(whole.columns, self.config.parts)
            return adv.per_reward_advantages(parts, weights, groups, batch_normalise=form == "per_reward")
        if form == "global":
            return adv.global_advantages(rewards)
        forms = {
            "group": adv.group_advantages,
            "group_global_std": adv.group_global_std_advantages,
            "no_std": adv.centred_advantages,
            "win_rate": adv.win_rate_advantages,
        }
        return forms[form](rewards, groups)

    def _disputed(self, whole: WholeRound) -> Tensor:
        """Samples `[N]` that the KL holds, 1 or 0."""
        rewards, share = whole.rewards, self.config.kl_share
        if share == 1:
            return torch.ones(len(rewards))
        if "std" in whole.columns:
            return most_disputed(whole["std"], share).float()
        parts, _ = weighted_parts(whole.columns, self.config.parts)
        groups = rewards.view(-1, self.config.samples)
        doubt = disagreement(groups, parts.view(len(parts), *groups.shape))
        return most_disputed(doubt, share).float().flatten()

    def _steps(self, collected: Collected, usable: Tensor) -> StepTable:
        """Rows of the usable samples `[N]` at the steps that each is trained on."""
        assert collected.trajectory is not None
        sampler = collected.trajectory.sampler
        possible = sampler.stochastic(self.backbone.process)
        trained = [step for step in possible if self._is_trained(step, len(sampler.schedule))]
        chosen = [
            drawn_steps(len(trained), self.config.fraction, (self.seed, collected.round, number))
            for number in collected.numbers.tolist()
        ]
        table = StepTable(collected, trained)
        table.keep(usable[table.sample] & torch.cat(chosen))
        return table

    def _current(self, steps: StepRows) -> Transition:
        """The current policy's steps, with gradients."""
        if self.config.guidance_gradient == "both" or steps.told.unconditional is None:
            return steps.transition(self.backbone, self._kernel)
        if is_told_guidance(self.backbone.core):
            return steps.transition(self.backbone, self._kernel)
        return conditional_transition(self.backbone, self._kernel, steps)

    def _log_ratio(self, batch: PolicyBatch, current: Transition, factors: Factors) -> tuple[Tensor, Tensor]:
        """Log-ratios in the form that is clipped, and divergences from the old policy, each `[B]`."""
        steps = batch.steps
        plain = current.log_prob(steps.x_prev) - steps.old
        if batch.noise is None:
            return factors.log_ratio * plain, torch.zeros_like(plain)
        old = steps.x_prev - expand_as(current.std, steps.x_prev) * batch.noise
        divergence = policy.step_divergence(current.mean, old, current.std)
        if self.config.correction == "guard":
            plain = policy.centred_log_ratio(batch.noise, current.mean, old)
        return factors.log_ratio * plain, divergence

    def _surrogate(self, log_ratio: Tensor, advantage: Tensor, divergence: Tensor) -> Tensor:
        config = self.config
        if config.surrogate == "clip":
            return policy.clipped_surrogate(log_ratio, advantage, config.clip_range)
        if config.surrogate == "clamp":
            return policy.clamped_surrogate(log_ratio, advantage, config.clip_range)
        if config.surrogate == "divergence":
            limit = config.max_divergence
            return policy.divergence_masked_surrogate(log_ratio, advantage, divergence, limit)
        return policy.plain_surrogate(log_ratio, advantage)


def ratio_metrics(log_ratio: Tensor, clip: float) -> dict[str, Tensor]:
    """What tells how far the policy has moved, each `[B]`; clips above and below apart.

    All below and none above means that states or log-probabilities lost digits, not that the policy moved.
    """
    ratio = log_ratio.exp()
    return {
        "ratio": ratio,
        "approx_kl": log_ratio.square() / 2,
        "clipped_above": (ratio > 1 + clip).float(),
        "clipped_below": (ratio < 1 - clip).float(),
    }


def step_factors(
    config: PolicyGradientConfig, process: Process, sampler: Sampler, possible: Sequence[int], elements: int
) -> Factors:
    """Factors of all steps of a schedule.

    Args:
        sampler: without windows. possible: steps that may be trained in some round; weights have mean 1 over them.

    Raises:
        DiffalignError: no step can be trained, or an option is for flows and the model is none.
    """
    if not possible:
        raise DiffalignError(
            f"no step of trainer.sampling (kernel {sampler.kernel.name}, noise {sampler.kernel.level:g}, "
            f"{len(sampler.schedule)} steps) draws noise and is trained; expected noise above 0, and "
            "trainer.window_range or trainer.sampling.window to hold more than the last step."
        )
    for name in ("correction", "kl_form"):
        if getattr(config, name) in ("guard", "without_dt") and not process.is_flow:
            raise DiffalignError(
                f"trainer.{name} is {getattr(config, name)}, which needs the continuous time of a flow; expected "
                f"{'none, tempflow or flash' if name == 'correction' else 'exact or prediction'} for this model."
            )
    times = sampler.schedule.times
    std = coefficients(process, sampler.kernel, times[:-1], times[1:]).std
    gain = prediction_gain(process, sampler.kernel, times)
    dt = (times[:-1] - times[1:]).double()
    ones = torch.ones_like(std)
    size = elements if config.log_prob_reduction == "sum" else 1
    weights = {"none": ones, "guard": 1 / dt, "tempflow": std, "flash": policy.gradient_scale(gain, std)}
    weight = weights[config.correction]
    if config.correction in ("tempflow", "flash"):
        weight = weight / weight[list(possible)].mean()
    kl = {"exact": ones, "without_dt": dt, "prediction": 2 * (std / gain).square()}[config.kl_form]
    log_ratio = policy.unnormalised_log_ratio(ones, std) if not config.normalised else ones
    return Factors(weight.float(), (size * log_ratio).float(), (size * kl).float())


def prediction_gain(process: Process, kernel: Kernel, times: Tensor) -> Tensor:
    """Derivative `[S]` in float64 of each step's mean by the network's prediction."""
    start, one = times[:-1], torch.ones(len(times) - 1)
    step = coefficients(process, kernel, start, times[1:])
    x0, eps = process.to_x0(one, 0 * one, start), process.to_eps(one, 0 * one, start)
    return step.clean * x0.double() + step.noise * eps.double()


def weighted_parts(whole: dict[str, Tensor], weights: dict[str, float]) -> tuple[Tensor, Tensor]:
    """The reward's components `[M, N]` and their weights `[M]`; the reward itself when it has none.

    Raises:
        DiffalignError: a component is named that the reward does not have.
    """
    have = {name[5:]: values for name, values in whole.items() if name.startswith("part.")}
    if not weights:
        parts = list(have.values()) or [whole["rewards"]]
        return torch.stack(parts), torch.ones(len(parts))
    unknown = sorted(set(weights) - set(have))
    if unknown:
        raise DiffalignError(
            f"trainer.parts names {', '.join(unknown)}, but the components of trainer.reward are: "
            f"{', '.join(have) or 'none'}. Name some of these, or leave trainer.parts empty."
        )
    return torch.stack([have[name] for name in weights]), torch.tensor(list(weights.values()))


def conditional_transition(backbone: Backbone, kernel: Kernel, steps: StepRows) -> Transition:
    """The guided step, with gradients through the conditional branch alone.

    The mean of a step is affine in the prediction, so guidance may combine means.
    """
    told = steps.told
    assert told.unconditional is not None
    empty = Conditioning(**{**told.conditioning.tensors(), **told.unconditional.tensors()})
    with torch.no_grad():
        off = replace(steps, told=Told(empty)).transition(backbone, kernel)
    on = replace(steps, told=Told(told.conditioning)).transition(backbone, kernel)
    return Transition(off.mean + told.guidance * (on.mean - off.mean), on.std)
