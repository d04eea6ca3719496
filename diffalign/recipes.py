"""The shipped recipes, and the launcher files for several processes: YAML inside the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from diffalign.errors import DiffalignError, nearest

LAUNCHERS = "accelerate"
OPTIMIZE = "optimize"


def recipe_names() -> list[str]:
    """Names of the shipped recipes of trainings such as `scenes/dpo`, sorted."""
    return [name for name in _shipped() if not name.startswith((f"{LAUNCHERS}/", f"{OPTIMIZE}/"))]


def optimize_names() -> list[str]:
    """Names of the shipped recipes for `diffalign optimize`, sorted."""
    return [name for name in _shipped() if name.startswith(f"{OPTIMIZE}/")]


def launcher_names() -> list[str]:
    """Names of the shipped files for `accelerate launch --config_file`, sorted."""
    return [name for name in _shipped() if name.startswith(f"{LAUNCHERS}/")]


def recipe_text(path_or_name: str) -> tuple[str, str]:
    """Text of a recipe of a training and the name to use in messages; an existing file goes before a shipped name.

    Raises:
        DiffalignError: neither a readable file nor a shipped recipe.
    """
    if path_or_name.removesuffix(".yaml") in optimize_names() and not Path(path_or_name).is_file():
        raise DiffalignError(f"{path_or_name} trains nothing; run it with: diffalign optimize {path_or_name}")
    return _text(path_or_name, recipe_names())


def optimize_text(path_or_name: str) -> tuple[str, str]:
    """Text of a recipe for `diffalign optimize` and the name to use in messages.

    Raises:
        DiffalignError: neither a readable file nor a shipped recipe.
    """
    return _text(path_or_name, optimize_names())


def _text(path_or_name: str, allowed: list[str]) -> tuple[str, str]:
    path = Path(path_or_name)
    if not path.is_file():
        name = path_or_name.removesuffix(".yaml")
        return shipped_text(name, allowed), f"recipe {name}"
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DiffalignError(f"{path} cannot be read as text: {error}") from error


def shipped_text(name: str, allowed: list[str] | None = None) -> str:
    """Text of a shipped file, comments included.

    Args:
        allowed: names that count; all shipped ones if not given.

    Raises:
        DiffalignError: no such file; the nearest name is given.
    """
    name, allowed = name.removesuffix(".yaml"), allowed or _shipped()
    if name in allowed:
        return files("diffalign.configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    close = nearest(name, allowed)
    hint = f"did you mean {close}?" if close else f"shipped: {', '.join(allowed)}"
    raise DiffalignError(f"{name} is neither a file nor a shipped recipe; {hint}")


def summary(name: str) -> str:
    """First sentence of a shipped file's head comment."""
    head: list[str] = []
    for line in shipped_text(name).splitlines():
        text = line.lstrip("#").strip()
        if not text or not line.startswith("#"):
            break
        head.append(text)
    return " ".join(head).split(". ")[0].rstrip(".")


def copy_recipe(name: str, target: Path) -> Path:
    """Write a shipped file to a file (or into a folder) for editing.

    Raises:
        DiffalignError: no such recipe, or the file is already there.
    """
    text = shipped_text(name)
    if target.is_dir():
        target = target / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    if target.exists():
        raise DiffalignError(f"{target} is already there; name another file, or delete it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return target


def _shipped() -> list[str]:
    root = files("diffalign.configs")
    rooms = [room for room in root.iterdir() if room.is_dir()]
    found = [(room.name, file.name) for room in rooms for file in room.iterdir()]
    return sorted(f"{room}/{file[:-5]}" for room, file in found if file.endswith(".yaml"))
