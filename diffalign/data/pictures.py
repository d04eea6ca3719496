"""Single pictures with what is known about them: how desirable, which score, which place in a ranking."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diffalign.data.jsonl import json_lines
from diffalign.data.records import (
    ImageSource,
    LazyRecords,
    check_weight,
    collect,
    files_identity,
)
from diffalign.data.shards import write_text
from diffalign.data.tables import Table, check_picture_columns
from diffalign.errors import DiffalignError, did_you_mean

FILE = "pictures.jsonl"
GOOD, BAD = "good", "bad"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
FIELDS = ("image", "prompt", "label", "score", "scores", "group", "rank", "weight", "source")
# What else a table may call these columns.
COLUMNS = {"prompt": ("prompt", "caption", "text"), "group": ("group", "prompt_id")}
JUDGEMENTS = ("label", "score", "rank")
# Values that need not be written.
RESTING: dict[str, Any] = {
    **dict.fromkeys(("label", "score", "group", "rank")),
    "scores": {},
    "weight": 1.0,
    "source": "",
}


@dataclass(frozen=True, slots=True)
class PictureRecord:
    """One picture.

    Fields:
        prompt: its caption. image: the encoded image file (bytes), or a path to it.
        label: probability that the picture is desirable; None: nobody judged.
        score: the reward that decides, any finite number; None: not scored. scores: all rewards, by name.
        group: pictures of equal group were compared with each other; None: the prompt.
        rank: place in its group from 1, the best; equal ranks are ties, means of annotators may be fractional.
        weight: factor on the picture's loss. source: where it comes from (a file name, a model).
    """

    prompt: str
    image: ImageSource
    label: float | None = None
    score: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    group: str | None = None
    rank: float | None = None
    weight: float = 1.0
    source: str = ""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The caption."""
        return (self.prompt,)

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """The image."""
        return (self.image,)

    def with_images(self, images: Sequence[ImageSource]) -> PictureRecord:
        """The same record with this image."""
        return replace(self, image=images[0])

    @property
    def group_name(self) -> str:
        """The group, or the prompt where none is given."""
        return self.prompt if self.group is None else self.group

    @property
    def judged(self) -> bool:
        """Whether anything says how good the picture is."""
        return any(getattr(self, name) is not None for name in JUDGEMENTS)


@dataclass(frozen=True)
class PictureRecords(LazyRecords[PictureRecord]):
    """Single pictures; images are read only when a record is asked for."""


def as_pictures(records: Sequence[PictureRecord]) -> PictureRecords:
    """View any sequence of pictures as `PictureRecords`; lazy sequences stay lazy."""
    if isinstance(records, PictureRecords):
        return records
    rows = [replace(record, image=b"") for record in records]
    return PictureRecords(rows, lambda index: records[index].images)


def read_picture_lines(file: Path, limit: int | None = None) -> PictureRecords:
    """Pictures of a JSONL file (`FIELDS`); image paths are relative to it. `limit` keeps the first so many judged ones.

    Raises:
        DiffalignError: a line is not an object with these fields; the message names file and line.
    """

    def found() -> Iterator[tuple[PictureRecord | None, Path]]:
        for _, number, values in json_lines([file]):
            yield _row(values, file.name, f"{file}, line {number}"), file.parent / values["image"]

    rows, paths, unlabelled = collect(found(), limit)
    identity = files_identity([file, *paths], "pictures", len(rows))
    return PictureRecords(rows, lambda index: (paths[index],), unlabelled, identity, str(file))


def read_picture_table(table: Table, limit: int | None = None) -> PictureRecords:
    """Pictures of a table with a column `image` of bytes, captions, and at least one of label, score and rank.

    Raises:
        DiffalignError: columns are missing, or a value is out of its range.
    """
    names = table_columns(table.schema.names)
    if names is None:
        raise DiffalignError(
            f"{table.description} has the columns {', '.join(table.schema.names)}; expected image, prompt and at least "
            f"one of {', '.join(JUDGEMENTS)}. Rename the columns, or write {FILE}."
        )
    check_picture_columns(table.schema, ["image"], table.description)
    cheap = {field: column for field, column in names.items() if field != "image"}

    def found() -> Iterator[tuple[PictureRecord | None, int]]:
        for chunk in table.chunks(list(cheap.values())):
            columns = {field: chunk.rows[column].to_pylist() for field, column in cheap.items()}
            for i in range(chunk.rows.num_rows):
                values = {name: _cell(column[i]) for name, column in columns.items()}
                values = {name: value for name, value in values.items() if value is not None}
                row = _row({"image": "", "prompt": "", **values}, chunk.source, chunk.where(i))
                yield row, chunk.start + i

    rows, places, unlabelled = collect(found(), limit)
    identity = table.identity("pictures", len(rows))

    def read(index: int) -> tuple[ImageSource, ...]:
        return (table.image(places[index], "image"),)

    return PictureRecords(rows, read, unlabelled, identity, table.description)


def table_columns(names: Sequence[str]) -> dict[str, str] | None:
    """Column of each field that a table of pictures has; None when it is no such table."""
    found = {}
    for name in FIELDS:
        columns = [column for column in COLUMNS.get(name, (name,)) if column in names]
        if columns and name != "scores":
            found[name] = columns[0]
    complete = {"image", "prompt"} <= set(found) and any(name in found for name in JUDGEMENTS)
    return found if complete else None


def read_good_bad(folder: Path, limit: int | None = None) -> PictureRecords:
    """Pictures of the subfolders `good` and `bad`, each with its caption in a text file of the same name beside it.

    Raises:
        DiffalignError: a picture has no caption.
    """
    files = {
        label: [
            file for file in sorted((folder / name).rglob("*")) if file.suffix.lower() in PICTURE_SUFFIXES
        ]
        for name, label in ((GOOD, 1.0), (BAD, 0.0))
    }
    found = [(file, label) for label, pictures in files.items() for file in pictures][:limit]
    rows = [
        PictureRecord(_caption(file), b"", label, source=str(file.relative_to(folder)))
        for file, label in found
    ]
    paths = [file for file, _ in found]
    identity = files_identity([*paths, *(path.with_suffix(".txt") for path in paths)], "good and bad")
    return PictureRecords(rows, lambda index: (paths[index],), 0, identity, str(folder))


def write_pictures(folder: Path, records: Sequence[PictureRecord]) -> Path:
    """Write `pictures.jsonl` for records whose images are files inside the folder; fields at rest are left out.

    Raises:
        DiffalignError: an image is not a file inside the folder, or the disk is full.
    """
    lines = []
    for record in records:
        if not isinstance(record.image, Path) or not record.image.resolve().is_relative_to(folder.resolve()):
            raise DiffalignError(
                f"image {record.image!r} is not a file inside {folder}; write it there, then list it in {FILE}"
            )
        values = asdict(record) | {"image": record.image.resolve().relative_to(folder.resolve()).as_posix()}
        kept = {
            name: value for name, value in values.items() if name not in RESTING or value != RESTING[name]
        }
        lines.append(json.dumps(kept, ensure_ascii=False))
    path = folder / FILE
    write_text(path, "\n".join(lines) + "\n")
    return path


def _row(values: dict[str, Any], file: str, where: str) -> PictureRecord | None:
    """The record of a line; None when nobody judged the picture."""
    _check_fields(values, where)
    scores = values.get("scores", {})
    if not isinstance(scores, dict):
        raise DiffalignError(f'{where}: scores is {scores!r}; expected an object such as {{"judge": 0.5}}.')
    group = values.get("group")
    record = PictureRecord(
        prompt=values["prompt"],
        image=b"",
        label=_number(values, "label", where, 0.0, 1.0),
        score=_number(values, "score", where),
        scores={name: check_score(value, f"{where}: scores of {name}") for name, value in scores.items()},
        group=None if group is None else str(group),
        rank=_number(values, "rank", where, 1.0),
        weight=check_weight(values.get("weight", 1.0), where),
        source=str(values.get("source", file)),
    )
    return record if record.judged else None


def _check_fields(values: dict[str, Any], where: str) -> None:
    """Refuse unknown fields, which would be lost silently, and missing or non-text ones."""
    for name in values:
        if name not in FIELDS:
            hint = did_you_mean(name, list(FIELDS))
            raise DiffalignError(f"{where}: unknown field {name!r}; expected {', '.join(FIELDS)}.{hint}")
    for name in ("image", "prompt"):
        if not isinstance(values.get(name), str):
            found = repr(values[name]) if name in values else "missing"
            raise DiffalignError(f"{where}: {name} is {found}; expected text. Correct or remove this line.")
    group = values.get("group")
    if isinstance(group, bool) or not isinstance(group, str | int | None):
        raise DiffalignError(f"{where}: group is {group!r}; expected text or a whole number.")


def _number(
    values: Mapping[str, Any], name: str, where: str, low: float = -math.inf, high: float = math.inf
) -> float | None:
    """A number of a line, None where it is absent or null."""
    value = values.get(name)
    return None if value is None else check_score(value, f"{where}: {name}", low, high)


def check_score(value: object, what: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high].

    Raises:
        DiffalignError: it is something else.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:  # type: ignore[operator]
        limits = "" if low == -math.inf else f" from {low:g}" + ("" if high == math.inf else f" to {high:g}")
        raise DiffalignError(
            f"{what} is {value!r}; expected a number{limits}. Correct or remove this record."
        )
    return float(value)  # type: ignore[arg-type]


def _cell(value: Any) -> Any:
    """A table's cell; what is not a number counts as absent."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _caption(picture: Path) -> str:
    try:
        return picture.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DiffalignError(
            f"{picture} has no caption ({error}). Write it as UTF-8 text into {picture.with_suffix('.txt').name} "
            f"beside the picture, or list pictures and prompts in {FILE}."
        ) from error
