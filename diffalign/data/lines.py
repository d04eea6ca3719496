"""Files of lines that are appended to, and may have been interrupted."""

from __future__ import annotations

from pathlib import Path


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
