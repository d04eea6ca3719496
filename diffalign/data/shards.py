"""Files of a cache: safetensors written atomically, checked by their headers, read through the memory map."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import DiffalignError

STALE_PARTIAL_SECONDS = 3600


class CorruptShard(DiffalignError):
    """A file of the cache is missing, damaged, or belongs to another cache."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file beside its place and rename it: it is there as a whole or not at all.

    Raises:
        DiffalignError: the disk is full or not writable; nothing partial is left.
    """
    _write(path, lambda partial: save_file(tensors, partial, metadata))


def write_text(path: Path, text: str) -> None:
    """Write a text file in the same way."""
    _write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file of these bytes in the same way."""
    _write(path, lambda partial: partial.write_bytes(data))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped: pages are read when touched. They must not be written to.

    Raises:
        CorruptShard: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise CorruptShard(_corrupt(path, error)) from error


def read_metadata(path: Path, key: str) -> dict[str, str]:
    """The metadata of a file that belongs to the cache `key`.

    safetensors compares the header with the length of the file, so a truncated file is found without reading
    it.
    Changed bytes inside the data would not be: hashing the whole cache at each start would cost more than it
        protects.

    Raises:
        CorruptShard: the file is missing, damaged, or of another cache.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CorruptShard(_corrupt(path, error)) from error
    if metadata.get("key") != key:
        raise CorruptShard(_corrupt(path, f"it belongs to cache {metadata.get('key')}, not {key}"))
    return metadata


def is_complete(path: Path, key: str) -> bool:
    """Whether a file is there, undamaged and of this cache."""
    try:
        read_metadata(path, key)
    except CorruptShard:
        return False
    return True


def remove_stale_partials(folder: Path) -> None:
    """Remove what killed processes left half-written; younger files may belong to one that still works."""
    for partial in folder.glob("*.partial"):
        try:
            if time.time() - partial.stat().st_mtime > STALE_PARTIAL_SECONDS:
                partial.unlink()
        except FileNotFoundError:  # its owner has just finished or removed it
            continue


def _write(path: Path, save: Callable[[Path], object]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(partial)
        _flush(partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise DiffalignError(
            f"cannot write {path}: {error}. Finished files of the cache are kept; free some space (or set "
            "data.cache_dir to another disk) and start again: it continues where it stopped."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Put the bytes on the disk before the name: a power cut must not leave a named file of zeros."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _corrupt(path: Path, reason: object) -> str:
    return f"cache file {path} cannot be used: {reason}. Run the caching again: only this file is rebuilt."
