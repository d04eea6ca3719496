"""Reader of JSONL files that name image files: one comparison per line, `prompt`, `chosen`, `rejected`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.records import (
    ImageSource,
    PreferenceRecord,
    Reading,
    Records,
    check_label,
    check_weight,
    collect,
    describe_files,
    files_identity,
)
from diffalign.errors import DiffalignError, did_you_mean

FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "label",
    "labels",
    "weight",
    "chosen_prompt",
    "rejected_prompt",
    "user",
    "source",
)


def read_jsonl(files: Sequence[Path], reading: Reading = Reading()) -> Records:
    """Records of JSONL files; image paths are relative to the file that names them.

    Fields of a line: `prompt`, `chosen`, `rejected`; optional `label` (probability that `chosen` is
    preferred, 1 when absent, null when nobody judged), `labels` (the same for single aspects: an object such as
    `{"alignment": 1, "quality": 0.5}`), `weight`, `chosen_prompt` and `rejected_prompt` (own
    captions of the two images), `user`, `source`. Whether image files exist is not checked here: broken and
    missing ones are counted when they are read.

    Raises:
        DiffalignError: a line is not an object with these fields; the message names file and line.
    """
    found = (
        (
            _row(values, file.name, f"{file}, line {number}"),
            (file.parent, values["chosen"], values["rejected"]),
        )
        for file, number, values in json_lines(files)
    )
    rows, places, unlabelled = collect(found, reading.limit)
    images = [(folder / chosen, folder / rejected) for folder, chosen, rejected in places]

    def read(index: int) -> tuple[ImageSource, ImageSource]:
        return images[index]

    identity = files_identity([*files, *(path for pair in images for path in pair)], "jsonl", len(rows))
    return Records(rows, read, unlabelled, identity, describe_files(files, "JSONL"))


def json_lines(files: Sequence[Path]) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """File, line number and object of each line that is not blank.

    Raises:
        DiffalignError: a line is not a JSON object.
    """
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(_decoded(lines, file), 1):
                if line.strip():
                    yield file, number, _object(line, f"{file}, line {number}")


def _decoded(lines: Iterator[str], file: Path) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise DiffalignError(
            f"{file} is not UTF-8 text ({error}). Expected one JSON object per line."
        ) from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DiffalignError(f"{where} is not JSON ({error}). Expected one JSON object per line.") from error
    if not isinstance(values, dict):
        raise DiffalignError(f"{where} is a {type(values).__name__}; expected an object of named fields.")
    return values


def _row(values: dict[str, Any], file: str, where: str) -> PreferenceRecord | None:
    """The row of a line; None when its label is null."""
    _check_fields(values, where)
    if "label" in values and values["label"] is None:
        return None
    first, second = (
        str(values.get(name, values.get("prompt"))) for name in ("chosen_prompt", "rejected_prompt")
    )
    return PreferenceRecord(
        prompt=first,
        image_0=b"",
        image_1=b"",
        label_0=check_label(values.get("label", 1.0), where),
        source=values.get("source", file),
        weight=check_weight(values.get("weight", 1.0), where),
        prompt_1=None if first == second else second,
        user=values.get("user"),
        labels=_labels(values.get("labels", {}), where),
    )


def _labels(values: object, where: str) -> dict[str, float]:
    """Labels of single aspects; those that are null are left out."""
    if not isinstance(values, dict):
        raise DiffalignError(f'{where}: labels is {values!r}; expected an object such as {{"alignment": 1}}.')
    return {
        name: check_label(value, f"{where}, {name}") for name, value in values.items() if value is not None
    }


def _check_fields(values: dict[str, Any], where: str) -> None:
    """Refuse unknown fields (a misspelt `wieght` would be lost silently) and missing or non-text ones."""
    for name in values:
        if name not in FIELDS:
            hint = did_you_mean(name, list(FIELDS))
            raise DiffalignError(f"{where}: unknown field {name!r}; expected {', '.join(FIELDS)}.{hint}")
    own_prompts = "chosen_prompt" in values and "rejected_prompt" in values
    required = ("chosen", "rejected") if own_prompts else ("prompt", "chosen", "rejected")
    missing = [name for name in required if name not in values]
    if missing:
        found = ", ".join(values) or "none"
        raise DiffalignError(f"{where} lacks {', '.join(missing)}; found: {found}. Add the missing field(s).")
    for name in ("prompt", "chosen", "rejected", "chosen_prompt", "rejected_prompt"):
        if name in values and not isinstance(values[name], str):
            raise DiffalignError(f"{where}: {name} is {values[name]!r}; expected text.")
