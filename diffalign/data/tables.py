"""Tables whose cells are pictures: parquet files here, or a data set of the hub. Pictures are read lazily."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.records import describe_files, files_identity
from diffalign.errors import DiffalignError

# Sequential passes (hashing, caching) touch one row group at a time, and two where a batch straddles them.
CACHED_ROW_GROUPS = 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a table.

    Fields:
        rows: their cheap columns. start: number of the first one in the whole table.
        source: the file or data set they are from. first: number of the first one in that file.
    """

    rows: pa.Table
    start: int
    source: str
    first: int

    def where(self, i: int) -> str:
        """The place of a row of this chunk in words, for messages."""
        return f"{self.source}, row {self.first + i}"


class Table(Protocol):
    """Rows numbered from 0, with columns that are cheap to read and columns of pictures.

    Fields:
        description: the table in words. schema: of the whole table (of the first file).
    """

    description: str
    schema: pa.Schema

    def chunks(self, columns: Sequence[str]) -> Iterator[Chunk]:
        """All rows in order, with those of `columns` that there are."""

    def image(self, row: int, column: str) -> bytes:
        """Encoded bytes of a picture; none for an empty cell."""

    def identity(self, *keys: object) -> str:
        """Changes whenever the table may have changed, and with `keys`."""


class ParquetTable:
    """Parquet files one after another, holding the row groups of pictures that were used last.

    Args:
        files: parquet files of one schema.

    Raises:
        DiffalignError: the first file cannot be read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.description = describe_files(files, "parquet")
        self.schema = read_schema(files[0])
        self._starts: list[int] = []
        self._places: list[tuple[int, int]] = []
        self._groups: OrderedDict[tuple[int, int, str], pa.ChunkedArray] = OrderedDict()

    def chunks(self, columns: Sequence[str]) -> Iterator[Chunk]:
        """All rows in order, by row group, with those of `columns` that there are.

        Raises:
            DiffalignError: a file is not parquet.
        """
        start = 0
        self._starts.clear()
        self._places.clear()
        for number, file in enumerate(self.files):
            read_schema(file)
            first = start
            with pq.ParquetFile(file, memory_map=True) as parquet:
                names = [name for name in parquet.schema_arrow.names if name in columns]
                for group in range(parquet.num_row_groups):
                    self._starts.append(start)
                    self._places.append((number, group))
                    table = parquet.read_row_group(group, columns=names)
                    yield Chunk(table, start, file.name, start - first)
                    start += table.num_rows

    def image(self, row: int, column: str) -> bytes:
        """Encoded bytes of the picture in a row that `chunks` has passed."""
        place = bisect_right(self._starts, row) - 1
        return image_bytes(self._column(*self._places[place], column)[row - self._starts[place]].as_py())

    def identity(self, *keys: object) -> str:
        """A hash of the files' paths, sizes and modification times, and of `keys`."""
        return files_identity(self.files, *keys)

    def _column(self, file: int, group: int, column: str) -> pa.ChunkedArray:
        key = (file, group, column)
        if key not in self._groups:
            columns = {name for _, _, name in self._groups} | {column}
            while len(self._groups) >= CACHED_ROW_GROUPS * len(columns):
                self._groups.popitem(last=False)
            with pq.ParquetFile(self.files[file], memory_map=True) as parquet:
                self._groups[key] = parquet.read_row_group(group, columns=[column])[column]
        self._groups.move_to_end(key)
        return self._groups[key]


class HubTable:
    """A loaded `datasets.Dataset`; its columns of pictures are never decoded.

    Args:
        dataset: the data set.
        description: it in words.
    """

    def __init__(self, dataset: Any, description: str) -> None:
        import datasets

        self.description = description
        self.schema = dataset.features.arrow_schema
        for name, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(name, datasets.Image(decode=False))
        self.dataset = dataset

    def chunks(self, columns: Sequence[str]) -> Iterator[Chunk]:
        """The whole data set as one chunk, with those of `columns` that there are."""
        names = [name for name in self.dataset.column_names if name in columns]
        yield Chunk(self.dataset.select_columns(names).with_format("arrow")[:], 0, self.description, 0)

    def image(self, row: int, column: str) -> bytes:
        """Encoded bytes of a picture."""
        return image_bytes(self.dataset.select_columns([column])[row][column])

    def identity(self, *keys: object) -> str:
        """The data set's own fingerprint, with `keys`."""
        text = repr((self.dataset._fingerprint, *keys))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def load_hub(name: str, split: str) -> HubTable:
    """A hub data set, through `datasets` (downloaded once, kept by it).

    Raises:
        DiffalignError: the data set cannot be loaded.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many unrelated types
        raise DiffalignError(
            f"cannot load {name!r} (split {split!r}) as a hub data set: {type(error).__name__}: {error}. "
            "There is no local file or folder of this name either. Check the path or the id, the split, and "
            "the network; sets that come with a loading script must be downloaded and unpacked."
        ) from error
    return HubTable(dataset, f"{name}, split {split}")


def read_schema(file: Path) -> pa.Schema:
    """The columns of a parquet file.

    Raises:
        DiffalignError: it is not parquet.
    """
    try:
        return pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DiffalignError(
            f"{file} is not a readable parquet file ({error}). Download or write it again."
        ) from error


def check_picture_columns(schema: pa.Schema, columns: Sequence[str], where: str) -> None:
    """Refuse columns that name image files instead of holding their bytes, or hold something else.

    Raises:
        DiffalignError: a column is neither bytes nor the hub's image struct.
    """
    for name in columns:
        kind = schema.field(name).type
        struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or struct):
            raise DiffalignError(
                f"{where}: column {name} holds {kind}; expected the bytes of an image file. For image files "
                "on disk, write JSONL with prompt, chosen and rejected."
            )


def image_bytes(value: Any) -> bytes:
    """Encoded bytes of a cell: raw bytes, the hub's image struct, or nothing."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value or b""
