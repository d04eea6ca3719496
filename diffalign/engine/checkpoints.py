"""Checkpoints: folders of safetensors and one JSON file, written beside and renamed, verified when read.

    checkpoints/step-000200/
        trainable.safetensors    the weights that are trained, by parameter name
        optimizer.safetensors    optimiser state as PARAMETER/KEY
        ema.safetensors          averaged weights (only when optim.ema is set)
        reference.safetensors    the reference's weights (curriculum.reference: stage, from stage 2)
        state.json               counters, configuration, versions, size and CRC-32 of the files above

Nothing is ever pickled. A folder is a checkpoint only if `state.json` is there and every file matches it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from diffalign.engine.parallel import sharded_like, whole
from diffalign.errors import DiffalignError

Tensors = dict[str, Tensor]


@dataclass
class Checkpoint:
    """What is written: named groups of tensors (a file each) and JSON-able state."""

    tensors: dict[str, Tensors]
    state: dict[str, Any] = field(default_factory=dict)

    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(t.nbytes for group in self.tensors.values() for t in group.values())


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return root / f"step-{step:06d}"


def save_checkpoint(
    root: Path, step: int, checkpoint: Checkpoint, warn: Callable[[str], None] = print
) -> Path:
    """Write `root/step-NNNNNN` completely or not at all; older checkpoints are never touched.

    Raises:
        DiffalignError: the disk is full or refuses to be written.
    """
    target = step_folder(root, step)
    temporary = root / f".{target.name}.partial"
    with readable_disk_errors(target):
        root.mkdir(parents=True, exist_ok=True)
        _warn_if_full(root, checkpoint.bytes(), warn)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            _write_files(temporary, checkpoint)
            if target.exists():
                shutil.rmtree(target)
            os.replace(temporary, target)
            _sync(root)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after verifying every file.

    Raises:
        DiffalignError: something is missing, cut short or altered.
    """
    state = verify(folder)
    names = [name for name in state["files"] if name.endswith(".safetensors")]
    return Checkpoint({name.removesuffix(".safetensors"): load_file(folder / name) for name in names}, state)


def verify(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files all match it.

    Raises:
        DiffalignError: something is missing, cut short or altered.
    """
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        expected = dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DiffalignError(
            f"{folder} is not a complete checkpoint: state.json is missing or broken"
        ) from error
    for name, facts in expected.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise DiffalignError(f"{path} is missing or has not the size it was written with")
        if _crc32(path) != facts["crc32"]:
            raise DiffalignError(f"{path} was altered after it was written (checksum differs)")
    return state


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first; unfinished ones are not listed."""
    found = [p for p in root.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_valid(root: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that verifies; broken newer ones are passed over with a warning."""
    for folder in reversed(checkpoints(root)):
        try:
            verify(folder)
        except DiffalignError as error:
            warn(f"{error}; trying the checkpoint before it")
            continue
        return folder
    return None


def prune(root: Path, keep_last: int, best_steps: Iterable[int]) -> None:
    """Delete all but the newest `keep_last` checkpoints and those of `best_steps`."""
    kept = {step_folder(root, step) for step in best_steps}
    for folder in checkpoints(root)[:-keep_last]:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def run_weights(run_folder: Path) -> Path:
    """The trained weights of a run: `final/trainable.safetensors`, else those of the newest checkpoint.

    Raises:
        DiffalignError: the run has saved nothing yet.
    """
    final = run_folder / "final" / "trainable.safetensors"
    if final.is_file():
        return final
    newest = newest_valid(run_folder / "checkpoints")
    if newest is None:
        raise DiffalignError(f"{run_folder} holds no trained weights yet: neither final/ nor a checkpoint")
    averaged = newest / "ema.safetensors"
    return averaged if averaged.is_file() else newest / "trainable.safetensors"


def parameter_tensors(names: Sequence[str], values: Sequence[Tensor]) -> Tensors:
    """Whole CPU copies by name; every process must call this."""
    return {name: whole(value) for name, value in zip(names, values, strict=True)}


@torch.no_grad()
def restore_parameters(names: Sequence[str], values: Sequence[Tensor], saved: Tensors) -> None:
    """Copy saved tensors into `values` in place.

    Raises:
        DiffalignError: names or shapes differ, so the checkpoint belongs to another model.
    """
    shapes = {name: list(value.shape) for name, value in zip(names, values, strict=True)}
    found = {name: list(value.shape) for name, value in saved.items()}
    if shapes != found:
        odd = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise DiffalignError(
            f"the checkpoint belongs to another model or other adapters: {len(odd)} weights differ, such as "
            f"{odd[0]} (saved {found.get(odd[0])}, expected {shapes.get(odd[0])})"
        )
    for name, value in zip(names, values, strict=True):
        value.copy_(sharded_like(saved[name], value))


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str], parameters: Sequence[Parameter]
) -> tuple[Tensors, dict[str, Any]]:
    """Optimiser state as tensors and scalars, both keyed `PARAMETER/KEY`; every process must call this."""
    tensors: Tensors = {}
    scalars: dict[str, Any] = {}
    for name, parameter in zip(names, parameters, strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = whole(value)
            else:
                scalars[f"{name}/{key}"] = value
    return tensors, scalars


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    parameters: Sequence[Parameter],
    tensors: Tensors,
    scalars: dict[str, Any],
) -> None:
    """Put saved state back, with the dtypes it was saved in."""
    by_name = dict(zip(names, parameters, strict=True))
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for full_key, value in {**tensors, **scalars}.items():
        name, key = full_key.rsplit("/", 1)
        parameter = by_name[name]
        if isinstance(value, Tensor):
            value = _placed(value, parameter, key, on_device)
        optimizer.state[parameter][key] = value


def _placed(value: Tensor, parameter: Parameter, key: str, on_device: bool) -> Tensor:
    """Moments go where the parameter is; unfused optimisers keep their step counter on the CPU."""
    if key == "step":
        return value.to(parameter.device) if on_device else value
    if value.shape == parameter.shape:
        return sharded_like(value, parameter)
    return value.to(parameter.device)


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    files: dict[str, dict[str, int]] = {}
    for name, tensors in checkpoint.tensors.items():
        path = folder / f"{name}.safetensors"
        save_file(tensors, path)
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    state = folder / "state.json"
    state.write_text(json.dumps({**checkpoint.state, "files": files}, indent=1), encoding="utf-8")
    _sync(state)
    _sync(folder)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    """Force a file or folder to the disk, so that a rename never outlives its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _warn_if_full(root: Path, needed: int, warn: Callable[[str], None]) -> None:
    free = shutil.disk_usage(root).free
    if free < needed * 1.05:
        warn(f"a checkpoint takes {needed / 1e9:.2f} GB but {root} has {free / 1e9:.2f} GB free")


@contextmanager
def readable_disk_errors(target: Path) -> Iterator[None]:
    """Disk errors while writing `target` as one message; safetensors reports them as text, not as an OSError.

    Raises:
        DiffalignError: the disk is full or refuses to be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
        reason = "the disk is full" if full else str(error)
        raise DiffalignError(
            f"could not write {target}: {reason}. Earlier checkpoints are untouched. Free some space "
            "(or lower checkpoint.keep_last), then continue with --resume."
        ) from error
