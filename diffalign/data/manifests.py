"""Text files that name picture files: JSON lists, JSONL; and where the pictures lie."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from diffalign.data.records import ImageSource, files_identity
from diffalign.errors import DiffalignError

PEEKED = 1 << 20
PROBED = 50


def read_objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON list, or of a file with one object per line, each with its place in words.

    Raises:
        DiffalignError: the file is not UTF-8, not JSON, or holds something else.
    """
    try:
        with file.open(encoding="utf-8") as text:
            start = next((char for char in iter(lambda: text.read(1), "") if not char.isspace()), "")
            text.seek(0)
            found = _listed(json.load(text), file) if start == "[" else _lines(text, file)
            for where, values in found:
                if not isinstance(values, dict):
                    raise DiffalignError(f"{where} is a {type(values).__name__}; expected an object.")
                yield where, values
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DiffalignError(f"{file} is not JSON in UTF-8 ({error}). Download or write it again.") from error


def _listed(values: list[Any], file: Path) -> Iterator[tuple[str, Any]]:
    return ((f"{file}, record {number}", value) for number, value in enumerate(values, 1))


def _lines(text: Iterable[str], file: Path) -> Iterator[tuple[str, Any]]:
    return (
        (f"{file}, line {number}", json.loads(line)) for number, line in enumerate(text, 1) if line.strip()
    )


def first_object(file: Path) -> dict[str, Any]:
    """The first object of a JSON list or JSONL file; empty when there is none to be read."""
    try:
        with file.open(encoding="utf-8", errors="replace") as text:
            start = text.read(PEEKED).lstrip().removeprefix("[").lstrip()
        value, _ = json.JSONDecoder().raw_decode(start)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def text_field(values: dict[str, Any], names: Sequence[str], where: str) -> str:
    """The first of some fields that is there.

    Raises:
        DiffalignError: none is, or it is not text.
    """
    for name in names:
        if name in values:
            if not isinstance(values[name], str):
                raise DiffalignError(f"{where}: {name} is {values[name]!r}; expected text.")
            return values[name]
    raise missing_field(values, " or ".join(names), where)


def missing_field(values: dict[str, Any], name: str, where: str) -> DiffalignError:
    """The error for a record without a field."""
    found = ", ".join(values) or "none"
    return DiffalignError(f"{where} lacks {name}; found: {found}. Add the missing field(s).")


def number_or_none(value: object, name: str, where: str) -> float | None:
    """A finite number; None for null and NaN.

    Raises:
        DiffalignError: it is something else.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise DiffalignError(f"{where}: {name} is {value!r}; expected a number.")
    return float(value)


def inside(name: object, where: str) -> str:
    """A path that stays in the data set's folder: downloaded files may not name others of the machine.

    Raises:
        DiffalignError: it is absolute, climbs out with `..`, or is not text.
    """
    if not isinstance(name, str) or not name:
        raise DiffalignError(f"{where}: the picture's path is {name!r}; expected text.")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise DiffalignError(
            f"{where}: the path {name!r} leads out of the data set's folder; expected one relative to it. "
            "Correct the record, or list these pictures in JSONL with prompt, chosen and rejected."
        )
    return str(path)


Named = tuple[int, str, str]
"""Number of the file that names two pictures, and their names in it."""


class NamedPictures:
    """Paths of pictures that files name.

    Where they lie is found out by each file's first names, since archives are unpacked in different ways: as named
    from the file's folder, the same below one of `folders`, or by the last part of the name there. Missing pictures
    are found when they are read.

    Args:
        files: the files.
        named: `[N]` what they name, checked by `inside`.
        folders: further folders to look in, relative to the file's folder; beside the one of the file's own name.
    """

    def __init__(self, files: Sequence[Path], named: Sequence[Named], folders: Sequence[str] = ()) -> None:
        self.files = files
        self.named = named
        probes: list[list[str]] = [[] for _ in files]
        for number, *names in named:
            if len(probes[number]) < PROBED:
                probes[number] += names
        self.places = [_place(f, names, folders) for f, names in zip(files, probes, strict=True)]

    def __call__(self, index: int) -> tuple[ImageSource, ImageSource]:
        """The two pictures of a record."""
        number, first, second = self.named[index]
        return self._path(number, first), self._path(number, second)

    def identity(self, *keys: object) -> str:
        """A hash of the files, of the pictures they name, and of `keys`."""
        names = sorted({(number, name) for number, *pair in self.named for name in pair})
        return files_identity([*self.files, *(self._path(*name) for name in names)], *keys)

    def _path(self, number: int, name: str) -> Path:
        return _path(self.places[number], name)


Location = tuple[Path, bool]


def _place(file: Path, names: Sequence[str], folders: Sequence[str]) -> Location:
    """The folder that has most of the named pictures, and whether only the last part of a name counts there."""
    places = [
        (file.parent / folder, short) for short in (False, True) for folder in ("", file.stem, *folders)
    ]
    return max(places, key=lambda place: sum(_path(place, name).is_file() for name in names))


def _path(place: Location, name: str) -> Path:
    folder, short = place
    return folder / (PurePosixPath(name).name if short else name)
