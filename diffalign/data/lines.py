"""Files of JSON lines that are appended to, and may have been interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError


def whole_lines(path: Path) -> list[str]:
    """The finished lines of a UTF-8 file: not a last one without a line end."""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1].decode("utf-8").split("\n")[:-1]


def cut_unfinished(path: Path) -> None:
    """Cut a last line without a line end off a file."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)


def open_log(
    path: Path, header: Mapping[str, Any], noun: str, take: Callable[[dict[str, Any]], None]
) -> None:
    """Begin a log with a line that says what it is of, or go on with an earlier one.

    Args:
        header: plain values, `format` among them; those of an earlier file must agree. noun: what the entries are,
            in messages, such as `scores`. take: is given every entry of an earlier file.

    Raises:
        DiffalignError: the file is of something else, or an entry cannot be read.
    """
    wanted = json.loads(json.dumps(dict(header)))
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    first, *lines = whole_lines(path) or [""]
    _check_header(path, first, wanted, noun)
    for number, line in enumerate(lines, 2):
        try:
            take(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise DiffalignError(
                f"{path}, line {number} cannot be read ({type(error).__name__}: {error}). Remove the file to make "
                f"these {noun} again."
            ) from error
    cut_unfinished(path)


def append_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Append entries to a log.

    Raises:
        DiffalignError: the disk is full or not writable.
    """
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise DiffalignError(
            f"cannot write {path}: {error}. Free some space and start again: it continues where it stopped."
        ) from error


def _check_header(path: Path, line: str, wanted: Mapping[str, Any], noun: str) -> None:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != wanted["format"]:
        raise DiffalignError(f"{path} holds no {noun}; choose another folder, or remove the file")
    different = [name for name in sorted({*header, *wanted}) if header.get(name) != wanted.get(name)]
    if different:
        raise DiffalignError(
            f"{path} holds {noun} with another {', '.join(different)} (there: {header.get(different[0])!r}, asked "
            f"for: {wanted.get(different[0])!r}). Choose another folder, or remove this file to make them again."
        )
