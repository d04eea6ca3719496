"""Several pictures of one prompt on a grid, each with the noise that gives it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.evaluation.grids import image_grid
from diffalign.evaluation.prompts import EvalPrompt
from diffalign.inference.noise_file import NoiseFile, write_noises

CELL = 160


@dataclass(frozen=True)
class Sheet:
    """Pictures in rows; a place may be empty.

    Fields:
        pictures: `[N, 3, H, W]` in [0, 1], row by row. labels: N, below the pictures. columns: of the grid.
        noises: full noises `[K, S, C, h, w]` of the K places that are not empty, in the same order.
    """

    pictures: Tensor
    labels: Sequence[str]
    columns: int
    noises: Tensor


def write_sheets(
    sheets: Mapping[int, Sheet],
    prompts: Sequence[EvalPrompt],
    settings: dict[str, Any],
    backbone: Backbone,
    folder: Path,
) -> None:
    """Write `NNNN.png` and `NNNN.safetensors` (to be replayed) for each prompt's number that has a sheet."""
    if not sheets:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, sheet in sheets.items():
        image_grid(sheet.pictures, sheet.columns, sheet.labels, cell=CELL).save(folder / f"{number:04d}.png")
        prompt, count = prompts[number], len(sheet.noises)
        content = NoiseFile(
            sheet.noises,
            [prompt.text] * count,
            [prompt.seed] * count,
            backbone.config.model_dump(mode="json"),
            settings,
        )
        write_noises(folder / f"{number:04d}.safetensors", content, backbone.family)
