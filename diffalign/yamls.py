"""YAML in and out: safe loading, duplicate keys refused, dotted overrides."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from diffalign.errors import DiffalignError


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses a key given twice, which YAML would silently resolve to the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """Parse a YAML mapping; no tag but the plain ones is ever constructed.

    Raises:
        DiffalignError: not YAML, or not a mapping; `origin` names the file in the message.
    """
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise DiffalignError(f"{origin} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise DiffalignError(
            f"{origin} holds {type(values).__name__}; expected keys such as model:, data:, optim:"
        )
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in place; the value is read as YAML (`1e-4`, `true`, `[a, b]`, `null`).

    Raises:
        DiffalignError: no `=`, an empty key, a path through a value, or a value that is not YAML.
    """
    path, separator, raw = override.partition("=")
    parts = path.strip().split(".")
    if not separator or not all(parts):
        raise DiffalignError(
            f"override {override!r} is not of the form key.path=value, for example optim.lr=1e-4"
        )
    try:
        value = yaml.load(raw, _Loader) if raw.strip() else None
    except yaml.YAMLError as error:
        raise DiffalignError(f"override {override!r}: the value is not valid YAML: {error}") from error
    section = values
    for depth, part in enumerate(parts[:-1]):
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise DiffalignError(
                f"override {override!r}: {'.'.join(parts[: depth + 1])} is a value, not a section"
            )
    section[parts[-1]] = value


def write_yaml(values: dict[str, Any], path: Path) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(to_yaml(values), encoding="utf-8")
    os.replace(temporary, path)


def to_yaml(values: dict[str, Any]) -> str:
    """Plain YAML text in the order of the keys."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
