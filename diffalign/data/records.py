"""Preference records: a prompt, two images and which of them people preferred."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

from diffalign.errors import DiffalignError

ImageSource = bytes | Path
TIE = 0.5
Place = TypeVar("Place")


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """One comparison of two images.

    Fields:
        prompt: caption of the first image, and of the second unless `prompt_1` is given.
        image_0, image_1: encoded image files (bytes), or paths to them.
        label_0: probability that the first image is preferred: 1, 0, 0.5 for a tie, or anything between.
        source: where the record comes from (a file name, a data set).
        weight: factor on the record's loss.
        prompt_1: own caption of the second image.
        user: who judged.
        labels: `label_0` for single aspects by name, such as alignment; aspects nobody judged are absent.
    """

    prompt: str
    image_0: ImageSource
    image_1: ImageSource
    label_0: float
    source: str = ""
    weight: float = 1.0
    prompt_1: str | None = None
    user: str | None = None
    labels: Mapping[str, float] = field(default_factory=dict)

    @property
    def prompts(self) -> tuple[str, str]:
        """The captions of the first and the second image."""
        return self.prompt, self.prompt if self.prompt_1 is None else self.prompt_1

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """The first and the second image."""
        return self.image_0, self.image_1

    def with_images(self, images: Sequence[ImageSource]) -> PreferenceRecord:
        """The same record with these two images."""
        return replace(self, image_0=images[0], image_1=images[1])

    @property
    def is_tie(self) -> bool:
        """Whether neither image is preferred."""
        return self.label_0 == TIE

    @property
    def chosen(self) -> ImageSource:
        """The preferred image; the first one of a tie."""
        return self.image_0 if self.label_0 >= TIE else self.image_1

    @property
    def rejected(self) -> ImageSource:
        """The other image."""
        return self.image_1 if self.label_0 >= TIE else self.image_0


class Row(Protocol):
    """A record of one or more images, each with its caption."""

    @property
    def source(self) -> str:
        """Where the record comes from."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The captions of its images."""

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """Its images; empty while they are not read."""

    def with_images(self: R, images: Sequence[ImageSource]) -> R:
        """The same record with its images."""


R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class LazyRecords(Sequence[R], Generic[R]):
    """A sequence of records that reads images only when a record is asked for.

    Fields:
        rows: every record without its images (they are empty there), in memory.
        images: reads the images of a record by its index.
        unlabelled: records of the source that were left out because nobody judged them.
        identity: changes whenever the source may have changed (paths, sizes and modification times);
            None when nothing vouches for the contents, so that they are hashed anew each time.
        description: the source in words, for messages.
        notes: what the reader left out, in words, for messages.
    """

    rows: Sequence[R]
    images: Callable[[int], Sequence[ImageSource]]
    unlabelled: int = 0
    identity: str | None = None
    description: str = "records"
    notes: tuple[str, ...] = ()
    slots: ClassVar[int] = 1
    """Images of a record."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self.rows[index].with_images(self.images(index))

    def __iter__(self) -> Iterator[R]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class Records(LazyRecords[PreferenceRecord]):
    """Comparisons of two images."""

    images: Callable[[int], tuple[ImageSource, ImageSource]]
    slots: ClassVar[int] = 2


@dataclass(frozen=True, slots=True)
class Reading:
    """How a source is read; readers ignore what their data do not have.

    Fields:
        limit: keep the first so many labelled records.
        pairs: which pairs a ranking gives: `all`, `best_worst` or `adjacent`.
        votes: `winner` takes all, `share`: the share of the votes is the label, `confidence`: it is the weight.
    """

    limit: int | None = None
    pairs: str = "all"
    votes: str = "winner"


def collect(
    found: Iterable[tuple[R | None, Place]], limit: int | None = None
) -> tuple[list[R], list[Place], int]:
    """Rows with the places of their images, and how many were left out because nobody judged them (None).

    Reading stops at the first `limit` rows.
    """
    rows: list[R] = []
    places: list[Place] = []
    unlabelled = 0
    for row, place in found:
        if row is None:
            unlabelled += 1
            continue
        rows.append(row)
        places.append(place)
        if len(rows) == limit:
            break
    return rows, places, unlabelled


def describe_files(files: Sequence[Path], kind: str) -> str:
    """Files in words: the file itself, or their number and folder."""
    return str(files[0]) if len(files) == 1 else f"{len(files)} {kind} files in {files[0].parent}"


def check_weight(value: object, where: str) -> float:
    """A factor on the loss.

    Raises:
        DiffalignError: it is not a finite number from 0 up.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < float("inf"):
        raise DiffalignError(f"{where}: weight is {value!r}; expected a number from 0 up.")
    return float(value)


def as_records(records: Sequence[PreferenceRecord]) -> Records:
    """View any sequence of records as `Records`; lazy sequences stay lazy."""
    if isinstance(records, Records):
        return records
    rows = [replace(record, image_0=b"", image_1=b"") for record in records]

    def images(index: int) -> tuple[ImageSource, ImageSource]:
        record = records[index]
        return record.image_0, record.image_1

    return Records(rows, images)


def read_image(image: ImageSource) -> bytes:
    """The encoded bytes of an image.

    Raises:
        OSError: the file cannot be read.
    """
    return image if isinstance(image, bytes) else image.read_bytes()


def files_identity(files: Sequence[Path], *keys: object) -> str:
    """A hash of paths, sizes and modification times, and of what else decides which records are read."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=16)
    for file in files:
        try:
            stat = file.stat()
            digest.update(f"{file.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{file.absolute()}\0missing\n".encode())
    return digest.hexdigest()


def check_label(value: object, where: str) -> float:
    """A label as a probability.

    Raises:
        DiffalignError: it is not a number in [0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise DiffalignError(
            f"{where}: the label is {value!r}; expected the probability that the first image is preferred: "
            "1, 0, or 0.5 for a tie. Correct or remove this record."
        )
    return float(value)


def check_columns(found: Sequence[str], required: Sequence[str], where: str, schema: str) -> None:
    """Compare a table's columns with the ones a reader needs.

    Raises:
        DiffalignError: some are missing.
    """
    missing = [name for name in required if name not in found]
    if missing:
        raise DiffalignError(
            f"{where} lacks the column(s) {', '.join(missing)}; found: {', '.join(found) or 'none'}. "
            f"Expected the {schema} schema ({', '.join(required)}); rename the columns, or write JSONL "
            "with prompt, chosen and rejected."
        )
