"""Where preference pairs come from: a file, a folder of shards, a hub id, or the package itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files as package_files
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.data.records import Records
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.config import DataConfig

SUFFIXES = {".parquet": "pickapic", ".jsonl": "jsonl"}
SHIPPED = "scenes:"
SPLITS = (
    "train",
    "training",
    "validation",
    "val",
    "valid",
    "dev",
    "test",
    "validation_unique",
    "test_unique",
)


def open_records(config: DataConfig, split: str | None = None) -> Records:
    """The records of `data.source`; `split` defaults to `data.split`.

    Raises:
        DiffalignError: the source is missing, unreadable, or holds no labelled record.
    """
    return open_source(config.source, split or config.split, config.format, config.limit)


def open_held_out(config: DataConfig) -> Records | None:
    """The records of `data.held_out`, or None when none is configured; `data.limit` applies to them too."""
    if config.held_out is None:
        return None
    return open_source(config.held_out, config.held_out_split, config.format, config.limit)


def open_source(source: str, split: str = "train", format: str = "auto", limit: int | None = None) -> Records:
    """Open a source of preference pairs; images are not read yet.

    Args:
        source: file, folder, hub id, or `scenes:NAME` for data shipped with the package.
        split: split of a hub data set; in a folder, files named `{split}.*` or `{split}-*` are chosen when
            there are any, else all files, sorted by name.
        format: `pickapic` (parquet, hub), `jsonl`, or `auto` (by file name).
        limit: use only the first so many labelled records.

    Raises:
        DiffalignError: the source is missing, unreadable, or holds no labelled record.
    """
    path = _shipped(source) if source.startswith(SHIPPED) else Path(source).expanduser()
    if not path.exists() and _looks_like_hub_id(source):
        from diffalign.data.pickapic import read_hub

        return _not_empty(read_hub(source, split, limit))
    if not path.exists():
        raise DiffalignError(
            f"no preference data at {source!r}: there is no such file or folder, and it is not a hub id "
            "(owner/name). Set data.source to a .parquet or .jsonl file, a folder of them, a hub id, or "
            "scenes:preferences."
        )
    found = _files(path, split, format)
    return _not_empty(_read(found, format, limit))


def _read(found: Sequence[Path], format: str, limit: int | None) -> Records:
    kind = SUFFIXES[found[0].suffix] if format == "auto" else format
    if kind == "jsonl":
        from diffalign.data.jsonl import read_jsonl

        return read_jsonl(found, limit)
    from diffalign.data.pickapic import read_parquet

    return read_parquet(found, limit)


def _files(path: Path, split: str, format: str) -> list[Path]:
    """The files of a source, sorted; all of one kind."""
    if path.is_file():
        if format == "auto" and path.suffix not in SUFFIXES:
            raise DiffalignError(
                f"{path} ends in {path.suffix or 'nothing'}; expected .parquet (Pick-a-Pic schema) or "
                ".jsonl. Rename it, or set data.format to pickapic or jsonl."
            )
        return [path]
    wanted = [suffix for suffix, kind in SUFFIXES.items() if format in ("auto", kind)]
    for folder, suffix in product((path, path / "data"), wanted):  # downloaded hub data sets have `data/`
        # Hidden files are leftovers of downloads and archives (such as ._train-00000.parquet), never data.
        found = sorted(file for file in folder.glob(f"*{suffix}") if not file.name.startswith("."))
        if found:
            return _of_split(found, split)
    raise DiffalignError(
        f"folder {path} holds no {' or '.join(f'*{suffix}' for suffix in wanted)} file. Expected shards such "
        f"as {split}-00000.parquet directly in it; set data.source to the folder that holds them."
    )


def _of_split(files: list[Path], split: str) -> list[Path]:
    """The files of a split; all files when their names tell no split."""
    splits = [re.split(r"[-.]", file.name)[0] for file in files]
    if split in splits:
        return [file for file, name in zip(files, splits, strict=True) if name == split]
    named = sorted({name for name in splits if name in SPLITS})
    if named:  # taking validation shards for training would spoil every later measurement
        raise DiffalignError(
            f"{files[0].parent} holds no files of split {split!r}; found: {', '.join(named)}. "
            "Set data.split (or data.held_out_split) to one of them."
        )
    return files


def _shipped(source: str) -> Path:
    """Folder of a data set shipped with the package."""
    root = Path(str(package_files("diffalign.samples")))
    path = root / source.removeprefix(SHIPPED)
    if not path.is_dir():
        known = sorted(
            f"{SHIPPED}{folder.name}" for folder in root.iterdir() if any(folder.glob("*.parquet"))
        )
        raise DiffalignError(
            f"no data set {source!r} is shipped with this installation; known: {', '.join(known) or 'none'}."
        )
    return path


def _looks_like_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and Path(source).suffix not in SUFFIXES


def _not_empty(records: Records) -> Records:
    if len(records) == 0:
        raise DiffalignError(
            f"{records.description} holds no labelled pair ({records.unlabelled} unlabelled record(s) "
            "skipped). Choose another split or source."
        )
    return records
