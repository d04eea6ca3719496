"""Readers of folders of pictures: twin folders (`chosen/NAME`, `rejected/NAME`), suffixes (`NAME_w`, `NAME_l`).

Captions are in `NAME.txt` beside the preferred picture, or in `metadata.jsonl` or `metadata.csv`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from diffalign.data.manifests import missing_field, read_objects
from diffalign.data.records import (
    ImageSource,
    PreferenceRecord,
    Reading,
    Records,
    check_label,
    check_weight,
    collect,
    files_identity,
)
from diffalign.errors import DiffalignError

TWINS = (
    ("chosen", "rejected"),
    ("preferred", "rejected"),
    ("win", "lose"),
    ("winner", "loser"),
    ("good", "bad"),
)
SUFFIXES = (("_chosen", "_rejected"), ("_win", "_lose"), ("_winner", "_loser"), ("_w", "_l"))
NUMBERED = ("_0", "_1")
"""Endings of pictures that are pairs perhaps, but do not say which one is preferred."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
PROMPTS = ("prompt", "caption", "text")
METADATA = ("metadata.jsonl", "metadata.csv")
NAMED = 10


@dataclass(frozen=True)
class Sides:
    """Picture files by the name that they share with their partner.

    Fields:
        folder: of the data set. captions: of the captions, beside the preferred pictures.
        chosen, rejected: the files. kind: the format. ending: what a preferred picture's stem has after the name.
    """

    folder: Path
    captions: Path
    chosen: Mapping[str, Path]
    rejected: Mapping[str, Path]
    kind: str
    ending: str = ""


def twin_folders(folder: Path) -> list[tuple[str, str]]:
    """The pairs of twin folders that a folder holds."""
    return [pair for pair in TWINS if all((folder / name).is_dir() for name in pair)]


def suffixes(folder: Path) -> list[tuple[str, str]]:
    """The pairs of suffixes that picture files of a folder have."""
    stems = [path.stem for path in pictures(folder)]
    return [pair for pair in SUFFIXES if all(any(stem.endswith(end) for stem in stems) for end in pair)]


def pictures(folder: Path) -> Iterator[Path]:
    """The picture files directly in a folder; hidden files are none."""
    for path in folder.iterdir():
        if path.suffix.lower() in PICTURES and not path.name.startswith("."):
            yield path


def read_twin_folders(folder: Path, reading: Reading = Reading()) -> Records:
    """Records of two folders whose pictures have equal names (suffixes may differ), sorted by name.

    Raises:
        DiffalignError: there are no such folders or several, no pairs, captions are missing, or names are repeated.
    """
    first, second = _only(twin_folders(folder), TWINS, folder, "folders")
    sides = Sides(
        folder=folder,
        captions=folder / first,
        chosen=_by_name(folder / first, ""),
        rejected=_by_name(folder / second, ""),
        kind="twin_folders",
    )
    return _read(sides, reading)


def read_suffixes(folder: Path, reading: Reading = Reading()) -> Records:
    """Records of one folder whose pictures are told apart by suffixes of their names, sorted by name.

    Raises:
        DiffalignError: there are no such suffixes or several, no pairs, captions are missing, or names are repeated.
    """
    first, second = _only(suffixes(folder), SUFFIXES, folder, "suffixes")
    chosen, rejected = _by_name(folder, first), _by_name(folder, second)
    return _read(Sides(folder, folder, chosen, rejected, "suffixes", first), reading)


def _only(
    found: list[tuple[str, str]], known: tuple[tuple[str, str], ...], folder: Path, what: str
) -> tuple[str, str]:
    """The one pair of names in a folder."""
    if len(found) == 1:
        return found[0]
    listed = ", ".join("/".join(pair) for pair in found or known)
    if found:
        raise DiffalignError(
            f"{folder} has several pairs of {what}: {listed}. Move one of them elsewhere; two sets of pairs in one "
            "folder cannot be told apart."
        )
    raise DiffalignError(f"{folder} has none of these pairs of {what}: {listed}.")


def _by_name(folder: Path, ending: str) -> dict[str, Path]:
    """Pictures whose stem has an ending, by the stem without it."""
    found: dict[str, Path] = {}
    for path in sorted(pictures(folder)):
        if not path.stem.endswith(ending):
            continue
        name = path.stem.removesuffix(ending)
        if name in found:
            raise DiffalignError(
                f"{folder} has both {found[name].name} and {path.name}; expected one picture per name. Remove one."
            )
        found[name] = path
    return found


def _read(sides: Sides, reading: Reading) -> Records:
    names = sorted(sides.chosen.keys() & sides.rejected.keys())
    notes = _unpaired(sides)
    if not names:
        raise DiffalignError(f"{sides.folder} has no pair of pictures ({sides.kind}). {''.join(notes)}")
    captions = _captions(sides, names)
    found = ((_row(captions[name], sides, name), name) for name in names)
    rows, places, unlabelled = collect(found, reading.limit)
    texts = [sides.captions / f"{name}.txt" for name in places]
    used = [side[name] for name in places for side in (sides.chosen, sides.rejected)]
    identity = files_identity([*used, *texts, *_metadata_files(sides)], sides.kind, len(rows))

    def images(index: int) -> tuple[ImageSource, ImageSource]:
        return sides.chosen[places[index]], sides.rejected[places[index]]

    return Records(rows, images, unlabelled, identity, f"{sides.folder} ({sides.kind})", notes)


def _unpaired(sides: Sides) -> tuple[str, ...]:
    """A note that counts and names pictures without partner."""
    names = sorted(sides.chosen.keys() ^ sides.rejected.keys())
    if not names:
        return ()
    files = [(sides.chosen.get(name) or sides.rejected[name]).relative_to(sides.folder) for name in names]
    listed = ", ".join(file.as_posix() for file in files[:NAMED])
    more = ", ..." if len(files) > NAMED else ""
    return (f"pictures without partner of the same name: {len(files):,} ({listed}{more})",)


def _captions(sides: Sides, names: list[str]) -> dict[str, dict[str, Any]]:
    """What is known of each pair: `prompt`, and `label` and `weight` if given."""
    known = _metadata(sides)
    missing = []
    for name in names:
        text = sides.captions / f"{name}.txt"
        if name not in known and text.is_file():
            known[name] = {"prompt": _text(text)}
        elif name not in known:
            missing.append(name)
    if missing:
        listed = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
        raise DiffalignError(
            f"{sides.folder}: {len(missing):,} of {len(names):,} pairs have no caption: {listed}. Write NAME.txt in "
            f"{sides.captions} (an empty file for no prompt), or {' or '.join(METADATA)} with file_name and prompt."
        )
    return known


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DiffalignError(
            f"{file} is not UTF-8 text ({error}). Expected the caption of a pair."
        ) from error


def _metadata_files(sides: Sides) -> list[Path]:
    folders = dict.fromkeys((sides.folder, sides.captions))
    return [folder / name for folder in folders for name in METADATA if (folder / name).is_file()]


def _metadata(sides: Sides) -> dict[str, dict[str, Any]]:
    """Rows of metadata files by the name of their picture; names are compared, never opened."""
    found: dict[str, dict[str, Any]] = {}
    for file in _metadata_files(sides):
        for where, values in _csv(file) if file.suffix == ".csv" else read_objects(file):
            if not isinstance(values.get("file_name"), str):
                raise missing_field(values, "file_name (text)", where)
            name = PurePosixPath(values["file_name"].replace("\\", "/")).name
            stem = PurePosixPath(name).stem if PurePosixPath(name).suffix.lower() in PICTURES else name
            prompt = next((key for key in PROMPTS if isinstance(values.get(key), str)), None)
            if prompt is None:
                raise missing_field(values, " or ".join(PROMPTS), where)
            known = {key: values[key] for key in ("label", "weight") if key in values}
            found[stem.removesuffix(sides.ending)] = {"prompt": values[prompt], "where": where} | known
    return found


def _csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV file; numbers are numbers, empty cells null."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text)
            for row in reader:
                numbers = {key: _number(row[key]) for key in ("label", "weight") if key in row}
                yield f"{file}, line {reader.line_num}", row | numbers
    except (UnicodeDecodeError, csv.Error) as error:
        raise DiffalignError(f"{file} is not CSV in UTF-8 ({error}). Write it again.") from error


def _number(cell: str | None) -> float | str | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


def _row(values: dict[str, Any], sides: Sides, name: str) -> PreferenceRecord | None:
    """The row of a pair; None when its label is null."""
    where = values.get("where", f"{sides.folder}, {name}")
    label, weight = values.get("label", 1.0), values.get("weight")
    if label is None:
        return None
    return PreferenceRecord(
        prompt=values["prompt"],
        image_0=b"",
        image_1=b"",
        label_0=check_label(label, where),
        source=f"{sides.folder.name}/{name}",
        weight=1.0 if weight is None else check_weight(weight, where),
    )
