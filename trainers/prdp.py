"""PRDP: the policy predicts reward differences with its log-ratios of whole denoising trajectories.

Deng et al., CVPR 2024, arXiv 2402.08714; no code was released. The regression's optimum is that of reward maximisation
with a KL penalty, `p_ref exp(r / beta) / Z` (eq. 7), and proximal updates keep several steps on one collection stable.
How everything was decided: docs/methods/prdp.md.

A round costs, per sample and step: one forward to draw it, one of the reference, one of the policy for each update that
finds the weights moved, and one forward and backward for each step that is learned from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.errors import DiffalignError
from diffalign.objectives.prdp import beta_per_nat, known_weights, prdp_gradient
from diffalign.randomness import Draw, generator
from diffalign.sampling.collection import Collected
from diffalign.sampling.rollout import chunks
from diffalign.sampling.transition import Kernel
from diffalign.trainers.online import Losses, OnlineOptions, OnlineTrainer, places_of_step, sample_weights
from diffalign.trainers.online_rows import Rows, StepRows, StepTable, moved


class PRDPConfig(OnlineOptions):
    """PRDP."""

    method: Literal["prdp"] = "prdp"
    beta: float = Field(default=0.1, gt=0)
    """KL penalty, reward per nat of the log-ratio that `reduction` says. Start with (spread of the rewards of a prompt)
    / 10; smaller goes further from the base model. The log's `target_nats` is that spread over beta."""
    reduction: Literal["sum", "mean"] = "sum"
    """`beta` belongs to log-ratios summed over latent elements and steps (the paper's equations), or to their means
    (its appendix); the same number means another penalty by a factor of elements x steps."""
    clip: float | None = Field(default=0.5, gt=0)
    """Proximal updates: how far a step's log-ratio, summed over elements, may move from where it was drawn before it
    stops counting, in nats. Smaller is slower and safer. null: none."""
    ties: bool = True
    """Whether pairs of equal rewards count: their log-ratios should be equal, too. The paper's equations keep them, its
    listing drops them."""
    train_steps: int | None = Field(default=None, ge=1)
    """Denoising steps of a sample that are differentiated, drawn at random and weighted up: an unbiased gradient with
    more noise for less time. null: all."""

    @model_validator(mode="after")
    def _pairs_need_two(self) -> PRDPConfig:
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}; should be at least 2, for a pair")
        return self


@dataclass(frozen=True)
class PRDPRows:
    """Steps to differentiate, and what the pass over whole trajectories said of them.

    Fields:
        steps: B rows. coefficient: the loss's derivative by the log-probability `[B]`.
        value: the row's part of the loss `[B]`. measured: more metrics, each `[B]`.
    """

    steps: StepRows
    coefficient: Tensor
    value: Tensor
    measured: dict[str, Tensor]

    @property
    def draw(self) -> Draw:
        """Where the batch stands in the run."""
        return self.steps.draw

    def __len__(self) -> int:
        return len(self.steps)

    def to(self, device: torch.device) -> PRDPRows:
        """The same batch on a device."""
        measured = {name: value.to(device) for name, value in self.measured.items()}
        return replace(moved(self, device), measured=measured)


class PRDPTrainer(OnlineTrainer):
    """Reward difference prediction with proximal updates."""

    Config = PRDPConfig
    needs_trajectory: ClassVar[bool] = True

    def __init__(self, config: PRDPConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self._elements = math.prod(backbone.latent_shape)
        self._steps: list[int] = []
        self._rows_per_group = 0.0

    def learn(self, collected: Collected) -> tuple[Rows, dict[str, float]]:
        """Log-probabilities of the reference, and the rows of all samples that are in a pair.

        Raises:
            DiffalignError: no step draws noise, or `train_steps` asks for more than there are.
        """
        assert collected.trajectory is not None
        self.collected, self._steps = collected, self._noisy_steps(collected)
        self._weights = self._pair_weights(collected)
        config, count = self.config, len(self._steps)
        self._beta = beta_per_nat(config.beta, config.reduction, self._elements, count)
        self._every = StepTable(collected, self._steps)
        self._reference, rounded = self._log_probs(torch.arange(len(collected)), reference=True)
        # Both are means over elements in float32, rounded alike: an unmoved policy has log-ratios of exactly 0.
        drawn = collected.trajectory.log_probs[self._steps].T
        self._old = (drawn - rounded).double() * self._elements
        self._table = StepTable(collected, self._steps)
        self._table.keep((self._weights > 0)[self._table.sample] & self._chosen_steps(collected))
        self._look(self._old, torch.zeros(0).long())
        return self._table.rows, self._facts(collected)

    def begin(self, rows: Sequence[int]) -> None:
        """Decide the coefficients of an optimiser step; runs the policy over whole trajectories, without gradients."""
        samples = self._table.sample[list(rows)] if rows else torch.zeros(0).long()
        own = samples.unique()
        # Processes go on alike: with the same number of forwards, and with the same count of rows and groups.
        groups = len((own // self.config.samples).unique())
        told = self.gather(torch.tensor([[len(rows), groups, len(own), self._may_have_moved(own)]]))
        self._rows_per_group = float(told[:, 0].sum() / told[:, 1].sum().clamp(min=1))
        if not told[:, 0].any():
            return
        ratios = self._old
        if told[:, 3].any():
            padding = own.new_zeros(int(told[:, 2].max()) - len(own))
            ratios = self._log_probs(torch.cat([own, padding]))[0] - self._reference
        self._look(ratios, samples)

    def batch(self, rows: Sequence[int], draw: Draw) -> PRDPRows:
        """Some rows with their coefficients."""
        steps, found, k = self._table.take(rows, draw), self._found, self.config.samples
        group, member = steps.sample // k, steps.sample % k
        place = torch.searchsorted(torch.tensor(self._steps), steps.step)
        # The engine takes the mean over the rows of all processes; the loss is a mean over groups.
        share = self._rows_per_group / self._own_rows[group].clamp(min=1)
        left_out = len(self._steps) / (self.config.train_steps or len(self._steps))
        measured = {
            "unclipped_loss": found.unclipped[group] * share,
            "log_ratio": self._ratios[steps.sample].sum(1),
            "shift": (self._ratios - self._old)[steps.sample, place].abs(),
            "clipped": found.outside[group, member, place].double(),
        }
        coefficient = found.coefficients[group, member, place] * self._rows_per_group * left_out
        return PRDPRows(steps, coefficient, found.loss[group] * share, measured)

    def loss(self, batch: PRDPRows) -> Losses:
        """The true loss as a value, with its exact gradient, one step at a time; each `[B]`."""
        steps = batch.steps
        now = steps.transition(self.backbone, self._kernel).log_prob(steps.x_prev, "sum")
        losses = batch.value.float() + batch.coefficient.float() * (now - now.detach())
        metrics = {name: value.float() for name, value in batch.measured.items()}
        return losses, {"prdp_loss": batch.value.float(), **metrics}

    @property
    def _kernel(self) -> Kernel:
        return self._every.trajectory.sampler.kernel

    def _look(self, ratios: Tensor, samples: Tensor) -> None:
        """Coefficients for the groups of some samples `[r]`, one per row, at log-ratios `[N, S]`; 0 for the others."""
        assert self.collected is not None
        k, config = self.config.samples, self.config
        weights = torch.zeros_like(self._weights)
        weights[samples] = self._weights[samples]
        now, old = ratios.reshape(-1, k, len(self._steps)), self._old.reshape(-1, k, len(self._steps))
        rewards, weights = self.collected.rewards.double().reshape(-1, k), weights.reshape(-1, k)
        self._ratios = ratios
        self._found = prdp_gradient(now, old, rewards, self._beta, config.clip, weights, ties=config.ties)
        self._own_rows = torch.bincount(samples // k, minlength=len(rewards))

    def _noisy_steps(self, collected: Collected) -> list[int]:
        """Steps of a trajectory that have a density.

        Raises:
            DiffalignError: there is none, or fewer than are asked for.
        """
        assert collected.trajectory is not None
        sampler = collected.trajectory.sampler
        steps, wanted = sampler.stochastic(self.backbone.process), self.config.train_steps or 1
        if len(steps) < wanted:
            raise DiffalignError(
                f"{len(steps)} of the {len(sampler.schedule)} steps of a sample draw noise; expected at least "
                f"{wanted}. Lower trainer.train_steps, widen trainer.sampling.window, or choose a kernel with "
                "noise (trainer.sampling.kernel, trainer.sampling.noise)."
            )
        return steps

    def _pair_weights(self, collected: Collected) -> Tensor:
        """Weights `[N]` in float64, 0 for samples without a reward and for those that are alone in their group."""
        weights = sample_weights(collected, self.config.uncertainty).double()
        weights = known_weights(collected.rewards, weights).reshape(-1, collected.samples)
        paired = (weights > 0).sum(1, keepdim=True) > 1
        return (weights * paired).flatten()

    def _chosen_steps(self, collected: Collected) -> Tensor:
        """Which rows of all steps `[N S]` are differentiated: `train_steps` of each sample, at random."""
        count, total = self.config.train_steps or len(self._steps), len(self._steps)
        chosen = torch.zeros(len(collected), total, dtype=torch.bool)
        for row, number in enumerate(collected.numbers.tolist()):
            draws = generator(self.seed, "prdp steps", collected.round, number)
            chosen[row, torch.randperm(total, generator=draws)[:count]] = True
        return chosen.flatten()

    def _may_have_moved(self, samples: Tensor) -> bool:
        """Whether the weights may differ from those that drew the samples: not in the first update of a single pass."""
        if not len(samples):
            return False
        assert self.collected is not None
        places = self.collected.places[samples]
        return self.config.passes > 1 or bool((places >= places_of_step(self.config, 0).stop).any())

    def _log_probs(self, samples: Tensor, reference: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[N, S]` of the steps of some samples without gradients; 0 for the others.

        Step by step and in chunks of the size that they were drawn in, since results depend on it.

        Returns:
            Sums over elements in float64, and means as a rollout computes them.
        """
        assert self.collected is not None
        sums = torch.zeros(len(self.collected), len(self._steps), dtype=torch.float64)
        means = torch.zeros(len(self.collected), len(self._steps))
        for place in range(len(self._steps)):
            for part in chunks(len(samples), self.config.sampling.batch_size):
                chosen = samples[part.start : part.stop]
                numbers = (chosen * len(self._steps) + place).tolist()
                draw = Draw(self.seed, 0, numbers, numbers, len(numbers))
                steps = self._every.take(numbers, draw).to(self.backbone.device)
                with torch.no_grad():
                    now = steps.transition(self.backbone, self._kernel, reference=reference)
                exact = replace(now, mean=now.mean.double(), std=now.std.double())
                sums[chosen, place] = exact.log_prob(steps.x_prev.double(), "sum").cpu()
                means[chosen, place] = now.log_prob(steps.x_prev).cpu()
        return sums, means

    def _facts(self, collected: Collected) -> dict[str, float]:
        """What the round says of beta and of the distance from the reference."""
        used = (self._weights > 0).reshape(-1, collected.samples)
        if not used.any():
            return {}
        rewards = torch.where(used, collected.rewards.double().reshape(-1, collected.samples), 0.0)
        mean = rewards.sum(1, keepdim=True) / used.sum(1, keepdim=True).clamp(min=1)
        squares = torch.where(used, rewards - mean, 0.0).square().sum(1) / (used.sum(1) - 1).clamp(min=1)
        spread = float(squares[used.any(1)].sqrt().mean())
        log_ratio = self._old.sum(1)[used.flatten()]
        return {
            "trajectory_kl": float(log_ratio.mean()),
            "group_std": spread,
            "target_nats": spread / self._beta,
        }
