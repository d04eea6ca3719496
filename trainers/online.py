"""What all online methods share: options, the rows an optimiser step learns from, and the state between rounds.

A run is rounds. In each the policy draws a group of samples for every one of some prompts, a reward scores them, and
the method turns them into rows: steps of trajectories, noised samples, or pairs. `updates` optimiser steps, times
`passes` over the same samples, learn from the rows; each uses whole groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.objectives.advantages import Advantages
from diffalign.randomness import Draw
from diffalign.sampling.collection import Collected
from diffalign.sampling.prompt_choice import PromptChoiceOptions
from diffalign.sampling.rollout import Sampler, default_kernel
from diffalign.sampling.schedules import schedule_of
from diffalign.sampling.transition import Kernel, KernelName
from diffalign.strict import StrictModel
from diffalign.trainers.online_rows import Rows

Losses = tuple[Tensor, dict[str, Tensor]]
State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and JSON-able values."""


class SamplingOptions(StrictModel):
    """How the policy draws its samples."""

    steps: int = Field(default=16, ge=1)
    """Denoising steps of a sample; fewer than at inference save time in proportion."""
    kernel: KernelName | None = None
    """How a step draws noise: ddim, ancestral, cps, lcm for consistency models, flow_sde or dance for flows. null: lcm
    for LCM; for methods that learn from steps flow_sde for flows and ddim for others; else no noise at all."""
    noise: float | None = Field(default=None, ge=0)
    """Amount of noise: eta of ddim and dance, a of flow_sde, share of cps. null: as in the papers, 1, 0.3, 0.7, 0.8."""
    guidance: float = 5.0
    """Guidance scale while drawing; 1 or less turns it off and halves the cost."""
    batch_size: int = Field(default=16, ge=1)
    """Samples that go through the network at once while drawing."""
    same_start: bool = False
    """Whether the samples of a group start from the same noise (DanceGRPO) or not (Flow-GRPO)."""
    window: tuple[int, int] | None = None
    """Steps that draw noise, from the first to before the second, counted from the noisiest; the others are
    deterministic. null: all."""

    @field_validator("window")
    @classmethod
    def _window_in_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] < value[1]:
            raise ValueError("should be two rising step numbers, the first at least 0")
        return value


class OnlineOptions(StrictModel):
    """Options of every online method."""

    reward: Any = "pickscore"
    """What is learned from: a name, `name@PATH`, `module:Name`, a file, or a mapping with the key `reward`."""
    prompts: str | None = None
    """Prompts to draw for, as `evaluation.prompts` takes them. null: the captions of `data.source`."""
    prompts_per_round: int = Field(default=8, ge=1)
    """Groups of a round, over all processes."""
    prompt_choice: PromptChoiceOptions = PromptChoiceOptions()
    """Which prompts a round takes: all in turn, or a curriculum by success rate."""
    samples: int = Field(default=8, ge=1)
    """Samples of a group: pictures of one prompt."""
    updates: int = Field(default=1, ge=1)
    """Optimiser steps that a round's groups are divided among."""
    passes: int = Field(default=1, ge=1)
    """How often a round is learned from; `optim.steps` counts optimiser steps: updates x passes a round."""
    sampling: SamplingOptions = SamplingOptions()
    """How samples are drawn."""
    uncertainty: float = Field(default=0.0, ge=0)
    """Weight exp(-uncertainty std / mean std) of a sample whose reward has an uncertainty (Ctrl-U): 0 ignores it."""
    max_failed: float = Field(default=0.5, ge=0, le=1)
    """Largest share of a round's samples that the reward may fail on; more leave the weights alone in this round."""
    reference: Literal["adapters_off", "frozen_copy"] = "adapters_off"
    """Where the reference's predictions come from. adapters_off: the same network without its adapters (LoRA only).
    frozen_copy: a second network; full fine-tuning always uses one."""


class OnlineTrainer:
    """Base of online methods; a method adds `learn`, `batch` and `loss`."""

    Config: ClassVar[type[OnlineOptions]]
    data_kinds: ClassVar[tuple[str, ...]] = ("prompts",)
    needs: ClassVar[dict[str, tuple[str, ...]]] = {}
    tunes: ClassVar[tuple[str, ...]] = ("lora", "full")
    needs_trajectory: ClassVar[bool] = False
    asks_reference: ClassVar[bool] = True

    def __init__(self, config: Any, backbone: Backbone, seed: int = 0) -> None:
        self.config, self.backbone, self.seed = config, backbone, seed
        # Rows of all processes one after the other; the engine puts its own function here.
        self.gather: Callable[[Tensor], Tensor] = lambda values: values
        self.collected: Collected | None = None
        # What the samples are scored with; the engine puts it here.
        self.reward: Any = None
        # Where the run lies; the engine puts its folder here.
        self.folder = Path()

    @classmethod
    def needs_frozen_copy(cls, config: Any, tune: str) -> bool:
        """Whether a second network has to be loaded."""
        return cls.asks_reference and (config.reference == "frozen_copy" or tune == "full")

    def sampler(self, number: int) -> Sampler:
        """How the samples of a round are drawn.

        Raises:
            DiffalignError: the model cannot be sampled in this way.
        """
        options = self.config.sampling
        schedule = schedule_of(self.backbone, options.steps)
        kernel = self.kernel()
        return Sampler(schedule, kernel, window=options.window, batch_size=options.batch_size)

    def kernel(self) -> Kernel:
        """The stochastic step of the samples; deterministic for methods that do not look at steps."""
        options = self.config.sampling
        usual = default_kernel(self.backbone)
        if options.kernel is None and not self.needs_trajectory and usual != "lcm":
            return Kernel("ddim", options.noise or 0.0)
        kernel = Kernel(options.kernel or usual, options.noise)
        kernel.check(self.backbone.process)
        return kernel

    def drawing(self, number: int) -> AbstractContextManager[Any]:
        """A block in which the model carries the weights that round `number` is drawn with: the current ones.

        Asked for once a round, before it is drawn, and not when a run is resumed in the middle of one.
        """
        return nullcontext()

    def say(self, prompt: str, k: int) -> str:
        """What the network is told for sample k of a prompt's group; the reward sees the prompt itself."""
        return prompt

    def learn(self, collected: Collected) -> tuple[Rows, dict[str, float]]:
        """Turn a round into rows, and say what is worth knowing of it.

        The result depends on the samples, the frozen reference and the method's state alone, not on the current
        weights: a run that is resumed in the middle of a round calls this again.
        """
        raise NotImplementedError

    def begin(self, rows: Sequence[int]) -> None:
        """Called before each optimiser step with the rows of it on this process."""

    def batch(self, rows: Sequence[int], draw: Draw) -> Any:
        """The tensors of some rows on the CPU; the draw's records are their numbers in the round."""
        raise NotImplementedError

    def loss(self, batch: Any) -> Losses:
        """Losses and metrics, each `[B]`; the engine takes the mean over the rows of the optimiser step."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called when the weights have moved."""

    def state(self) -> State:
        """What the method remembers between rounds."""
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from a `state`."""


@dataclass(frozen=True)
class WholeRound:
    """Columns of a round over all processes, in the order of the samples' numbers.

    Fields:
        columns: `[N_all, ...]` by name: rewards, places, and what else was asked for. own: `[N]` where this process's
            samples are among them.
    """

    columns: dict[str, Tensor]
    own: Tensor

    @property
    def rewards(self) -> Tensor:
        """`[N_all]`; NaN where the reward failed."""
        return self.columns["rewards"]

    @property
    def places(self) -> Tensor:
        """`[N_all]` long: the group of each sample."""
        return self.columns["places"]

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def advantages(self, found: Advantages) -> Advantages:
        """Of this process's samples."""
        return Advantages(found.values[self.own], found.used[self.own])


def whole_round(
    gather: Callable[[Tensor], Tensor], collected: Collected, more: Mapping[str, Tensor] | None = None
) -> WholeRound:
    """Gather a round; every process must call this.

    Args:
        gather: rows of all processes. more: further columns `[N, ...]` of this process.
    """
    numbers = gather(collected.numbers)
    order = numbers.argsort()
    own = {"rewards": collected.rewards, "places": collected.places, **(more or {})}
    columns = {name: gather(values)[order] for name, values in own.items()}
    columns["numbers"] = numbers[order]
    return WholeRound(columns, torch.searchsorted(columns["numbers"], collected.numbers))


def sample_weights(collected: Collected, uncertainty: float) -> Tensor:
    """Weights `[N]` in (0, 1] of samples, `exp(-uncertainty std / mean std)`; 0 where there is no reward.

    Source: Ctrl-U (Zhang et al. 2024, arXiv 2410.11236), with deviations in units of their mean.
    """
    known = collected.rewards.isfinite()
    if collected.std is None or not uncertainty:
        return known.float()
    std = torch.nan_to_num(collected.std)
    mean = collected.mean_std
    if mean is None:
        mean = float(std[known].mean()) if known.any() else 1.0
    return torch.exp(-uncertainty * std / max(mean, 1e-12)) * known


def updates_of(config: OnlineOptions) -> int:
    """Optimiser steps of a round."""
    return config.updates * config.passes


def places_of_step(config: OnlineOptions, step: int) -> range:
    """Places in the round of the groups that an optimiser step learns from."""
    size = config.prompts_per_round // config.updates
    part = step % config.updates
    return range(part * size, (part + 1) * size)
