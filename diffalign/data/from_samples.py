"""Pairs from a model's own samples: several pictures per prompt, scored and ranked, and pairs by rule.

With one round of it and a pair loss this is the data side of RAFT (Dong et al. 2023, arXiv 2304.06767) and of best-of-K
preference tuning: the best of K is what the model should make more often, the worst what it should not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import expit

from diffalign.data.keys import Progress
from diffalign.data.pair_rules import Selection, group_pairs, ranks
from diffalign.data.pictures import PictureRecord, write_pictures
from diffalign.data.records import PreferenceRecord
from diffalign.data.score_log import Item, ScoreLog, Scorer, score_items
from diffalign.data.shards import write_text
from diffalign.data.writers import PairRow, write_jsonl, write_parquet
from diffalign.errors import DiffalignError
from diffalign.randomness import derive_seed

SCORES = Path("scores") / "scores.jsonl"
PAIRS = "pairs"
REPORT = "from_samples.json"
SPLIT = "train"
COLUMNS: dict[str, type] = {
    "margin": float,
    "score_0": float,
    "score_1": float,
    "rank_0": float,
    "rank_1": float,
    "group": str,
}
"""Columns of a parquet file of pairs beside those of the Pick-a-Pic schema; picture 0 is the chosen one."""


@dataclass(frozen=True)
class Sample:
    """A picture that the model made: its prompt and its file."""

    prompt: str
    path: Path


@dataclass
class Counts:
    """What became of the groups, one per prompt.

    Fields:
        groups: all. flat: whose scores are all equal. small: with fewer than two scored pictures.
        without: that gave no pair, though their scores differ (margin, ranks). unscored: pictures without a score.
    """

    groups: int = 0
    flat: int = 0
    small: int = 0
    without: int = 0
    unscored: int = 0


def score_samples(
    folder: Path,
    samples: Sequence[Sample],
    scorers: Mapping[str, Scorer],
    about: Mapping[str, Any],
    batch_size: int = 16,
    progress: Progress | None = None,
) -> ScoreLog:
    """Score pictures of a folder; those that its log of scores holds are not scored again.

    Args:
        about: what decides a score beside the picture and its prompt: the specifications of the rewards.

    Raises:
        DiffalignError: the folder holds scores by something else.
    """
    log = ScoreLog(folder / SCORES, about)
    items = (Item(_key(folder, sample), sample.path, sample.prompt) for sample in samples)
    score_items(items, len(samples), scorers, log, batch_size=batch_size, progress=progress)
    return log


def rank_samples(
    folder: Path, samples: Sequence[Sample], log: ScoreLog, main: str, source: str
) -> tuple[list[PictureRecord], int]:
    """Pictures with scores, group and rank in their group, and the number of those without a score.

    Args:
        main: name of the reward that ranks. source: what made the pictures, in words.

    Raises:
        DiffalignError: no picture has a score.
    """
    groups: dict[str, list[tuple[Sample, dict[str, float]]]] = {}
    for sample in samples:
        scores = log.scores.get(_key(folder, sample), {})
        known = {name: score.mean for name, score in scores.items() if score.mean is not None}
        group = groups.setdefault(sample.prompt, [])
        if main in known:
            group.append((sample, known))
    found: list[PictureRecord] = []
    for number, (prompt, group) in enumerate(groups.items()):
        places = ranks([known[main] for _, known in group]).tolist() if group else []
        found += [
            PictureRecord(
                prompt, one.path, None, known[main], known, f"p{number}", float(place), source=source
            )
            for (one, known), place in zip(group, places, strict=True)
        ]
    if not found:
        reason = next(iter(log.broken.values()), f"{main} skipped every picture")
        raise DiffalignError(f"none of {len(samples)} pictures has a score: {reason}")
    return found, len(samples) - len(found)


def pairs_of(
    pictures: Sequence[PictureRecord],
    selection: Selection,
    temperature: float | None = None,
    seed: int = 0,
) -> tuple[list[PairRow], Counts]:
    """Pairs of every group, chosen picture first.

    Args:
        pictures: with score, group and rank, as `rank_samples` gives them.
        temperature: labels are sigmoid(gap of scores / temperature) instead of 1.
        seed: of the pictures drawn by `best_random`.

    Raises:
        DiffalignError: a temperature that is not positive.
    """
    if temperature is not None and not temperature > 0:
        raise DiffalignError(f"the temperature of the labels is {temperature:g}; expected a positive number")
    groups: dict[str, list[PictureRecord]] = {}
    for picture in pictures:
        groups.setdefault(picture.group_name, []).append(picture)
    counts, found = Counts(groups=len(groups)), []
    for name, group in groups.items():
        scores = np.array([picture.score for picture in group], np.float64)
        rng = np.random.default_rng(derive_seed("pairs of samples", seed, group[0].prompt))
        pairs = group_pairs(scores, selection, rng)
        counts.small += len(group) < 2
        counts.flat += len(group) > 1 and len(np.unique(scores)) == 1
        counts.without += len(np.unique(scores)) > 1 and not pairs
        found += [_row(name, group[i], group[j], temperature) for i, j in pairs]
    return found, counts


def write_samples(
    folder: Path,
    pictures: Sequence[PictureRecord],
    pairs: Sequence[PairRow],
    format: Literal["jsonl", "parquet"],
    report: Mapping[str, Any],
) -> Path:
    """Write `pictures.jsonl`, the pairs in the subfolder `pairs`, and `from_samples.json`; what was there is replaced.

    Returns:
        The folder of the pairs, a source for training. The folder itself is a source of single pictures.

    Raises:
        DiffalignError: there is no pair, or a file cannot be written.
    """
    write_pictures(folder, pictures)
    target = folder / PAIRS
    write_text(folder / REPORT, json.dumps(dict(report), indent=2, ensure_ascii=False))
    # Only one format may be left: readers of the folder would take the other one for the pairs.
    if format == "jsonl":
        write_jsonl(target / f"{SPLIT}.jsonl", pairs)
        for old in target.glob(f"{SPLIT}-?????.parquet"):
            old.unlink()
    else:
        write_parquet(target, SPLIT, pairs, COLUMNS)
        (target / f"{SPLIT}.jsonl").unlink(missing_ok=True)
    return target


def summary(pictures: Sequence[PictureRecord], pairs: Sequence[PairRow], counts: Counts) -> dict[str, Any]:
    """Counts, and how much the best of a group is above its mean, as plain values."""
    groups: dict[str, list[float]] = {}
    for picture in pictures:
        groups.setdefault(picture.group_name, []).append(float(picture.score or 0.0))
    return {
        **asdict(counts),
        "pictures": len(pictures),
        "pairs": len(pairs),
        "mean_score": float(np.mean([np.mean(group) for group in groups.values()])),
        "mean_best": float(np.mean([max(group) for group in groups.values()])),
        "mean_margin": float(np.mean([float(row.more["margin"] or 0.0) for row in pairs])) if pairs else None,
    }


def _row(group: str, chosen: PictureRecord, rejected: PictureRecord, temperature: float | None) -> PairRow:
    first, second = float(chosen.score or 0.0), float(rejected.score or 0.0)
    gap = first - second
    label = 1.0 if temperature is None else float(expit(gap / temperature))
    record = PreferenceRecord(chosen.prompt, chosen.image, rejected.image, label, chosen.source)
    ranked = {"rank_0": chosen.rank, "rank_1": rejected.rank}
    return PairRow(record, {"margin": gap, "score_0": first, "score_1": second, "group": group, **ranked})


def _key(folder: Path, sample: Sample) -> str:
    return sample.path.relative_to(folder).as_posix()
