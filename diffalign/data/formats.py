"""Which format a source of preference pairs has, found out by its files and their columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.data.chosen_rejected import PICTURES as PICTURE_COLUMNS
from diffalign.data.chosen_rejected import picture_columns
from diffalign.data.manifests import first_object
from diffalign.data.pair_folders import METADATA, NUMBERED, pictures, suffixes, twin_folders
from diffalign.data.tables import read_schema
from diffalign.data.webdataset import holds_pairs
from diffalign.errors import DiffalignError

TEXTS = (".json", ".jsonl")
ENDINGS: Mapping[str, tuple[str, ...]] = {
    "pickapic": (".parquet",),
    "chosen_rejected": (".parquet",),
    "jsonl": (".jsonl",),
    "hpdv2": TEXTS,
    "hpdv3": TEXTS,
    "imagereward_db": (".parquet", *TEXTS),
    "webdataset": (".tar",),
}
"""Formats that are made of files, and how these end."""
FOLDERS: Mapping[str, Callable[[Path], list[tuple[str, str]]]] = {
    "twin_folders": twin_folders,
    "suffixes": suffixes,
}
"""Formats that are made of folders, and what tells them."""
FALLBACK = {".parquet": "pickapic", ".jsonl": "jsonl", ".tar": "webdataset"}
"""What a file is read as when its columns tell nothing, so that the reader says what it lacks."""
SPLITS = (
    "train",
    "training",
    "validation",
    "val",
    "valid",
    "dev",
    "test",
    "validation_unique",
    "test_unique",
)


@dataclass(frozen=True)
class Found:
    """A format and the files it is read from, or the one folder."""

    format: str
    paths: tuple[Path, ...]


def find(path: Path, split: str = "train", format: str = "auto") -> Found:
    """What there is at a path.

    Args:
        split: files named `{split}.*`, `{split}-*` or `metadata-{split}.*`, and subfolders `{split}`, are chosen when
            there are any, else all files.
        format: one of the formats, or `auto`.

    Raises:
        DiffalignError: nothing is found, or several formats, or files of other splits only.
    """
    if path.is_file():
        return Found(_of_file(path) if format == "auto" else _fits(path, format), (path,))
    for folder in (path, path / "data"):  # downloaded hub data sets have `data/`
        if folder.is_dir() and (found := _in_folder(folder, split, format)):
            return found
    raise _nothing(path, split, format)


def formats_of_columns(names: Sequence[str]) -> list[str]:
    """The formats that have such columns; more than one is ambiguous."""
    has = set(names)
    pictures = "image_path" in has or "file_path" in has
    tells = {
        "pickapic": {"jpg_0", "jpg_1"} <= has,
        "chosen_rejected": bool(picture_columns(names)),
        "hpdv2": pictures and ("human_preference" in has or ("rank" in has and "prompt_id" not in has)),
        "hpdv3": {"path1", "path2"} <= has,
        "imagereward_db": ({"prompt_id", "rank"} <= has and bool({"image", "image_path"} & has))
        or {"generations", "ranking"} <= has,
    }
    return [name for name, told in tells.items() if told]


def format_of_columns(names: Sequence[str], where: str) -> str:
    """The format of a table, `pickapic` when the columns tell nothing.

    Raises:
        DiffalignError: the columns fit several formats.
    """
    return _one(formats_of_columns(names), where) or FALLBACK[".parquet"]


def _of_file(file: Path) -> str:
    """The format of one file, by its columns or else by its ending."""
    found = _recognised(file) or FALLBACK.get(file.suffix)
    if found is not None:
        return found
    endings = sorted({ending for known in ENDINGS.values() for ending in known})
    if file.suffix == ".json":
        fields = ", ".join(first_object(file)) or "none"
        raise DiffalignError(
            f"the records of {file} have the fields {fields}; expected those of HPDv2, HPDv3 or ImageRewardDB. For "
            "prompt, chosen and rejected, write one object per line into a .jsonl file."
        )
    raise DiffalignError(
        f"{file} ends in {file.suffix or 'nothing'}; expected {', '.join(endings)}. Rename it, or set data.format "
        f"to one of: {', '.join(ENDINGS)}."
    )


def _fits(file: Path, format: str) -> str:
    if format in FOLDERS:
        raise DiffalignError(
            f"{file} is a file; data.format {format} expects a folder. Set data.source to it."
        )
    return format


def _recognised(file: Path) -> str | None:
    """The format that a file's columns or members tell, or None.

    Raises:
        DiffalignError: they tell several.
    """
    if file.suffix == ".tar":
        return "webdataset" if holds_pairs(file) else None
    if file.suffix == ".parquet":
        names = read_schema(file).names
    elif file.suffix in TEXTS:
        names = list(first_object(file))
    else:
        return None
    found = [name for name in formats_of_columns(names) if file.suffix in ENDINGS[name]]
    if file.suffix == ".jsonl" and set(PICTURE_COLUMNS[0]) <= set(names):
        found.append("jsonl")
    return _one(found, str(file))


def _one(found: Sequence[str], where: str) -> str | None:
    if len(found) > 1:
        raise DiffalignError(
            f"{where} fits the formats {' and '.join(found)}, and they would be read differently. Set data.format to "
            "one of them."
        )
    return found[0] if found else None


def _in_folder(folder: Path, split: str, format: str) -> Found | None:
    """What a folder holds, of one format; None when it holds nothing that is known."""
    files = _files(folder, format)
    if format in FOLDERS:
        return _folder_found(folder, split, format)
    if format != "auto":
        told = [file for file in files if _recognised(file) == format] if format != "jsonl" else files
        return Found(format, tuple(of_split(told or files, split))) if files else None
    by_format: dict[str, list[Path]] = {}
    for file in files:
        if name := _recognised(file):
            by_format.setdefault(name, []).append(file)
    found = [Found(name, tuple(of_split(paths, split))) for name, paths in by_format.items()]
    if twins := _folder_found(folder, split, "twin_folders"):
        found.append(twins)
    if len(found) > 1:
        listed = "; ".join(f"{one.format} ({_names(one.paths)})" for one in found)
        raise DiffalignError(
            f"{folder} holds several kinds of preference data: {listed}. Set data.format to one of "
            f"{', '.join(one.format for one in found)}, or data.source to one file."
        )
    if found:
        return found[0]
    for ending, name in FALLBACK.items():
        if paths := [file for file in files if file.suffix == ending]:
            return Found(name, tuple(of_split(paths, split)))
    return _folder_found(folder, split, "suffixes")


def _files(folder: Path, format: str) -> list[Path]:
    """Files with the endings of a format, sorted by name."""
    endings = {e for name, known in ENDINGS.items() if format in ("auto", name) for e in known}
    # Hidden files are leftovers of downloads and archives (such as ._train-00000.parquet), never data.
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix in endings
        and not file.name.startswith(".")
        and file.name not in METADATA
        and file.is_file()
    )


def _folder_found(folder: Path, split: str, format: str) -> Found | None:
    """Pairs of pictures in the subfolder of a split, or in the folder itself.

    Raises:
        DiffalignError: only other splits have some.
    """
    told = FOLDERS[format]
    inner = [name for name in (split, *SPLITS) if (folder / name).is_dir() and told(folder / name)]
    if split in inner:
        return Found(format, (folder / split,))
    if told(folder):
        return Found(format, (folder,))
    if inner:
        raise _other_splits(folder, split, inner)
    return None


def of_split(files: list[Path], split: str) -> list[Path]:
    """The files of a split; all files when their names tell no split.

    Raises:
        DiffalignError: they tell other splits only.
    """
    splits = [re.split(r"[-.]", file.name.removeprefix("metadata-"))[0] for file in files]
    if split in splits:
        return [file for file, name in zip(files, splits, strict=True) if name == split]
    named = sorted({name for name in splits if name in SPLITS})
    if named:  # taking validation shards for training would spoil every later measurement
        raise _other_splits(files[0].parent, split, named)
    return files


def _other_splits(folder: Path, split: str, named: Sequence[str]) -> DiffalignError:
    return DiffalignError(
        f"{folder} holds no files of split {split!r}; found: {', '.join(named)}. "
        "Set data.split (or data.held_out_split) to one of them."
    )


def _nothing(path: Path, split: str, format: str) -> DiffalignError:
    """The error for a folder without data."""
    numbered = any(picture.stem.endswith(NUMBERED) for picture in pictures(path))
    why = (
        " Its pictures end in _0 and _1, which does not say which one is preferred: rename them to _w and _l, or "
        "write JSONL with prompt, chosen and rejected."
        if numbered
        else ""
    )
    if format in FOLDERS:
        return DiffalignError(
            f"folder {path} holds no pairs of pictures. Expected chosen/NAME.png and rejected/NAME.png "
            f"(twin_folders), or NAME_w.png and NAME_l.png (suffixes).{why}"
        )
    endings = sorted({e for name, known in ENDINGS.items() if format in ("auto", name) for e in known})
    return DiffalignError(
        f"folder {path} holds no {' or '.join(f'*{ending}' for ending in endings)} file with preference pairs, no "
        f"folders chosen/ and rejected/, no pictures NAME_w and NAME_l. Expected shards such as {split}-00000.parquet "
        f"directly in it; set data.source to the folder that holds them.{why}"
    )


def _names(paths: Sequence[Path]) -> str:
    return paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"
