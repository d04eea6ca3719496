"""The catalogue of rewards with what a reader should know before trusting one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from diffalign.rewards import REWARDS, Facts

WRAPS = "of"


@dataclass(frozen=True)
class Entry:
    """A reward of the catalogue.

    Fields:
        kind: `sample`, `set`, or `wrapper` for a reward made of rewards. summary: first sentence of its
        description. problem: why it cannot be used here (an optional package is missing), else empty.
    """

    name: str
    kind: str
    differentiable: bool | None
    facts: Facts
    summary: str
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        """All of it, flat."""
        return {
            "name": self.name,
            "kind": self.kind,
            "differentiable": self.differentiable,
            "scale": self.facts.scale,
            "licence": self.facts.licence,
            "backbone": self.facts.backbone,
            "source": self.facts.source,
            "summary": self.summary,
            "problem": self.problem,
        }


def catalogue() -> list[Entry]:
    """Every reward by name; classes are imported, but no weights are loaded."""
    return [_entry(name, path) for name, path in REWARDS.items()]


def _entry(name: str, path: str) -> Entry:
    module, _, attribute = path.partition(":")
    try:
        thing = getattr(import_module(module), attribute)
    except Exception as error:  # an optional package may fail in any way while it is imported
        return Entry(name, "", None, Facts(), "", f"{type(error).__name__}: {error}")
    facts = getattr(thing, "facts", None)
    wrapper = inspect.isclass(thing) and WRAPS in inspect.signature(thing).parameters
    kind = "wrapper" if wrapper else str(getattr(thing, "kind", "sample"))
    differentiable = getattr(thing, "differentiable", None)
    return Entry(
        name,
        kind,
        differentiable if isinstance(differentiable, bool) else None,
        facts if isinstance(facts, Facts) else Facts(),
        (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " "),
    )
