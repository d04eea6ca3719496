"""Rewards of whole sets of pictures, base against tuned: Frechet distances, Vendi scores and the like.

A set has one score, so nothing can be resampled picture by picture. The interval is a delete-a-group jackknife over
prompts: the prompts are dealt into groups, and both sets are measured again without each of them. Values of sets of
different sizes do not compare, so no resampling with repetitions either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.evaluation.metric import Change, Shift, better_or_worse
from diffalign.evaluation.pictures import Progress, silent
from diffalign.evaluation.prompts import EvalPrompt
from diffalign.evaluation.scoring import Images, unique_names
from diffalign.evaluation.statistics import jackknife_interval
from diffalign.rewards import Reward, facts_of
from diffalign.rewards.guard import ask
from diffalign.rewards.sets.rewards import SetReward

GROUPS = 20
BATCH = 32


@dataclass(frozen=True)
class SetMetric(Shift):
    """One reward of all pictures of either model; higher is better.

    Fields:
        meaning: the scale of the values. n: pictures of a model. prompts: different ones.
    """

    prompts: int

    @property
    def change(self) -> Change:
        """Better or worse only when the interval leaves out 0."""
        return better_or_worse(self.interval)

    def as_json(self) -> dict[str, Any]:
        """The entry of `sets` in `evaluation.json`."""
        return {**super().as_json(), "prompts": self.prompts, "scale": self.meaning}


def measure_sets(
    base: Images,
    tuned: Images,
    prompts: Sequence[EvalPrompt],
    rewards: Sequence[Reward],
    *,
    progress: Progress = silent,
) -> dict[str, SetMetric]:
    """Rewards of the kind `set` on the pictures `[N, 3, H, W]` of both models, by name.

    Pictures of a prompt stay together; the prompts are dealt into at most 20 groups.

    Raises:
        DiffalignError: fewer than three different prompts, or a score that is not a finite number.
    """
    places: dict[str, int] = {}
    group = torch.tensor([places.setdefault(row.text, len(places)) for row in prompts])
    if rewards and len(places) < 3:
        raise DiffalignError(
            f"{rewards[0].name} judges whole sets, and its interval needs 3 prompts or more; got {len(places)}"
        )
    groups = min(GROUPS, len(places))
    kept = [torch.arange(len(prompts)), *((group % groups != k).nonzero()[:, 0] for k in range(groups))]
    texts = [row.text for row in prompts]
    found = {}
    for name, reward in zip(unique_names(rewards), rewards, strict=True):
        before, after = (
            _scores(reward, images, texts, kept, f"{name}: {side}", progress)
            for images, side in ((base, "base"), (tuned, "tuned"))
        )
        change = (after - before).numpy()
        interval = jackknife_interval(float(change[0]), change[1:])
        values = float(before[0]), float(after[0])
        scale = facts_of(reward).scale
        found[name] = SetMetric(name, scale, *values, float(change[0]), interval, len(texts), len(places))
    return found


def _scores(
    reward: Reward, images: Images, texts: list[str], kept: list[Tensor], label: str, progress: Progress
) -> Tensor:
    """Scores of some subsets of the pictures, float64; pictures go through the encoder once.

    Raises:
        DiffalignError: a score is not finite.
    """
    parts, values = [], []
    with torch.no_grad():
        for start in range(0, len(texts), BATCH):
            progress(label, start, len(texts))
            batch = images[start : start + BATCH].float()
            parts.append(reward.features(batch) if isinstance(reward, SetReward) else batch)
        whole = torch.cat(parts)
        for rows in kept:
            said = [texts[row] for row in rows.tolist()]
            measure = reward.measured if isinstance(reward, SetReward) else partial(ask, reward)
            values.append(measure(whole[rows], said).mean[0].double().cpu())
    progress(label, len(texts), len(texts))
    scores = torch.stack(values)
    if not scores.isfinite().all():
        raise DiffalignError(
            f"{label}: the set's score is not a finite number; are there enough pictures for it?"
        )
    return scores
