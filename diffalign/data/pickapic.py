"""Readers of the Pick-a-Pic schema (v1 and v2): parquet files here, or a data set of the hub."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.records import (
    ImageSource,
    PreferenceRecord,
    Records,
    check_columns,
    check_label,
    files_identity,
)
from diffalign.errors import DiffalignError

IMAGES = ("jpg_0", "jpg_1")
REQUIRED = ("caption", *IMAGES, "label_0")
OPTIONAL = ("has_label", "user_id")
# Sequential passes (hashing, caching) touch one row group at a time, and two where a batch straddles them.
CACHED_ROW_GROUPS = 2


def read_parquet(files: Sequence[Path], limit: int | None = None) -> Records:
    """Records of parquet files in the Pick-a-Pic schema, in the order given.

    Captions and labels are read at once; images by row group, when a record is asked for. `limit` keeps the
    first so many labelled records.

    Raises:
        DiffalignError: a file is not parquet, lacks columns, or holds a label outside [0, 1].
    """
    rows: list[PreferenceRecord] = []
    places: list[tuple[int, int, int]] = []
    unlabelled = 0
    for place, table in _row_groups(files):
        for i, row in _rows(table, files[place[0]].name):
            if row is None:
                unlabelled += 1
            elif limit is None or len(rows) < limit:
                rows.append(row)
                places.append((*place, i))
        if limit is not None and len(rows) >= limit:
            break
    images = RowGroups(files, np.asarray(places, np.int64).reshape(-1, 3))
    identity = files_identity(files, "pickapic", len(rows))
    return Records(rows, images, unlabelled, identity, _describe(files))


def read_hub(name: str, split: str, limit: int | None = None) -> Records:
    """Records of a hub data set in the Pick-a-Pic schema, through `datasets` (downloaded once, kept by it).

    Raises:
        DiffalignError: the data set cannot be loaded, or lacks columns.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many unrelated types
        raise DiffalignError(
            f"cannot load {name!r} (split {split!r}) as a hub data set: {type(error).__name__}: {error}. "
            "There is no local file or folder of this name either. Check the path or the id, the split, and "
            "the network."
        ) from error
    return read_dataset(dataset, f"{name}, split {split}", limit)


def read_dataset(dataset: Any, description: str, limit: int | None = None) -> Records:
    """Records of a loaded `datasets.Dataset` in the Pick-a-Pic schema.

    Raises:
        DiffalignError: it lacks columns, or holds a label outside [0, 1].
    """
    import datasets

    _check_schema(dataset.features.arrow_schema, description)
    for name in IMAGES:
        if isinstance(dataset.features[name], datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    columns = [name for name in dataset.column_names if name in REQUIRED + OPTIONAL and name not in IMAGES]
    table = dataset.select_columns(columns).with_format("arrow")[:]
    found = list(_rows(table, description))
    labelled = [(i, row) for i, row in found if row is not None][:limit]
    places = [i for i, _ in labelled]

    def images(index: int) -> tuple[ImageSource, ImageSource]:
        values = dataset[places[index]]
        return _image(values["jpg_0"]), _image(values["jpg_1"])

    unlabelled = sum(row is None for _, row in found)
    identity = f"{dataset._fingerprint}-{len(labelled)}"
    return Records([row for _, row in labelled], images, unlabelled, identity, description)


class RowGroups:
    """Reads the two images of a record from parquet, holding the row groups used last.

    Args:
        files: the parquet files.
        places: `[N, 3]` file, row group and row of each record.
    """

    def __init__(self, files: Sequence[Path], places: np.ndarray) -> None:
        self.files = files
        self.places = places
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def __call__(self, index: int) -> tuple[ImageSource, ImageSource]:
        """The encoded bytes of both images of a record."""
        file, group, row = (int(value) for value in self.places[index])
        table = self._group(file, group)
        return _image(table["jpg_0"][row].as_py()), _image(table["jpg_1"][row].as_py())

    def _group(self, file: int, group: int) -> pa.Table:
        key = (file, group)
        if key not in self._groups:
            while len(self._groups) >= CACHED_ROW_GROUPS:
                self._groups.popitem(last=False)
            with pq.ParquetFile(self.files[file], memory_map=True) as parquet:
                self._groups[key] = parquet.read_row_group(group, columns=list(IMAGES))
        self._groups.move_to_end(key)
        return self._groups[key]


def _row_groups(files: Sequence[Path]) -> Iterator[tuple[tuple[int, int], pa.Table]]:
    """Each row group without its images, with its place (file, group)."""
    for number, file in enumerate(files):
        try:
            parquet = pq.ParquetFile(file, memory_map=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise DiffalignError(
                f"{file} is not a readable parquet file ({error}). Download or write it again."
            ) from error
        with parquet:
            _check_schema(parquet.schema_arrow, str(file))
            names = parquet.schema_arrow.names
            columns = [name for name in names if name in REQUIRED + OPTIONAL and name not in IMAGES]
            for group in range(parquet.num_row_groups):
                yield (number, group), parquet.read_row_group(group, columns=columns)


def _check_schema(schema: pa.Schema, where: str) -> None:
    """Refuse a table without the columns, or one that names image files instead of holding their bytes."""
    check_columns(schema.names, REQUIRED, where)
    for name in IMAGES:
        kind = schema.field(name).type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)):
            raise DiffalignError(
                f"{where}: column {name} holds {kind}; expected the bytes of an image file. For image files "
                "on disk, write JSONL with prompt, chosen and rejected."
            )


def _rows(table: pa.Table, source: str) -> Iterator[tuple[int, PreferenceRecord | None]]:
    """Index and row of each line of a table; None for one that nobody judged."""
    values: Mapping[str, list[Any]] = table.to_pydict()
    users = values.get("user_id", [None] * table.num_rows)
    judged = values.get("has_label", [True] * table.num_rows)
    for i, (caption, label) in enumerate(zip(values["caption"], values["label_0"], strict=True)):
        if not judged[i] or label is None or math.isnan(label):
            yield i, None
            continue
        prompt = sys.intern(caption or "")  # data sets repeat captions many times
        user = None if users[i] is None else str(users[i])
        probability = check_label(label, f"{source}, row {i}")
        yield i, PreferenceRecord(prompt, b"", b"", probability, source, user=user)


def _image(value: Any) -> bytes:
    """Encoded bytes of a cell: raw bytes, the hub's image struct, or nothing."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value or b""


def _describe(files: Sequence[Path]) -> str:
    if len(files) == 1:
        return str(files[0])
    return f"{len(files)} parquet files in {files[0].parent}"
