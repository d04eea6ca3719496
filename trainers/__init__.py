"""One file per algorithm. `TRAINERS` names them; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from diffalign.errors import DiffalignError, nearest

TRAINERS: dict[str, str] = {
    "dpo": "diffalign.trainers.dpo:DPOTrainer",
}


def trainer_class(method: str) -> Any:
    """The trainer class of a method.

    Raises:
        DiffalignError: no such method; the nearest one is named.
    """
    if method not in TRAINERS:
        close = nearest(method, list(TRAINERS))
        hint = f" Did you mean {close!r}?" if close else ""
        raise DiffalignError(f"trainer.method is {method!r}; expected one of: {', '.join(TRAINERS)}.{hint}")
    module, name = TRAINERS[method].split(":")
    return getattr(importlib.import_module(module), name)
