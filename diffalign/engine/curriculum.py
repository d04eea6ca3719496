"""Training in stages from clear to close pairs, and a reference that follows at each stage's beginning.

Curry-DPO (Pattnaik et al. 2024, arXiv 2403.07230): pairs ordered by how far apart their pictures are, far ones first;
each stage starts from, and is held to, the policy that the one before ended with. Everything follows from the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import Parameter

from diffalign.config import RunConfig, trainer_class, trainer_config
from diffalign.data.gaps import known_gaps
from diffalign.data.pairs import Pairs
from diffalign.errors import DiffalignError
from diffalign.randomness import batch_records, derive_seed


@dataclass(frozen=True)
class Curriculum:
    """Which pairs are drawn when.

    Fields:
        order: `[N]` indices of the pairs, clearest first. stages: parts the order is cut into.
        steps: optimiser steps of a stage; the last one goes on to the end. keep: later stages also draw earlier parts.
        refresh: whether the reference becomes the policy when a stage after the first begins.
    """

    order: np.ndarray
    stages: int
    steps: int
    keep: bool = False
    refresh: bool = False

    def stage(self, step: int) -> int:
        """The stage, from 0, that the optimiser step `step`, from 0, belongs to."""
        return min(step // self.steps, self.stages - 1)

    def pool(self, stage: int) -> np.ndarray:
        """Indices of the pairs of a stage."""
        parts = np.array_split(self.order, self.stages)
        return np.concatenate(parts[: stage + 1]) if self.keep else parts[stage]

    def records(self, seed: int, step: int, global_batch: int) -> list[int]:
        """Indices of a step's global batch: epochs over the stage's pairs, in an order of the stage's own."""
        stage = self.stage(step)
        pool, first = self.pool(stage), stage * self.steps
        rows = batch_records(derive_seed(seed, "stage", stage), step - first, global_batch, len(pool))
        return [int(pool[row]) for row in rows]

    def refreshes(self, step: int) -> bool:
        """Whether the reference becomes the policy before this step."""
        return self.refresh and step > 0 and self.stage(step) > self.stage(step - 1)


def open_curriculum(config: RunConfig, cache: Any) -> Curriculum | None:
    """The curriculum of a recipe over its cached pairs; None where all data is drawn all the time.

    Raises:
        DiffalignError: the gaps tell no pairs apart, or there are fewer pairs than stages.
    """
    options = config.curriculum
    if options.stages == 1:
        return None
    gaps = _sizes(cache.pairs, options.gap)
    if len(gaps) < options.stages or (gaps == gaps[0]).all():
        raise DiffalignError(
            f"curriculum.stages is {options.stages}, but all {len(gaps)} pairs have the same gap "
            f"({options.gap}): there is no order from clear to close. Use soft labels (`diffalign data relabel`), name "
            "a column of `labels` in curriculum.gap, or set curriculum.stages=1."
        )
    assert options.steps is not None, "the configuration asks for it"
    order = np.argsort(-gaps, kind="stable")
    return Curriculum(order, options.stages, options.steps, options.keep, options.reference == "stage")


def check_curriculum(config: RunConfig, sharded: bool = False) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        DiffalignError: the method does not learn from pairs; or the reference is to follow, but there are no adapters,
            they are sharded, or the method has no reference that could follow.
    """
    kind = trainer_class(config)
    if config.curriculum.stages > 1 and "pairs" not in kind.data_kinds:
        raise DiffalignError(
            f"curriculum.stages is {config.curriculum.stages}, but trainer.method {config.trainer['method']} learns "
            f"from {kind.data_kinds[0]}, not pairs. Set curriculum.stages=1."
        )
    if config.curriculum.reference == "base":
        return
    trainer = trainer_config(config)
    if sharded:
        raise DiffalignError(
            "curriculum.reference is stage, which sharded runs (FSDP) do not support. Use one process or DDP."
        )
    if config.model.tune != "lora" or getattr(trainer, "reference", None) != "adapters_off":
        raise DiffalignError(
            "curriculum.reference is stage, which needs model.tune=lora and trainer.reference=adapters_off (it is "
            f"{getattr(trainer, 'reference', 'not an option of this method')!r}). Change them, or set "
            "curriculum.reference=base."
        )


@contextmanager
def anchored(
    backbone: Any, parameters: Sequence[Parameter], weights: Sequence[Tensor] | None
) -> Iterator[None]:
    """Inside the block the reference carries these weights of the trained parameters; None: the base model's.

    Outside of it, in evaluation, the reference is the base model as ever.
    """
    if weights is None:
        yield
        return
    backbone.anchor = list(zip(parameters, weights, strict=True))
    try:
        yield
    finally:
        backbone.anchor = ()


def _sizes(pairs: Pairs, gap: str) -> np.ndarray:
    """How far apart the pictures of each pair are `[N]`; 0 where nobody judged the aspect."""
    if gap == "label":
        return np.abs(pairs.preference.astype(np.float64) - 0.5)
    return np.nan_to_num(np.abs(known_gaps(pairs.gaps, gap, "curriculum.gap")))
