"""Preference records: a prompt, two images and which of them people preferred."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffalign.errors import DiffalignError

ImageSource = bytes | Path
TIE = 0.5


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


@dataclass(frozen=True)
class Records(Sequence[PreferenceRecord]):
    """A sequence of records that reads images only when a record is asked for.

    Fields:
        rows: every record without its images (they are empty there), in memory.
        images: reads the two images of a record by its index.
        unlabelled: records of the source that were left out because nobody judged them.
        identity: changes whenever the source may have changed (paths, sizes and modification times);
            None when nothing vouches for the contents, so that they are hashed anew each time.
        description: the source in words, for messages.
    """

    rows: Sequence[PreferenceRecord]
    images: Callable[[int], tuple[ImageSource, ImageSource]]
    unlabelled: int = 0
    identity: str | None = None
    description: str = "records"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        image_0, image_1 = self.images(index)
        return replace(self.rows[index], image_0=image_0, image_1=image_1)

    def __iter__(self) -> Iterator[PreferenceRecord]:
        return (self[i] for i in range(len(self)))


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


def check_columns(found: Sequence[str], required: Sequence[str], where: str) -> None:
    """Compare a table's columns with the ones a reader needs.

    Raises:
        DiffalignError: some are missing.
    """
    missing = [name for name in required if name not in found]
    if missing:
        raise DiffalignError(
            f"{where} lacks the column(s) {', '.join(missing)}; found: {', '.join(found) or 'none'}. "
            f"Expected the Pick-a-Pic schema ({', '.join(required)}); rename the columns, or write JSONL "
            "with prompt, chosen and rejected."
        )
