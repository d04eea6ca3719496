"""The shipped recipes: YAML files inside the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from diffalign.errors import DiffalignError, nearest


def recipe_names() -> list[str]:
    """Names of the shipped recipes such as `scenes/dpo`, sorted."""
    root = files("diffalign.configs")
    rooms = [
        room for room in root.iterdir() if room.is_dir() and room.name not in ("accelerate", "__pycache__")
    ]
    found = [
        f"{room.name}/{file.name[:-5]}"
        for room in rooms
        for file in room.iterdir()
        if file.name.endswith(".yaml")
    ]
    return sorted(found)


def recipe_text(path_or_name: str) -> tuple[str, str]:
    """Text of a recipe and the name to use in messages; an existing file goes before a shipped name.

    Raises:
        DiffalignError: neither a readable file nor a shipped recipe.
    """
    path = Path(path_or_name)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise DiffalignError(f"{path} cannot be read as text: {error}") from error
    name = path_or_name.removesuffix(".yaml")
    if name in recipe_names():
        return files("diffalign.configs").joinpath(f"{name}.yaml").read_text(
            encoding="utf-8"
        ), f"recipe {name}"
    close = nearest(name, recipe_names())
    hint = f"did you mean {close}?" if close else f"shipped recipes: {', '.join(recipe_names()) or 'none'}"
    raise DiffalignError(f"{path_or_name} is neither a file nor a shipped recipe; {hint}")


def recipe_summary(name: str) -> str:
    """First comment line of a shipped recipe."""
    text, _ = recipe_text(name)
    lines = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#"))
    return next((line for line in lines if line), "")


def copy_recipe(name: str, target: Path) -> Path:
    """Write a shipped recipe to a file (or into a folder) for editing.

    Raises:
        DiffalignError: no such recipe, or the file is already there.
    """
    text, _ = recipe_text(name)
    if target.is_dir():
        target = target / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    if target.exists():
        raise DiffalignError(f"{target} is already there; name another file, or delete it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return target
