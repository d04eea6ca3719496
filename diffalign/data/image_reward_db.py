"""Reader of ImageRewardDB (arXiv 2304.05977): pictures of a prompt with ranks and ratings.

It comes as one row per picture (parquet or JSON that names files, or a table that holds them), or as rankings (the
repository's `test.json`). Ranks: the smaller is the better; ratings: the greater is the better.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.data.manifests import (
    NamedPictures,
    inside,
    missing_field,
    number_or_none,
    read_objects,
    text_field,
)
from diffalign.data.rankings import rank_label, ranking_pairs, rating_label
from diffalign.data.records import (
    ImageSource,
    PreferenceRecord,
    Reading,
    Records,
    check_columns,
    collect,
    describe_files,
)
from diffalign.data.tables import ParquetTable, Table, check_picture_columns
from diffalign.errors import DiffalignError

RATINGS = {
    "overall_rating": "overall_rating",
    "alignment": "image_text_alignment_rating",
    "fidelity": "fidelity_rating",
}
"""Aspect of a pair's `labels`, and the column it is compared by."""
LIGHT = ("image_path", "prompt_id", "prompt", "rank", *RATINGS.values())
REQUIRED = ("prompt_id", "prompt", "rank")
FOLDERS = ("images", "test_images", *(f"images/{split}" for split in ("train", "validation", "test")))


@dataclass(frozen=True, slots=True)
class RankedPicture:
    """One picture: its prompt, its rank (None: not ranked), its ratings by aspect, and where it is found."""

    prompt: str
    rank: float | None
    ratings: dict[str, float]
    file: int
    name: str
    source: str


def read_image_reward_files(files: Sequence[Path], reading: Reading = Reading()) -> Records:
    """Records of metadata that name pictures: parquet, JSON lists or JSONL.

    Raises:
        DiffalignError: fields are missing or of the wrong kind, or a path leads out of the folder.
    """
    groups: dict[str, list[RankedPicture]] = {}
    for number, file in enumerate(files):
        for where, values in _objects(file):
            for prompt_id, picture in _pictures(values, number, file.name, where):
                groups.setdefault(prompt_id, []).append(picture)
    found = ((row, (a.file, a.name, b.name)) for row, a, b in _pairs(groups.values(), reading))
    rows, named, _ = collect(found, reading.limit)
    pictures = NamedPictures(files, named, FOLDERS)
    identity = pictures.identity("imagereward_db", reading.pairs, len(rows))
    description = describe_files(files, "metadata")
    return Records(rows, pictures, _unranked(groups), identity, description, _lonely(groups))


def read_image_reward_table(table: Table, reading: Reading = Reading()) -> Records:
    """Records of a table that holds the pictures in its column `image`.

    Raises:
        DiffalignError: columns are missing or of the wrong kind.
    """
    check_columns(table.schema.names, ("image", *REQUIRED), table.description, "ImageRewardDB")
    check_picture_columns(table.schema, ("image",), table.description)
    groups: dict[str, list[RankedPicture]] = {}
    for chunk in table.chunks(LIGHT):
        for i, values in enumerate(chunk.rows.to_pylist()):
            picture = _picture(values, chunk.start + i, "", chunk.source, chunk.where(i))
            groups.setdefault(str(values["prompt_id"]), []).append(picture)
    found = ((row, (a.file, b.file)) for row, a, b in _pairs(groups.values(), reading))
    rows, places, _ = collect(found, reading.limit)

    def images(index: int) -> tuple[ImageSource, ImageSource]:
        first, second = places[index]
        return table.image(first, "image"), table.image(second, "image")

    identity = table.identity("imagereward_db", reading.pairs, len(rows))
    return Records(rows, images, _unranked(groups), identity, table.description, _lonely(groups))


def _objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a metadata file, each with its place in words."""
    if file.suffix != ".parquet":
        yield from read_objects(file)
        return
    table = ParquetTable([file])
    check_columns(table.schema.names, ("image_path", *REQUIRED), str(file), "ImageRewardDB")
    for chunk in table.chunks(LIGHT):
        for i, values in enumerate(chunk.rows.to_pylist()):
            yield chunk.where(i), values


def _pictures(
    values: dict[str, Any], number: int, source: str, where: str
) -> Iterator[tuple[str, RankedPicture]]:
    """The pictures of a row: one, or those of a ranking."""
    if "generations" not in values:
        name = inside(text_field(values, ("image_path",), where), where)
        picture = _picture(values, number, name, source, where)
        yield str(values.get("prompt_id")), picture
        return
    names, ranks = values["generations"], values.get("ranking")
    if not isinstance(names, list) or not isinstance(ranks, list) or len(names) != len(ranks):
        raise DiffalignError(f"{where}: expected lists of equal length as generations and ranking.")
    prompt = sys.intern(text_field(values, ("prompt",), where))
    for name, rank in zip(names, ranks, strict=True):
        ranked = number_or_none(rank, "ranking", where)
        yield where, RankedPicture(prompt, ranked, {}, number, inside(name, where), source)


def _picture(values: dict[str, Any], file: int, name: str, source: str, where: str) -> RankedPicture:
    for field in REQUIRED:
        if field not in values:
            raise missing_field(values, field, where)
    ratings = {aspect: number_or_none(values.get(key), key, where) for aspect, key in RATINGS.items()}
    return RankedPicture(
        prompt=sys.intern(text_field(values, ("prompt",), where)),
        rank=number_or_none(values["rank"], "rank", where),
        ratings={aspect: rating for aspect, rating in ratings.items() if rating is not None},
        file=file,
        name=name,
        source=source,
    )


def _pairs(
    groups: Iterable[Sequence[RankedPicture]], reading: Reading
) -> Iterator[tuple[PreferenceRecord, RankedPicture, RankedPicture]]:
    for group in groups:
        ranks = [picture.rank for picture in group]
        for i, j in ranking_pairs(ranks, reading.pairs):
            first, second = group[i], group[j]
            label = rank_label(first.rank, second.rank)  # type: ignore[arg-type]
            aspects = first.ratings.keys() & second.ratings.keys()
            labels = {
                name: rating_label(first.ratings[name], second.ratings[name]) for name in sorted(aspects)
            }
            yield PreferenceRecord(first.prompt, b"", b"", label, first.source, labels=labels), first, second


def _unranked(groups: dict[str, list[RankedPicture]]) -> int:
    return sum(picture.rank is None for group in groups.values() for picture in group)


def _lonely(groups: dict[str, list[RankedPicture]]) -> tuple[str, ...]:
    """A note on prompts that give no pair."""
    count = sum(sum(picture.rank is not None for picture in group) < 2 for group in groups.values())
    return (f"prompts with fewer than two ranked pictures: {count:,}",) if count else ()
