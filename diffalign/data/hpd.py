"""Readers of the Human Preference Datasets: HPDv2 (arXiv 2306.09341) and HPDv3 (arXiv 2508.03789).

Both come as JSON that names pictures in folders beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.manifests import (
    Named,
    NamedPictures,
    inside,
    missing_field,
    number_or_none,
    read_objects,
    text_field,
)
from diffalign.data.rankings import rank_label, ranking_pairs, vote_share
from diffalign.data.records import (
    TIE,
    PreferenceRecord,
    Reading,
    Records,
    check_weight,
    collect,
    describe_files,
)
from diffalign.errors import DiffalignError

PATHS = ("file_path", "image_path")
Found = Iterator[tuple[PreferenceRecord | None, Named]]


def read_hpdv2(files: Sequence[Path], reading: Reading = Reading()) -> Records:
    """Records of HPDv2: `train.json` (two pictures and a preference) or `test.json` (rankings).

    Fields: `prompt`; `file_path` (or `image_path`): names of pictures; `human_preference`: 1 for the preferred one of
    two, null when nobody judged; or `rank`: a rank per picture, smaller is better. `raw_annotations` (`rank` of
    each judge) is used with `votes="share"`.

    Raises:
        DiffalignError: a record lacks fields, or they do not fit together, or a path leads out of the folder.
    """
    found = (
        pair
        for number, file in enumerate(files)
        for where, values in read_objects(file)
        for pair in _hpdv2(values, number, file.name, where, reading)
    )
    return _records(found, files, reading, "hpdv2")


def read_hpdv3(files: Sequence[Path], reading: Reading = Reading()) -> Records:
    """Records of HPDv3: `path1` is preferred to `path2`.

    Further fields: `prompt`; optional `choice_dist` (votes, in either order) for `votes="share"` and `confidence`
    for `votes="confidence"`. Where these are null the record is decided, with weight 1.

    Raises:
        DiffalignError: a record lacks fields, a value is out of range, or a path leads out of the folder.
    """
    found = (
        _hpdv3(values, number, file.name, where, reading)
        for number, file in enumerate(files)
        for where, values in read_objects(file)
    )
    return _records(found, files, reading, "hpdv3")


def _records(found: Found, files: Sequence[Path], reading: Reading, kind: str) -> Records:
    rows, named, unlabelled = collect(found, reading.limit)
    pictures = NamedPictures(files, named, ("images",))
    identity = pictures.identity(kind, reading.pairs, len(rows))
    return Records(rows, pictures, unlabelled, identity, describe_files(files, "JSON"))


def _hpdv2(values: dict[str, Any], number: int, source: str, where: str, reading: Reading) -> Found:
    prompt = sys.intern(text_field(values, ("prompt",), where))
    names = _names(values, where)
    if "human_preference" in values:
        label = _preference(values["human_preference"], len(names), where)
        row = None if label is None else PreferenceRecord(prompt, b"", b"", label, source)
        yield row, (number, names[0], names[1])
        return
    if "rank" not in values:
        raise missing_field(values, "human_preference or rank", where)
    ranks = _numbers(values["rank"], "rank", len(names), where)
    judges = _judges(values, len(names), where) if reading.votes == "share" else []
    for i, j in ranking_pairs(ranks, reading.pairs):
        label = vote_share(judges, i, j) if judges else rank_label(ranks[i], ranks[j])  # type: ignore[arg-type]
        yield PreferenceRecord(prompt, b"", b"", label, source), (number, names[i], names[j])


def _names(values: dict[str, Any], where: str) -> list[str]:
    names = next((values[field] for field in PATHS if field in values), None)
    if names is None:
        raise missing_field(values, " or ".join(PATHS), where)
    if not isinstance(names, list) or len(names) < 2:
        raise DiffalignError(f"{where}: the pictures are {names!r}; expected a list of two or more paths.")
    return [inside(name, where) for name in names]


def _preference(value: object, pictures: int, where: str) -> float | None:
    """Probability that the first of two pictures is preferred, from a number for each; None: not judged."""
    if value is None:
        return None
    if pictures != 2:
        raise DiffalignError(f"{where}: human_preference with {pictures} pictures; expected two, or a rank.")
    first, second = _numbers(value, "human_preference", 2, where)
    if first is None or second is None:
        return None
    if min(first, second) < 0:
        raise DiffalignError(f"{where}: human_preference is {value!r}; expected [1, 0] or [0, 1].")
    return TIE if first == second else first / (first + second)


def _numbers(value: object, name: str, count: int, where: str) -> list[float | None]:
    if not isinstance(value, list) or len(value) != count:
        raise DiffalignError(
            f"{where}: {name} is {value!r}; expected a list of {count} numbers, one per picture."
        )
    return [number_or_none(item, name, where) for item in value]


def _judges(values: dict[str, Any], count: int, where: str) -> list[list[float]]:
    """Ranks by each judge; judges that left pictures out do not count."""
    found = []
    for judge in values.get("raw_annotations") or []:
        ranks = judge.get("rank") if isinstance(judge, dict) else judge
        ranked = _numbers(ranks, "rank of a judge in raw_annotations", count, where)
        if None not in ranked:
            found.append(ranked)
    return found  # type: ignore[return-value]


def _hpdv3(
    values: dict[str, Any], number: int, source: str, where: str, reading: Reading
) -> tuple[PreferenceRecord, Named]:
    prompt = sys.intern(text_field(values, ("prompt",), where))
    first, second = (inside(text_field(values, (name,), where), where) for name in ("path1", "path2"))
    label = _share(values.get("choice_dist"), where) if reading.votes == "share" else 1.0
    weight = _confidence(values.get("confidence"), where) if reading.votes == "confidence" else 1.0
    return PreferenceRecord(prompt, b"", b"", label, source, weight), (number, first, second)


def _share(votes: object, where: str) -> float:
    """The winner's share of the votes (the authors' soft label), which come in either order; 1 without votes."""
    if votes is None or votes == "null":
        return 1.0
    counts = _numbers(votes, "choice_dist", 2, where)
    if None in counts or min(counts) < 0:  # type: ignore[type-var, operator]
        raise DiffalignError(f"{where}: choice_dist is {votes!r}; expected two numbers of votes.")
    return max(counts) / sum(counts) if any(counts) else 1.0  # type: ignore[type-var, operator, arg-type]


def _confidence(value: object, where: str) -> float:
    return 1.0 if value is None or value == "null" else check_weight(value, f"{where}, confidence")
