"""Writers of preference pairs: parquet in the Pick-a-Pic schema with further columns, or JSONL beside picture files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.records import TIE, PreferenceRecord, read_image
from diffalign.errors import DiffalignError

ROWS_PER_GROUP = 128  # readers hold two groups of pictures at a time
GROUPS_PER_SHARD = 32

_COLUMNS: dict[str, pa.DataType] = {
    "caption": pa.string(),
    "caption_1": pa.string(),
    "jpg_0": pa.binary(),
    "jpg_1": pa.binary(),
    "label_0": pa.float64(),
    "label_1": pa.float64(),
    "are_different": pa.bool_(),
    "has_label": pa.bool_(),
    "user_id": pa.string(),
    "weight": pa.float64(),
    "labels": pa.string(),
    "source": pa.string(),
}


@dataclass(frozen=True)
class PairRow:
    """A pair to write, and the values of further columns."""

    record: PreferenceRecord
    more: Mapping[str, float | str | None] = field(default_factory=dict)


def write_parquet(
    folder: Path, split: str, rows: Iterable[PairRow], more: Mapping[str, type] | None = None
) -> list[Path]:
    """Write `SPLIT-NNNNN.parquet` shards for `diffalign.data.pickapic`; earlier ones of the split are replaced.

    Shards are written beside their places, and take them only when all are complete. Pictures are copied byte by
    byte. `caption_1` is null where both pictures have one caption; `labels` holds those of single aspects as JSON.

    Args:
        rows: pairs whose pictures can be read. more: name and type (float or str) of further columns.

    Raises:
        DiffalignError: there is no row, or a file cannot be read or written.
    """
    kinds = {name: pa.string() if kind is str else pa.float64() for name, kind in (more or {}).items()}
    schema = pa.schema([*_COLUMNS.items(), *kinds.items()])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parts = _write_parts(folder, split, iter(rows), schema)
        return _take_places(folder, split, parts)
    except OSError as error:
        raise DiffalignError(
            f"cannot write pairs to {folder}: {error}. Free some space or choose another folder, and start again."
        ) from error
    finally:
        for part in folder.glob(f"{split}-*.{os.getpid()}.part"):
            part.unlink(missing_ok=True)


def write_jsonl(path: Path, rows: Iterable[PairRow]) -> None:
    """Write pairs whose pictures are files as JSONL, paths relative to it; of equal labels the first is `chosen`.

    Raises:
        DiffalignError: there is no row, or it cannot be written.
    """
    lines = [json.dumps(_line(row.record, path.parent), ensure_ascii=False) for row in rows]
    if not lines:
        raise DiffalignError(f"no pair is left to write to {path}")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise DiffalignError(f"cannot write {path}: {error}") from error


def _write_parts(folder: Path, split: str, rows: Iterator[PairRow], schema: pa.Schema) -> list[Path]:
    """The shards under temporary names."""
    parts: list[Path] = []
    first = list(islice(rows, ROWS_PER_GROUP))
    if not first:
        raise DiffalignError(f"no pair is left to write to {folder}; loosen what leaves pairs out")
    while first:
        part = folder / f"{split}-{len(parts):05d}.{os.getpid()}.part"
        parts.append(part)
        with pq.ParquetWriter(part, schema) as writer:
            for _ in range(GROUPS_PER_SHARD):
                writer.write_table(pa.Table.from_pylist([_cells(row) for row in first], schema))
                first = list(islice(rows, ROWS_PER_GROUP))
                if not first:
                    break
    return parts


def _take_places(folder: Path, split: str, parts: Sequence[Path]) -> list[Path]:
    """Rename the complete shards, and remove what is left of a longer earlier set."""
    shards = [folder / f"{split}-{i:05d}.parquet" for i in range(len(parts))]
    for part, shard in zip(parts, shards, strict=True):
        part.replace(shard)
    for old in set(folder.glob(f"{split}-?????.parquet")) - set(shards):
        old.unlink()
    return shards


def _cells(row: PairRow) -> dict[str, Any]:
    record = row.record
    return {
        "caption": record.prompt,
        "caption_1": record.prompt_1,
        "jpg_0": read_image(record.image_0),
        "jpg_1": read_image(record.image_1),
        "label_0": record.label_0,
        "label_1": 1 - record.label_0,
        "are_different": record.label_0 != TIE,
        "has_label": True,
        "user_id": record.user,
        "weight": record.weight,
        "labels": json.dumps(dict(record.labels)) if record.labels else None,
        "source": record.source,
        **row.more,
    }


def _line(record: PreferenceRecord, folder: Path) -> dict[str, Any]:
    """The fields of `diffalign.data.jsonl` that differ from their defaults."""
    turned = record.label_0 < TIE
    images = [_relative(image, folder) for image in record.images]
    prompts = list(record.prompts)
    label = 1 - record.label_0 if turned else record.label_0
    if turned:
        images.reverse()
        prompts.reverse()
    line: dict[str, Any] = {"prompt": prompts[0], "chosen": images[0], "rejected": images[1]}
    if prompts[0] != prompts[1]:
        line |= {"chosen_prompt": prompts[0], "rejected_prompt": prompts[1]}
    labels = {name: 1 - value if turned else value for name, value in record.labels.items()}
    optional = {"label": (label, 1.0), "weight": (record.weight, 1.0), "labels": (labels, {})}
    optional |= {"user": (record.user, None), "source": (record.source, "")}
    return line | {name: value for name, (value, default) in optional.items() if value != default}


def _relative(image: object, folder: Path) -> str:
    if not isinstance(image, Path):
        raise DiffalignError("JSONL names picture files; these pictures are bytes: write parquet instead")
    return Path(os.path.relpath(image, folder)).as_posix()
