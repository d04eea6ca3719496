"""A search that a person ranks, between two sittings: its exact state, the best so far and the way there."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.inference.budget import Meter
from diffalign.inference.search import NoiseSearch
from diffalign.inference.trace import Trace

SEARCH = "search."


class SessionFile:
    """One group of prompts on the disk, written after every round; the name is there only when the file is complete.

    Fields:
        picked: what became the current picture, `[B]` for each round; -1 where it stayed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.picked: list[Tensor] = []
        self._cost: list[tuple[float, float]] = []

    def save(self, search: NoiseSearch, trace: Trace, picked: Tensor) -> None:
        """Store where a group is after a round.

        Raises:
            DiffalignError: the disk is full or not writable.
        """
        self.picked.append(picked)
        self._cost.append((trace.meter.evaluations, trace.meter.seconds))
        tensors = {SEARCH + name: value for name, value in search.state().items()}
        tensors |= {"noises": trace.noises, "media": trace.media}
        tensors |= {"picked": torch.stack(self.picked), "cost": torch.tensor(self._cost, dtype=torch.float64)}
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, part)
            part.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise DiffalignError(
                f"cannot write {self.path}: {error}. Free some space and add --resume: the answers are kept."
            ) from error

    def load(self, search: NoiseSearch) -> tuple[Tensor, Tensor] | None:
        """Put a search where it was.

        Returns:
            Full noises `[B, S, C, h, w]` and pictures `[B, 3, H, W]` that are current; None without a file.

        Raises:
            DiffalignError: the file is broken.
        """
        if not self.path.is_file():
            return None
        try:
            found = load_file(self.path)
            search.restore(
                {name.removeprefix(SEARCH): v for name, v in found.items() if name.startswith(SEARCH)}
            )
            self.picked = list(found["picked"])
            self._cost = [(float(evaluations), float(seconds)) for evaluations, seconds in found["cost"]]
            return found["noises"], found["media"]
        except (SafetensorError, KeyError, OSError) as error:
            raise DiffalignError(
                f"{self.path} cannot be read ({type(error).__name__}: {error}). Remove it: the answers beside it bring "
                "the session back to where it was."
            ) from error

    def retrace(self, trace: Trace, meter: Meter, media: list[Tensor]) -> None:
        """Let a trace see the earlier rounds again, given the pictures `[B, 3, H, W]` after each."""
        for picked, (evaluations, seconds), pictures in zip(self.picked, self._cost, media, strict=True):
            meter.resume(int(evaluations), seconds)
            trace.saw(trace.rewards + (picked >= 0), pictures, trace.noises)
