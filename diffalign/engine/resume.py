"""Run folders: starting a new one, continuing an old one, refusing what would not give the same numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffalign.config import RunConfig
from diffalign.engine.checkpoints import Checkpoint, checkpoints, load_checkpoint, newest_valid
from diffalign.errors import DiffalignError
from diffalign.versions import versions

# Keys that change how long, how fast or how visibly a run goes, but not the numbers it computes.
FREE_KEYS = (
    "name",
    "output_dir",
    "checkpoint",
    "evaluation",
    "optim.steps",
    "optim.max_nonfinite",
    "data.cache_dir",
    "data.shard_size",
    "data.max_pixels",
    "data.held_out",
    "data.held_out_split",
    "model.gradient_checkpointing",
    "model.compile",
    "model.attention",
)
# Their product with the number of processes is compared instead.
BATCH_KEYS = ("optim.batch_size", "optim.accumulation")


def binding_config(config: RunConfig) -> dict[str, Any]:
    """The options that decide a run's numbers, by dotted key."""
    flat = dict(_flatten(config.model_dump(mode="json")))
    free = (*FREE_KEYS, *BATCH_KEYS)
    return {k: v for k, v in flat.items() if not any(k == f or k.startswith(f"{f}.") for f in free)}


def starting_point(config: RunConfig, resume: bool, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to continue from, or None for a fresh start.

    Raises:
        DiffalignError: the folder holds a run and `resume` is off; or no checkpoint of it can be read.
    """
    root = config.folder / "checkpoints"
    present = checkpoints(root)
    if not present:
        return None
    if not resume:
        raise DiffalignError(
            f"{config.folder} already holds a run ({present[-1].name}). Add --resume to continue it, "
            "or choose another name with --name."
        )
    newest = newest_valid(root, warn)
    if newest is None:
        raise DiffalignError(
            f"none of the {len(present)} checkpoints in {root} can be read; delete {config.folder} "
            "to start again"
        )
    return load_checkpoint(newest)


def check_resumable(state: dict[str, Any], config: RunConfig, global_batch: int) -> None:
    """Refuse to continue with options that would give other numbers than an uninterrupted run.

    Raises:
        DiffalignError: names each changed key with its old and new value.
    """
    old, new = state["config"], binding_config(config)
    changes = [
        f"{k}: {old.get(k)!r} -> {new.get(k)!r}"
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k)
    ]
    if state["global_batch"] != global_batch:
        changes.append(
            "pairs per step (optim.batch_size x optim.accumulation x processes): "
            f"{state['global_batch']} -> {global_batch}"
        )
    if changes:
        raise DiffalignError(
            "the run was started with other options:\n  "
            + "\n  ".join(changes)
            + "\nChange them back, or start a new run with --name."
        )


def changed_versions(state: dict[str, Any]) -> list[str]:
    """`package old -> new` for everything that is not what the checkpoint was written with."""
    old, new = state.get("versions", {}), versions()
    return [
        f"{k} {old.get(k)} -> {new.get(k)}"
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k)
    ]


def open_folder(folder: Path, fresh: bool) -> None:
    """Create the run folder; a fresh run does not use what one that saved nothing has left there.

    Stored reference errors stay: they are kept under a hash of all they depend on.

    Raises:
        DiffalignError: it cannot be created or written.
    """
    try:
        if fresh and (folder / "metrics.jsonl").is_file():
            for name in ("tb", "samples", "final"):
                shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("checkpoints", "samples", "tb"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiffalignError(
            f"cannot create the run folder {folder}: {error}; choose another output_dir"
        ) from error


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{path}.")
        else:
            yield path, value
