"""Where preference pairs come from: a file, a folder, a hub id, or the package itself."""

from __future__ import annotations

import re
import warnings
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.data.captions import perturb_rejected
from diffalign.data.chosen_rejected import read_chosen_rejected
from diffalign.data.degraded import with_degraded
from diffalign.data.formats import ENDINGS, FOLDERS, Found, find, format_of_columns
from diffalign.data.hpd import read_hpdv2, read_hpdv3
from diffalign.data.image_reward_db import read_image_reward_files, read_image_reward_table
from diffalign.data.jsonl import read_jsonl
from diffalign.data.pair_folders import read_suffixes, read_twin_folders
from diffalign.data.pickapic import read_pickapic
from diffalign.data.records import Reading, Records
from diffalign.data.tables import ParquetTable, Table, load_hub, read_schema
from diffalign.data.webdataset import read_webdataset
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.config import DataConfig

SHIPPED = "scenes:"
OF_TABLES = {
    "pickapic": read_pickapic,
    "chosen_rejected": read_chosen_rejected,
    "imagereward_db": read_image_reward_table,
}
OF_FILES = {
    "jsonl": read_jsonl,
    "hpdv2": read_hpdv2,
    "hpdv3": read_hpdv3,
    "imagereward_db": read_image_reward_files,
    "webdataset": read_webdataset,
}
OF_FOLDERS = {"twin_folders": read_twin_folders, "suffixes": read_suffixes}
FORMATS = ("auto", *ENDINGS, *FOLDERS)


def open_records(config: DataConfig, split: str | None = None) -> Records:
    """The records of `data.source`, with what `data.rejected_caption` and `data.degraded` make of them.

    `split` defaults to `data.split`. Warns of what the reader left out.

    Raises:
        DiffalignError: the source is missing, unreadable, or holds no labelled record.
    """
    records = _configured(config, config.source, split or config.split)
    if config.rejected_caption != "own":
        records = perturb_rejected(records, config.rejected_caption)
    return with_degraded(records, config.degraded) if config.degraded else records


def open_held_out(config: DataConfig) -> Records | None:
    """The records of `data.held_out`, or None when none is configured; `data.limit` applies to them too."""
    return None if config.held_out is None else _configured(config, config.held_out, config.held_out_split)


def open_source(
    source: str,
    split: str = "train",
    format: str = "auto",
    limit: int | None = None,
    pairs: str = "all",
    votes: str = "winner",
) -> Records:
    """Open a source of preference pairs; images are not read yet.

    Args:
        source: file, folder, hub id, or `scenes:NAME` for data shipped with the package.
        split: split of a hub data set; in a folder, files of this split (`formats.find`).
        format: one of `FORMATS`; `auto`: by file names and columns.
        limit: use only the first so many labelled records.
        pairs: which pairs a ranking gives (`rankings.ranking_pairs`).
        votes: what several votes on a pair mean (`records.Reading`).

    Raises:
        DiffalignError: the source is missing, unreadable, or holds no labelled record.
    """
    if format not in FORMATS:
        raise DiffalignError(f"data.format is {format!r}; expected one of: {', '.join(FORMATS)}.")
    reading = Reading(limit, pairs, votes)
    path = _shipped(source) if source.startswith(SHIPPED) else Path(source).expanduser()
    if not path.exists() and _looks_like_hub_id(source):
        return _not_empty(_read_table(load_hub(source, split), format, reading))
    if not path.exists():
        raise DiffalignError(
            f"no preference data at {source!r}: there is no such file or folder, and it is not a hub id "
            "(owner/name). Set data.source to a .parquet, .jsonl, .json or .tar file, a folder, a hub id, or "
            "scenes:preferences."
        )
    return _not_empty(_read(find(path, split, format), reading))


def _configured(config: DataConfig, source: str, split: str) -> Records:
    records = open_source(source, split, config.format, config.limit, config.pairs, config.votes)
    for note in records.notes:
        warnings.warn(f"{records.description}: left out {note}", stacklevel=3)
    return records


def _read(found: Found, reading: Reading) -> Records:
    if found.format in OF_FOLDERS:
        return OF_FOLDERS[found.format](found.paths[0], reading)
    if found.format in OF_TABLES and (found.format not in OF_FILES or _holds_pictures(found)):
        return _read_table(ParquetTable(found.paths), found.format, reading)
    return OF_FILES[found.format](found.paths, reading)


def _holds_pictures(found: Found) -> bool:
    """Whether parquet files hold pictures, and not only their names as ImageRewardDB's metadata do."""
    return found.paths[0].suffix == ".parquet" and "image" in read_schema(found.paths[0]).names


def _read_table(table: Table, format: str, reading: Reading) -> Records:
    name = format_of_columns(table.schema.names, table.description) if format == "auto" else format
    if name not in OF_TABLES:
        raise DiffalignError(
            f"{table.description} is a table; data.format {name} cannot be read from one. Expected one of: "
            f"{', '.join(OF_TABLES)}, or files on disk."
        )
    return OF_TABLES[name](table, reading)


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
    known = {ending for endings in ENDINGS.values() for ending in endings}
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and Path(source).suffix not in known


def _not_empty(records: Records) -> Records:
    if len(records) == 0:
        raise DiffalignError(
            f"{records.description} holds no labelled pair ({records.unlabelled} unlabelled record(s) "
            "skipped). Choose another split or source."
        )
    return records
