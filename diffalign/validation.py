"""Pydantic's errors as one message: each problem with its dotted path, the value seen, what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from diffalign.errors import DiffalignError, nearest


def validate_section(
    model: type[BaseModel], values: dict[str, Any], prefix: str = "", origin: str = ""
) -> Any:
    """Validate `values` as `model`; `prefix` is the section's dotted path, `origin` the file to name.

    Raises:
        DiffalignError: all problems at once, one line each.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = _problems(model, error, prefix)
    where = origin or prefix or "the configuration"
    head = f"{where}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise DiffalignError("\n".join([head, *(f"  {line}" for line in problems)]))


def dotted_fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a model as a dotted path, sections before their keys."""
    for name, field in model.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        yield path
        section = _section(field.annotation)
        if section is not None:
            yield from dotted_fields(section, path)


def _problems(root: type[BaseModel], error: ValidationError, prefix: str) -> list[str]:
    """One line per path; the alternatives of a union share a line."""
    lines: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        model, path = _locate(root, item["loc"])
        full = ".".join([*([prefix] if prefix else []), *path])
        lines.setdefault(full, []).append(_describe(root, model, item, path, prefix))
    return [
        f"{path}{': ' if path else ''}{' or '.join(dict.fromkeys(texts))}" for path, texts in lines.items()
    ]


def _locate(root: type[BaseModel], location: tuple[int | str, ...]) -> tuple[type[BaseModel], list[str]]:
    """The model that holds the last key, and the path without pydantic's marks for union members."""
    model, path = root, []
    for depth, part in enumerate(location):
        last = depth == len(location) - 1
        if isinstance(part, str) and part not in model.model_fields and not last:
            break
        path.append(str(part))
        field = model.model_fields.get(str(part))
        section = _section(field.annotation) if field else None
        if last:
            break
        if section is None:
            path += [str(rest) for rest in location[depth + 1 :] if isinstance(rest, int)]
            break
        model = section
    return model, path


def _describe(root: type[BaseModel], model: type[BaseModel], item: Any, path: list[str], prefix: str) -> str:
    kind, message = item["type"], item["msg"]
    if kind == "extra_forbidden":
        return _unknown_key(root, model, path, prefix)
    if kind == "missing":
        field = model.model_fields.get(path[-1])
        about = f" ({field.description})" if field and field.description else ""
        return f"missing{about}"
    message = message.removeprefix("Value error, ")
    message = message.replace("Input should be", "expected").replace("should be", "expected to be", 1)
    if not path:
        return str(message)
    return f"is {_short(item['input'])}; {message}"


def _unknown_key(root: type[BaseModel], model: type[BaseModel], path: list[str], prefix: str) -> str:
    """Names the nearest sibling, else the same key in another section, else everything allowed here."""
    siblings = list(model.model_fields)
    parents = [*([prefix] if prefix else []), *path[:-1]]
    close = nearest(path[-1], siblings)
    if close:
        return f"unknown key; did you mean {'.'.join([*parents, close])}?"
    elsewhere = [key for key in dotted_fields(root, prefix) if key.rsplit(".", 1)[-1] == path[-1]]
    if elsewhere:
        return f"unknown key; did you mean {' or '.join(elsewhere)}?"
    return f"unknown key; allowed here: {', '.join(siblings)}"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model class inside an annotation, looking through optionals."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
