"""Pairs of stored denoising steps: which next state is preferred, from one shared state or from two trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from diffalign.data.rollouts import RolloutStore
from diffalign.errors import DiffalignError
from diffalign.objectives.transitions import scored_pairs
from diffalign.randomness import Draw
from diffalign.sampling.rollout import Told


@dataclass(frozen=True)
class StepBatch:
    """Pairs of denoising steps, ready for the network.

    Fields:
        x_t: states `[B, C, h, w]` that both next states were drawn from; `[2B, C, h, w]`, chosen rows first, when each
            has its own.
        chosen, rejected: next states `[B, C, h, w]`. t, t_prev: times `[B]` of the step.
        told: B rows. preference: `[B]` probability that `chosen` is really preferred. weight: `[B]` factor on the loss.
        draw: which pairs these are.
    """

    x_t: Tensor
    chosen: Tensor
    rejected: Tensor
    t: Tensor
    t_prev: Tensor
    told: Told
    preference: Tensor
    weight: Tensor
    draw: Draw

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def shared(self) -> bool:
        """Whether both next states were drawn from one state."""
        return len(self.x_t) == len(self.chosen)

    def to(self, device: torch.device | str) -> StepBatch:
        """The same batch on a device; number formats stay."""
        names = ("x_t", "chosen", "rejected", "t", "t_prev", "told", "preference", "weight")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


class StepPairs:
    """Pairs of steps over a store, fetched by index.

    Attributes:
        store: what was drawn. rows: `[M, 4]` prompt, step (its place among the store's candidate steps, or in the
            schedule), and which sample is chosen and rejected. unit: what the length counts in.
        folder: where they lie. broken: nothing is ever left out.
    """

    unit = "steps"

    def __init__(self, store: RolloutStore, rows: Tensor) -> None:
        self.store, self.rows, self.folder = store, rows, store.folder
        self.broken: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, draw: Draw) -> StepBatch:
        """The pairs of a draw, on the CPU."""
        rows = [self.rows[record].tolist() for record in draw.records]
        shared = self.store.kind == "candidates"
        states = [(self._candidates if shared else self._trajectories)(*row) for row in rows]
        before, chosen, rejected = (list(column) for column in zip(*states, strict=True))
        if not shared:
            before = [pair[0] for pair in before] + [pair[1] for pair in before]
        steps = torch.tensor([self.store.steps[row[1]] if shared else row[1] for row in rows])
        times, ones = self.store.schedule.times, torch.ones(len(rows))
        return StepBatch(
            x_t=torch.stack(before),
            chosen=torch.stack(chosen),
            rejected=torch.stack(rejected),
            t=times[steps],
            t_prev=times[steps + 1],
            told=self.store.told([row[0] for row in rows]),
            preference=ones,
            weight=ones,
            draw=draw,
        )

    def _candidates(
        self, prompt: int, place: int, chosen: int, rejected: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        state = self.store.read("latents", prompt)[0, self.store.steps[place]]
        drawn = self.store.read("candidates", prompt)[place]
        return state, drawn[chosen], drawn[rejected]

    def _trajectories(
        self, prompt: int, step: int, chosen: int, rejected: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        latents = self.store.read("latents", prompt)[[chosen, rejected]]
        return latents[:, step], latents[0, step + 1], latents[1, step + 1]


def candidate_pairs(store: RolloutStore, thresholds: Sequence[float], scale: float = 1.0) -> StepPairs:
    """Best against worst candidate of every stored step whose scores differ enough (SPO).

    Args:
        thresholds: one per candidate step: smallest difference of the two extremes' softmax. scale: factor on scores
            before the softmax; preference models of the CLIP kind have their logit scale in it.

    Raises:
        DiffalignError: no step is left.
    """
    rows, largest = [], 0.0
    for place, threshold in enumerate(thresholds):
        scores = store.scores[:, place] * scale
        best, worst, differs = scored_pairs(scores, threshold)
        gap = torch.tanh((scores.amax(1) - scores.amin(1)) / 2)
        largest = max(largest, float(gap.max()))
        for prompt in torch.nonzero(differs).flatten().tolist():
            rows.append([prompt, place, int(best[prompt]), int(worst[prompt])])
    if not rows:
        raise DiffalignError(
            f"no two candidates differ enough: their softmax differs by {largest:.3g} at most, and trainer.threshold "
            f"begins at {min(thresholds):g}. Lower trainer.threshold, or raise trainer.reward_scale (it is {scale:g})."
        )
    return StepPairs(store, torch.tensor(rows))


def trajectory_pairs(
    store: RolloutStore, steps: Sequence[int], pairs: str = "best_worst", min_gap: float = 0.0
) -> StepPairs:
    """The given steps of pairs of whole trajectories, preferred by the reward of their final pictures (D3PO).

    Args:
        pairs: `best_worst`: one pair per prompt. `all`: every two trajectories. min_gap: rewards that differ by no more
            are ties and left out.

    Raises:
        DiffalignError: no pair is left.
    """
    rows: list[list[int]] = []
    for prompt, rewards in enumerate(store.rewards.tolist()):
        order = sorted(range(len(rewards)), key=lambda k: -rewards[k])
        found = combinations(order, 2) if pairs == "all" else [(order[0], order[-1])]
        kept = [(best, worst) for best, worst in found if rewards[best] - rewards[worst] > min_gap]
        rows += [[prompt, step, best, worst] for best, worst in kept for step in steps]
    if not rows:
        raise DiffalignError(
            f"all {store.rewards.shape[1]} pictures of each of the {len(store)} prompts have the same reward (within "
            f"{min_gap:g}); expected some that differ. Raise trainer.rollouts.samples, or use another trainer.reward."
        )
    return StepPairs(store, torch.tensor(rows))
