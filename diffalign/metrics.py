"""Numbers of a run: accumulated on the device, written to `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def log_every(steps: int) -> int:
    """Steps between log lines: about a hundred lines per run, at most 50 steps apart."""
    return max(1, min(50, steps // 100))


class Meter:
    """Means of per-example metrics since the last log line, kept on the device: nothing waits for the GPU.

    Rows of a step count only after `commit`, so a skipped (non-finite) step leaves no trace in the means.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._rows = 0
        self._pending_rows = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one micro-batch of metrics, each `[B]`."""
        for name, values in metrics.items():
            total = values.detach().float().sum()
            self._pending[name] = self._pending[name] + total if name in self._pending else total
        self._pending_rows += len(next(iter(metrics.values()))) if metrics else 0

    def commit(self) -> None:
        """Count the rows added since the last step."""
        for name, value in self._pending.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._rows += self._pending_rows
        self.discard()

    def discard(self) -> None:
        """Forget the rows added since the last step."""
        self._pending, self._pending_rows = {}, 0

    def totals(self) -> tuple[list[str], list[Tensor], int]:
        """Names, sums and number of rows; the meter starts anew."""
        result = list(self._sums), list(self._sums.values()), self._rows
        self._sums, self._rows = {}, 0
        return result


def peak_memory(device: torch.device) -> float:
    """Largest memory use so far in GB: allocated GPU memory, or the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def is_better(name: str, value: float, best: float | None) -> bool:
    """Whether `value` beats `best`: higher is better, except for names that end in loss or error."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value < best if name.endswith(("loss", "error")) else value > best


class MetricsLog:
    """Appends one JSON object per line, each with its `step`, and the same numbers to TensorBoard."""

    def __init__(self, folder: Path, start_step: int):
        self.path = folder / "metrics.jsonl"
        truncate_metrics(self.path, start_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder / "tb", start_step)
        self._start = time.time()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers that hold after `step` steps; NaN and infinities become null in the file."""
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": step, **clean, "seconds": round(time.time() - self._start, 3)}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a PNG file in TensorBoard."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._board.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file; a line cut short by a crash is left out."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def truncate_metrics(path: Path, step: int) -> None:
    """Drop lines of steps after `step`: a resumed run computes and writes them again."""
    kept = [line for line in read_metrics(path) if line.get("step", 0) <= step] if step else []
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _tensorboard(folder: Path, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)
