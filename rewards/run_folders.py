"""Folders of finished runs that trained a reward, and which reward reads them."""

from __future__ import annotations

from pathlib import Path

from diffalign.errors import DiffalignError
from diffalign.yamls import parse_yaml

DESCRIPTIONS = {"trained": "reward.json", "latent": "latent_reward.json"}
"""File that says what a finished run's weights are, by the name of the reward that reads it."""
WEIGHTS = "trainable.safetensors"
METHODS = "reward_model, pal (rewards of pictures) or latent_reward (a reward of noisy latents)"


def reward_of(path: str | Path) -> str:
    """Name of the reward that reads a run's folder, or its `final/`.

    Raises:
        DiffalignError: it holds no finished reward; says what it holds.
    """
    for name in DESCRIPTIONS:
        if _found(Path(path), name) is not None:
            return name
    raise DiffalignError(_problem(Path(path), f"a finished run of trainer.method {METHODS}"))


def reward_folder(path: str | Path, name: str) -> Path:
    """The folder with weights and description: `path`, or `path/final`.

    Raises:
        DiffalignError: it holds none for this reward; says what it holds.
    """
    found = _found(Path(path).expanduser(), name)
    if found is None:
        wanted = f"a finished run, or its final/ with {DESCRIPTIONS[name]} and {WEIGHTS}"
        raise DiffalignError(_problem(Path(path).expanduser(), wanted))
    return found


def _found(path: Path, name: str) -> Path | None:
    for folder in (path, path / "final"):
        if (folder / DESCRIPTIONS[name]).is_file() and (folder / WEIGHTS).is_file():
            return folder
    return None


def _problem(path: Path, wanted: str) -> str:
    """What is wrong with a folder, and what to do."""
    return f"{str(path)!r} {_held(path)}; expected {wanted}."


def _held(path: Path) -> str:
    if not path.is_dir():
        return "is no folder"
    for folder in (path, path / "final"):
        for name, file in DESCRIPTIONS.items():
            if (folder / file).is_file():
                whole = (folder / WEIGHTS).is_file()
                return f"holds the reward {name}@{path}" if whole else f"has a {file}, but no {WEIGHTS}"
    config = path / "config.yaml"
    if not config.is_file():
        return "holds no run"
    method = parse_yaml(config.read_text(encoding="utf-8"), str(config)).get("trainer", {}).get("method")
    if method in ("reward_model", "pal", "latent_reward"):
        return f"is a run of trainer.method {method} that is not finished (continue it with --resume)"
    return f"is a run of trainer.method {method}, which trains a generator"
