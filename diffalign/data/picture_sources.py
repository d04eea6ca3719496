"""Where single pictures come from, and what can be made of a source: known from names and columns alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.data.formats import formats_of_columns, of_split
from diffalign.data.manifests import first_object
from diffalign.data.pictures import (
    BAD,
    FILE,
    GOOD,
    PictureRecords,
    read_good_bad,
    read_picture_lines,
    read_picture_table,
    table_columns,
)
from diffalign.data.tables import ParquetTable, load_hub, read_schema
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.config import DataConfig

FORMAT = "pictures"
# Formats of pairs whose files may hold single pictures with ranks.
SHARED = ("auto", FORMAT, "imagereward_db")
FROM_PAIRS = ("pairs", "judgements", "pictures", "groups")
FROM_PICTURES = ("pictures", "groups")

Opener = Callable[[], PictureRecords]


def source_kinds(data: DataConfig) -> tuple[str, ...]:
    """What can be made of `data.source`, by the names of its files and columns.

    Raises:
        DiffalignError: `data.format` is pictures, and there are none; or a parquet file cannot be read.
    """
    if find_pictures(data) is None:
        return FROM_PAIRS
    names = _columns(Path(data.source).expanduser(), data.split)
    as_pairs = data.format != FORMAT and bool(formats_of_columns(names))
    return FROM_PAIRS if as_pairs else FROM_PICTURES


def open_pictures(data: DataConfig) -> PictureRecords:
    """The single pictures of `data.source`; `data.limit` keeps the first so many judged ones.

    Raises:
        DiffalignError: there are none, or a record is broken.
    """
    opener = find_pictures(data)
    if opener is None:
        raise _no_pictures(data.source)
    records = opener()
    if len(records) == 0:
        raise DiffalignError(
            f"{records.description} holds no judged picture ({records.unlabelled} without label, score and rank). Give "
            "them one, for example with `diffalign score`."
        )
    return records


def find_pictures(data: DataConfig) -> Opener | None:
    """What reads the single pictures of `data.source`; None when it does not hold any.

    Raises:
        DiffalignError: `data.format` is pictures, and there are none; or a parquet file cannot be read.
    """
    if data.format not in SHARED:
        return None
    path = Path(data.source).expanduser()
    found = _in_folder(path, data) if path.is_dir() else _file(path, data) if path.is_file() else None
    if found is None and data.format == FORMAT:
        if path.exists() or ":" in data.source or data.source.count("/") != 1:
            raise _no_pictures(data.source)
        return lambda: read_picture_table(load_hub(data.source, data.split), data.limit)
    return found


def _in_folder(folder: Path, data: DataConfig) -> Opener | None:
    if (folder / FILE).is_file():
        return lambda: read_picture_lines(folder / FILE, data.limit)
    if (folder / GOOD).is_dir() and (folder / BAD).is_dir():
        return lambda: read_good_bad(folder, data.limit)
    files = _tables(folder, data.split)
    return _table(files, data) if files else None


def _file(file: Path, data: DataConfig) -> Opener | None:
    if file.suffix == ".parquet":
        return _table([file], data)
    if file.suffix == ".jsonl" and "image" in first_object(file):
        return lambda: read_picture_lines(file, data.limit)
    return None


def _table(files: list[Path], data: DataConfig) -> Opener | None:
    if table_columns(read_schema(files[0]).names) is None:
        return None
    return lambda: read_picture_table(ParquetTable(files), data.limit)


def _tables(folder: Path, split: str) -> list[Path]:
    """Parquet files of pictures in a folder (or its `data/`), of the split; empty where there are none."""
    for place in (folder, folder / "data"):
        files = [file for file in sorted(place.glob("*.parquet")) if not file.name.startswith(".")]
        files = [file for file in files if table_columns(read_schema(file).names) is not None]
        if files:
            return of_split(files, split)
    return []


def _columns(path: Path, split: str) -> list[str]:
    """Columns of the table that a source is; none for other forms."""
    files = _tables(path, split) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    return list(read_schema(files[0]).names) if files else []


def _no_pictures(source: str) -> DiffalignError:
    return DiffalignError(
        f"no single pictures at {source!r}: expected {FILE} or a folder that holds one, a folder with the subfolders "
        f"{GOOD} and {BAD}, parquet with the columns image, prompt and label, score or rank, or a hub id of such a set."
    )
