"""Compare two models on the same prompts and seeds: what got better, what got worse, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.evaluation.pictures import (
    Pictures,
    Progress,
    Settings,
    generate_batch,
    generate_pictures,
    silent,
)
from diffalign.evaluation.prompts import EvalPrompt, with_seeds
from diffalign.evaluation.statistics import (
    Interval,
    WinRate,
    cluster_bootstrap,
    paired_difference,
    proportion_interval,
    win_rate,
)
from diffalign.rewards.base import Reward

Array = NDArray[np.float64]
Change = Literal["better", "worse", "no difference"]
SCORE_BATCH = 16


class Images(Protocol):
    """Pictures in [0, 1] that can be sliced into `[B, 3, H, W]`: a tensor or `Pictures`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice) -> Tensor: ...


@dataclass(frozen=True)
class Scores:
    """One metric of every picture `[N]`, NaN where it does not apply; `std`: the scorer's own uncertainty."""

    base: Array
    tuned: Array
    base_std: Array | None = None
    tuned_std: Array | None = None


@dataclass(frozen=True)
class Metric:
    """One metric of two models; all intervals are 95 % over prompts. `binary`: every score is 0 or 1."""

    name: str
    binary: bool
    base: float
    tuned: float
    base_interval: Interval
    tuned_interval: Interval
    difference: float
    interval: Interval
    n: int
    prompts: int
    wins: WinRate
    scorer_std: tuple[float, float] | None = None

    @property
    def change(self) -> Change:
        """Better or worse only when the interval of the difference leaves out 0."""
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "no difference"

    def as_json(self) -> dict[str, Any]:
        """Numbers of the metric as they stand in `evaluation.json`."""
        wins = self.wins
        facts: dict[str, Any] = {
            "base": self.base,
            "tuned": self.tuned,
            "difference": self.difference,
            "interval": list(self.interval),
            "n": self.n,
            "prompts": self.prompts,
            "verdict": self.change,
            "binary": self.binary,
            "base_interval": list(self.base_interval),
            "tuned_interval": list(self.tuned_interval),
            "win_rate": wins.rate,
            "win_rate_interval": list(wins.interval),
            "wins": wins.wins,
            "ties": wins.ties,
            "losses": wins.losses,
            "sign_test_p": wins.p_value,
        }
        if self.scorer_std:
            facts["scorer_std"] = {"base": self.scorer_std[0], "tuned": self.scorer_std[1]}
        return facts


@dataclass(frozen=True)
class Comparison:
    """All metrics, the first being the main one; `categories`: category to the metrics of its prompts."""

    prompts: list[EvalPrompt]
    metrics: dict[str, Metric]
    categories: dict[str, dict[str, Metric]]
    scores: dict[str, Scores]

    @property
    def main(self) -> Metric:
        """The metric of the first reward."""
        return next(iter(self.metrics.values()))

    def as_json(self) -> dict[str, Any]:
        """`metrics` and `categories` as they stand in `evaluation.json`."""
        return {
            "metrics": {name: metric.as_json() for name, metric in self.metrics.items()},
            "categories": {
                category: {name: metric.as_json() for name, metric in metrics.items()}
                for category, metrics in self.categories.items()
            },
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
            metric `reward/part` when it applies to every picture.

    Raises:
        DiffalignError: lengths differ, no reward, a reward for sets or another modality, or scores that are
            not finite.
    """
    if not len(base_images) == len(tuned_images) == len(prompts):
        raise DiffalignError(
            f"a paired comparison needs one base and one tuned picture per prompt; got {len(base_images)} "
            f"base pictures, {len(tuned_images)} tuned pictures and {len(prompts)} prompts"
        )
    if not rewards:
        raise DiffalignError("no reward to compare by; expected at least one, such as scenes-judge")
    scores: dict[str, Scores] = {}
    for reward in rewards:
        base = _score(reward, base_images, prompts, f"{reward.name}: base", progress)
        tuned = _score(reward, tuned_images, prompts, f"{reward.name}: tuned", progress)
        scores |= _paired(reward.name, base, tuned)
    whole = {
        name: s for name, s in scores.items() if np.isfinite(s.base).all() and np.isfinite(s.tuned).all()
    }
    rows = np.arange(len(prompts))
    return Comparison(
        list(prompts),
        {name: _metric(name, s, prompts, rows) for name, s in whole.items()},
        _by_category(whole, prompts),
        scores,
    )


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
    after = _in_memory(tuned, rows, settings, "tuned pictures", progress)
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
        return _in_memory(model, rows, settings, "base pictures", progress)
    found: Pictures = generate_pictures(
        model, rows, settings, folder, fingerprint=key, label="base pictures", progress=progress
    )
    return found


def _in_memory(
    model: Any, rows: Sequence[EvalPrompt], settings: Settings, label: str, progress: Progress
) -> Tensor:
    """Pictures as a tensor, rounded to the 256 levels that a file would hold."""
    parts = []
    for start in range(0, len(rows), settings.batch_size):
        progress(label, start, len(rows))
        images = generate_batch(model, rows[start : start + settings.batch_size], settings)
        parts.append((images.clamp(0, 1) * 255).round().cpu() / 255)
    progress(label, len(rows), len(rows))
    return torch.cat(parts)


def _score(
    reward: Reward, images: Images, prompts: Sequence[EvalPrompt], label: str, progress: Progress
) -> dict[str, Array]:
    """Scores of a reward: key "" holds the means, "<std>" the scorer's uncertainty, others its parts."""
    if reward.modality != "image" or reward.kind != "sample":
        raise DiffalignError(
            f"reward {reward.name!r} judges {reward.modality} as {reward.kind}s; a paired comparison needs a "
            "reward of single pictures"
        )
    columns: dict[str, list[Tensor]] = {}
    for start in range(0, len(prompts), SCORE_BATCH):
        progress(label, start, len(prompts))
        texts = [prompt.text for prompt in prompts[start : start + SCORE_BATCH]]
        with torch.no_grad():
            output = reward.score(images[start : start + SCORE_BATCH], texts)
        named = {"": output.mean} | output.parts | ({} if output.std is None else {"<std>": output.std})
        for name, values in named.items():
            columns.setdefault(name, []).append(values.detach().double().cpu().reshape(-1))
    progress(label, len(prompts), len(prompts))
    scores = {name: torch.cat(values).numpy() for name, values in columns.items()}
    bad = int((~np.isfinite(scores[""])).sum())
    if bad:
        raise DiffalignError(f"{label}: {bad} of {len(prompts)} scores are not finite numbers")
    return scores


def _paired(name: str, base: dict[str, Array], tuned: dict[str, Array]) -> dict[str, Scores]:
    paired = {name: Scores(base[""], tuned[""], base.get("<std>"), tuned.get("<std>"))}
    parts = [part for part in base if part not in ("", "<std>") and part in tuned]
    return paired | {f"{name}/{part}": Scores(base[part], tuned[part]) for part in parts}


def _by_category(scores: dict[str, Scores], prompts: Sequence[EvalPrompt]) -> dict[str, dict[str, Metric]]:
    """Metrics per category, in order of appearance; a category with a single prompt is left out."""
    found: dict[str, dict[str, Metric]] = {}
    for category in dict.fromkeys(prompt.category for prompt in prompts if prompt.category):
        rows = np.array([i for i, prompt in enumerate(prompts) if prompt.category == category])
        if len({prompts[i].text for i in rows}) >= 2:
            found[category] = {name: _metric(name, s, prompts, rows) for name, s in scores.items()}
    return found


def _metric(name: str, scores: Scores, prompts: Sequence[EvalPrompt], rows: NDArray[np.int64]) -> Metric:
    base, tuned = scores.base[rows], scores.tuned[rows]
    clusters = [prompts[i].text for i in rows]
    binary = bool(np.isin(np.concatenate([scores.base, scores.tuned]), (0.0, 1.0)).all())
    interval_of = proportion_interval if binary else cluster_bootstrap
    paired = paired_difference(base, tuned, clusters)
    doubt = None
    if scores.base_std is not None and scores.tuned_std is not None:
        doubt = float(scores.base_std[rows].mean()), float(scores.tuned_std[rows].mean())
    return Metric(
        name,
        binary,
        paired.base,
        paired.tuned,
        interval_of(base, clusters),
        interval_of(tuned, clusters),
        paired.difference,
        paired.interval,
        paired.n,
        paired.prompts,
        win_rate(base, tuned, clusters),
        doubt,
    )
