"""Compare two models on the same prompts and seeds: what got better, what got worse, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import DiffalignError
from diffalign.evaluation.metric import Metric, Scores, measure
from diffalign.evaluation.pictures import (
    Pictures,
    Progress,
    Settings,
    generate_pictures,
    pictures_in_memory,
    silent,
)
from diffalign.evaluation.prompts import EvalPrompt, with_seeds
from diffalign.evaluation.scoring import Images, Scored, score_pictures, unique_names
from diffalign.rewards.base import Reward

__all__ = ["Comparison", "Images", "Metric", "Scores", "compare", "compare_models"]


@dataclass(frozen=True)
class Comparison:
    """All metrics, the first being the main one; `categories`: category to the metrics of its prompts."""

    prompts: list[EvalPrompt]
    metrics: dict[str, Metric]
    categories: dict[str, dict[str, Metric]]
    scores: dict[str, Scores]
    skipped: dict[str, int]

    @property
    def main(self) -> Metric:
        """The metric of the first reward."""
        return next(iter(self.metrics.values()))

    def as_json(self) -> dict[str, Any]:
        """`metrics`, `categories` and `skipped` (pictures without a score, per reward) of `evaluation.json`."""
        return {
            "metrics": {name: metric.as_json() for name, metric in self.metrics.items()},
            "categories": {
                category: {name: metric.as_json() for name, metric in metrics.items()}
                for category, metrics in self.categories.items()
            },
            "skipped": self.skipped,
        }


def compare(
    base_images: Images,
    tuned_images: Images,
    prompts: Sequence[EvalPrompt],
    rewards: Sequence[Reward],
    *,
    progress: Progress = silent,
) -> Comparison:
    """Score both sets of pictures and compare them picture by picture.

    Args:
        base_images, tuned_images: `[N, 3, H, W]` in [0, 1]; row i of both belongs to `prompts[i]`.
        prompts: `N` prompts; rows with the same text are one cluster of the intervals.
        rewards: scorers of single pictures; the first gives the main metric. A reward's part becomes the
            metric `reward/part` when it applies to every scored picture. Pairs that a reward skipped are left
            out of its metrics and counted.

    Raises:
        DiffalignError: lengths differ, no reward, a reward for sets or another modality, scores that are not
            finite, or fewer than two prompts left by a reward that skips.
    """
    if not len(base_images) == len(tuned_images) == len(prompts):
        raise DiffalignError(
            f"a paired comparison needs one base and one tuned picture per prompt; got {len(base_images)} "
            f"base pictures, {len(tuned_images)} tuned pictures and {len(prompts)} prompts"
        )
    if not rewards:
        raise DiffalignError("no reward to compare by; expected at least one, such as scenes-judge")
    scores: dict[str, Scores] = {}
    owners: dict[str, str] = {}
    skipped: dict[str, int] = {}
    texts = [prompt.text for prompt in prompts]
    for name, reward in zip(unique_names(rewards), rewards, strict=True):
        _refuse_sets(reward)
        base, tuned = (
            score_pictures(reward, images, texts, label=f"{name}: {side}", progress=progress)
            for side, images in (("base", base_images), ("tuned", tuned_images))
        )
        paired = _paired(name, base, tuned)
        scores |= paired
        owners |= dict.fromkeys(paired, name)
        skipped[name] = base.skipped + tuned.skipped
    metrics = _metrics(scores, owners, prompts)
    categories = _by_category({name: scores[name] for name in metrics}, prompts, next(iter(metrics)))
    return Comparison(list(prompts), metrics, categories, scores, skipped)


def compare_models(
    base: Any | None,
    tuned: Any,
    prompts: Sequence[EvalPrompt],
    rewards: Sequence[Reward],
    *,
    steps: int,
    guidance: float,
    batch_size: int,
    seed: int,
    seeds_per_prompt: int = 1,
    base_folder: Path | None = None,
    base_fingerprint: str = "",
    progress: Progress = silent,
) -> tuple[Comparison, Images, Images]:
    """Generate with two models from the same prompts and seeds, and compare.

    Args:
        base: pipeline or backbone; None: the frozen reference of `tuned`, which must be a backbone.
        base_folder: where pictures of the base are kept and found again, under `base_fingerprint`.

    Returns:
        The comparison, the base pictures and the tuned pictures.
    """
    rows = with_seeds(prompts, seed, seeds_per_prompt)
    settings = Settings(steps, guidance, batch_size)
    if base is None:
        with tuned.reference():
            before = _pictures(tuned, rows, settings, base_folder, base_fingerprint, progress)
    else:
        before = _pictures(base, rows, settings, base_folder, base_fingerprint, progress)
    after = pictures_in_memory(tuned, rows, settings, "tuned pictures", progress)
    return compare(before, after, rows, rewards, progress=progress), before, after


def _pictures(
    model: Any,
    rows: Sequence[EvalPrompt],
    settings: Settings,
    folder: Path | None,
    key: str,
    progress: Progress,
) -> Images:
    if folder is None:
        return pictures_in_memory(model, rows, settings, "base pictures", progress)
    found: Pictures = generate_pictures(
        model, rows, settings, folder, fingerprint=key, label="base pictures", progress=progress
    )
    return found


def _refuse_sets(reward: Reward) -> None:
    if reward.modality != "image" or reward.kind != "sample":
        raise DiffalignError(
            f"reward {reward.name!r} judges {reward.modality} as {reward.kind}s; a paired comparison needs a "
            "reward of single pictures"
        )


def _paired(name: str, base: Scored, tuned: Scored) -> dict[str, Scores]:
    """Scores of a reward and of its parts."""
    parts = [part for part in base.parts if part in tuned.parts]
    return {name: Scores(base.mean, tuned.mean, base.std, tuned.std)} | {
        f"{name}/{part}": Scores(base.parts[part], tuned.parts[part]) for part in parts
    }


def _metrics(
    scores: dict[str, Scores], owners: dict[str, str], prompts: Sequence[EvalPrompt]
) -> dict[str, Metric]:
    """Metrics of the rewards, and of the parts that apply wherever their reward (`owners`) gave a score."""
    found: dict[str, Metric] = {}
    for name, values in scores.items():
        if not values.scored[scores[owners[name]].scored].all():
            continue
        metric = measure(name, values, prompts)
        if metric is None:
            raise DiffalignError(
                f"{name}: fewer than 2 different prompts have both scores ({int(values.scored.sum())} of "
                f"{len(prompts)} pairs scored). Use more prompts, or look at why pictures were skipped."
            )
        found[name] = metric
    return found


def _by_category(
    scores: dict[str, Scores], prompts: Sequence[EvalPrompt], main: str
) -> dict[str, dict[str, Metric]]:
    """Metrics per category, in order of appearance; one with fewer than two prompts scored is left out."""
    found: dict[str, dict[str, Metric]] = {}
    for category in dict.fromkeys(prompt.category for prompt in prompts if prompt.category):
        rows = np.array([i for i, prompt in enumerate(prompts) if prompt.category == category])
        measured = {name: measure(name, values, prompts, rows) for name, values in scores.items()}
        kept = {name: metric for name, metric in measured.items() if metric is not None}
        if main in kept:
            found[category] = kept
    return found
