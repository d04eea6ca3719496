"""AI feedback on preference pairs: score both pictures, turn margins into chances, change, drop or soften the labels.

Wang et al. 2024 (arXiv 2401.06080, "Secrets of RLHF part II") measure the strength of a preference by the margin of an
ensemble of reward models, reverse labels that it contradicts and soften doubtful ones; Wallace et al. 2023 (arXiv
2311.12908, section 5.4) train on labels that a reward gave (AI feedback).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffalign.data.chances import (
    Array,
    Calibration,
    Link,
    Margins,
    calibrate,
    chances,
    label_chances,
    uncertainty,
)
from diffalign.data.keys import Progress
from diffalign.data.pair_rules import LabelRule, NewLabels, new_labels, uncertainty_weights
from diffalign.data.records import TIE, PreferenceRecord, Records
from diffalign.data.score_log import Item, Score, ScoreLog, Scorer, score_items
from diffalign.data.shards import write_text
from diffalign.data.writers import PairRow, write_parquet
from diffalign.errors import DiffalignError

SCORES = Path("scores") / "scores.jsonl"
REPORT = "relabel.json"
BROKEN = "left out: broken picture"
COLUMNS: dict[str, type] = {
    "margin": float,
    "margin_std": float,
    "chance": float,
    "uncertainty": float,
    "label_given": float,
    "action": str,
}
"""Columns beside those of the Pick-a-Pic schema."""


@dataclass(frozen=True)
class Options:
    """How labels are made.

    Fields:
        rule: what the rewards may do. link: how an ensemble's margins become a chance.
        temperature, label_noise: of the calibration; None: fitted on the given labels.
        weights: `given`, or `uncertainty`: times exp(-u).
    """

    rule: LabelRule = field(default_factory=LabelRule)
    link: Link = "members"
    temperature: float | None = None
    label_noise: float | None = None
    weights: Literal["given", "uncertainty"] = "given"


@dataclass(frozen=True)
class Feedback:
    """What rewards say about N pairs.

    Fields:
        margin, margin_std: `[N]` in the reward's units (in log-odds for several rewards); std None without any.
        chance: `[N]` that the first image is better, NaN without scores. uncertainty: `[N]` in [0, 1] or None.
        by_reward: chance `[N]` by each reward. calibration: of the chance. readable: `[N]` both pictures can be read.
    """

    margin: Array
    margin_std: Array | None
    chance: Array
    uncertainty: Array | None
    by_reward: dict[str, Array]
    calibration: Calibration
    readable: np.ndarray


@dataclass(frozen=True)
class Relabelled:
    """The result: labels `[N]`, weights `[N]`, and what the rewards said."""

    given: Array
    labels: NewLabels
    weight: Array
    feedback: Feedback
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> np.ndarray:
        """Pairs `[N]` of the new set."""
        return self.labels.keep & self.feedback.readable

    def counts(self) -> dict[str, int]:
        """How many pairs met which fate, most frequent first."""
        words = np.where(self.feedback.readable, self.labels.action, BROKEN).tolist()
        return dict(Counter(words).most_common())


def score_records(
    records: Records,
    scorers: Mapping[str, Scorer],
    folder: Path,
    about: Mapping[str, Any],
    batch_size: int = 16,
    progress: Progress | None = None,
) -> ScoreLog:
    """Score both pictures of every record; scores that `folder` holds are not made again.

    Args:
        about: what the scores are of, beside the records, such as the specifications of the rewards.
        batch_size: pictures scored at once.

    Raises:
        DiffalignError: the folder holds scores of something else.
    """
    log = ScoreLog(folder / SCORES, {**about, "pairs": _identity(records)})
    score_items(
        _items(records, log), 2 * len(records), scorers, log, batch_size=batch_size, progress=progress
    )
    return log


def feedback(log: ScoreLog, given: Array, options: Options) -> Feedback:
    """Margins, chances and uncertainties from scores.

    One reward that has members is an ensemble by itself. Several rewards are the members of one; each is first
    divided by its own temperature (fitted on the labels), so that scales and strengths become comparable.

    Raises:
        DiffalignError: nothing could be scored, or a fit has no labels to go by.
    """
    single = {name: _margins(log, name, len(given)) for name in _names(log)}
    if not any(np.isfinite(margins.mean).any() for margins in single.values()):
        reason = next(iter(log.broken.values()), "the rewards skipped every picture")
        raise DiffalignError(f"none of {len(given)} pairs has scores of both pictures: {reason}")
    link: Link = options.link if len(single) == 1 else "members"
    own = {
        name: calibrate(margins, given, link, options.temperature, options.label_noise)
        for name, margins in single.items()
    }
    margins, fit = _united(list(single.values()), list(own.values()), given, options)
    return Feedback(
        margins.mean,
        margins.std,
        chances(margins, fit.temperature, options.link),
        uncertainty(margins, fit.temperature),
        {name: chances(one, own[name].temperature, link) for name, one in single.items()},
        fit,
        _readable(log, len(given)),
    )


def relabel(
    records: Records, said: Feedback, options: Options, settings: Mapping[str, Any] | None = None
) -> Relabelled:
    """The labels and weights of all records after the rule.

    Raises:
        DiffalignError: a limit or weights by uncertainty are asked of rewards that state none.
    """
    if said.uncertainty is None and (
        options.rule.max_uncertainty is not None or options.weights == "uncertainty"
    ):
        raise DiffalignError(
            "these rewards state no uncertainty, by which pairs were to be limited or weighted; give several rewards, "
            "an ensemble, or wrap one in augmented or mc-dropout"
        )
    given = np.array([row.label_0 for row in records.rows])
    weight = np.array([row.weight for row in records.rows])
    if options.weights == "uncertainty":
        weight = weight * uncertainty_weights(said.uncertainty if said.uncertainty is not None else 0.0)
    labels = new_labels(given, said.chance, options.rule, said.uncertainty, said.calibration.label_noise)
    return Relabelled(given, labels, weight, said, dict(settings or {}))


def write_relabelled(folder: Path, split: str, records: Records, result: Relabelled) -> list[Path]:
    """Write the new set, and `relabel.json` with settings and counts.

    Raises:
        DiffalignError: no pair is left, the folder holds data that are not an earlier result, or it cannot be written.
    """
    if any(folder.glob("*.parquet")) and not (folder / REPORT).is_file():
        raise DiffalignError(
            f"{folder} holds parquet files that are no earlier result; choose another folder"
        )
    write_text(folder / REPORT, json.dumps(summary(result), indent=2))
    return write_parquet(folder, split, _rows(records, result), COLUMNS)


def summary(result: Relabelled) -> dict[str, Any]:
    """Settings, calibration, agreement of rewards and labels before and after, and counts, as plain values."""
    said, kept = result.feedback, result.kept
    return {
        **result.settings,
        "pairs": len(result.given),
        "written": int(kept.sum()),
        "ties": int((result.given == TIE).sum()),
        "calibration": asdict(said.calibration),
        "agreement": agreement(result.given, said.chance),
        "agreement_after": agreement(result.labels.label[kept], said.chance[kept]),
        "mean_weight": float(result.weight[kept].mean()) if kept.any() else None,
        "actions": result.counts(),
    }


def agreement(label: Array, chance: Array) -> dict[str, float]:
    """Share of decided, scored pairs in which label and reward prefer the same image; equal scores count half."""
    usable = (label != TIE) & np.isfinite(chance)
    right = (1 + np.sign(label[usable] - TIE) * np.sign(chance[usable] - TIE)) / 2
    return {"right": float(right.sum()), "pairs": int(usable.sum())}


def predicted_labels(said: Feedback) -> Array:
    """Chance `[N]` that a given label prefers the first image, errors of labels included: what labels can test."""
    return label_chances(said.chance, said.calibration.label_noise)


def _identity(records: Records) -> str:
    """What the scores belong to: the source's own mark, its prompts and their order."""
    digest = hashlib.blake2b(str(records.identity).encode(), digest_size=16)
    for row in records.rows:
        digest.update("\0".join(row.prompts).encode() + b"\n")
    return f"{len(records)} pairs, {digest.hexdigest()}"


def _items(records: Records, log: ScoreLog) -> Iterator[Item]:
    """Both pictures of each record that is not scored yet; others are not read."""
    for i in range(len(records)):
        if f"{i}/0" in log and f"{i}/1" in log:
            continue
        record = records[i]
        for side, (image, prompt) in enumerate(zip(record.images, record.prompts, strict=True)):
            yield Item(f"{i}/{side}", image, prompt)


def _names(log: ScoreLog) -> list[str]:
    return list(next(iter(log.scores.values()), {}))


def _margins(log: ScoreLog, name: str, count: int) -> Margins:
    """Margins of a reward: of its members, or of its mean with its own std."""
    pairs = [
        tuple(log.scores.get(f"{i}/{side}", {}).get(name, Score(None)) for side in (0, 1))
        for i in range(count)
    ]
    scored = [i for i, (a, b) in enumerate(pairs) if a.mean is not None and b.mean is not None]
    size = len(pairs[scored[0]][0].members) if scored else 0
    members = np.full((max(size, 1), count), np.nan)
    own = np.full(count, np.nan)
    for i in scored:
        first, second = (np.array(one.members or (one.mean,), np.float64) for one in pairs[i])
        members[:, i] = first - second
        stds = [one.std for one in pairs[i] if one.std is not None]
        own[i] = np.hypot(stds[0], stds[1]) if len(stds) == 2 else np.nan
    return Margins(members, own if size == 0 and np.isfinite(own[scored]).any() else None)


def _united(
    single: Sequence[Margins], own: Sequence[Calibration], given: Array, options: Options
) -> tuple[Margins, Calibration]:
    """The only reward's margins, or several rewards as one ensemble, in log-odds by each one's own temperature."""
    if len(single) == 1:
        return single[0], own[0]
    margins = Margins(np.stack([one.mean for one in single]))
    if options.temperature is None:
        margins = margins.scaled(np.array([fit.temperature for fit in own]))
    return margins, calibrate(margins, given, options.link, options.temperature, options.label_noise)


def _readable(log: ScoreLog, count: int) -> np.ndarray:
    """Pairs `[N]` whose pictures can both be decoded."""
    return np.array([f"{i}/0" not in log.broken and f"{i}/1" not in log.broken for i in range(count)])


def _rows(records: Records, result: Relabelled) -> Iterator[PairRow]:
    """The pairs of the new set with their further columns; pictures are read one by one."""
    said = result.feedback
    for i in np.flatnonzero(result.kept).tolist():
        record = records[i]
        more = {
            "margin": _number(said.margin[i]),
            "margin_std": None if said.margin_std is None else _number(said.margin_std[i]),
            "chance": _number(said.chance[i]),
            "uncertainty": None if said.uncertainty is None else _number(said.uncertainty[i]),
            "label_given": float(result.given[i]),
            "action": result.labels.action[i],
        }
        yield PairRow(_new_record(record, result, i), more)


def _new_record(record: PreferenceRecord, result: Relabelled, i: int) -> PreferenceRecord:
    by_reward = {name: float(values[i]) for name, values in result.feedback.by_reward.items()}
    labels = {**record.labels, **{name: value for name, value in by_reward.items() if np.isfinite(value)}}
    return replace(
        record, label_0=float(result.labels.label[i]), weight=float(result.weight[i]), labels=labels
    )


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
