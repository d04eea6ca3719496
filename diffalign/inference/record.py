"""The folder of a run: pictures before, on the way and after, the noises, the numbers, and a page to read.

result.json   noise.safetensors   report.md   comparison.png
before/NNNN.png   after/NNNN.png   best_of_n/NNNN.png   during/NNNN.gif   during.png
archive/NNNN.png   archive/NNNN.safetensors (of methods that keep several pictures of a prompt)
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.evaluation.grids import Row, comparison_grid, fit, image_grid
from diffalign.evaluation.pictures import to_uint8, write_picture
from diffalign.inference.baseline import EVALUATIONS, SECONDS
from diffalign.inference.noise_file import NoiseFile, write_noises
from diffalign.inference.report import report, summary
from diffalign.inference.result import AFTER, BEFORE, Optimized
from diffalign.inference.sheet import write_sheets

FOLDERS = {BEFORE: "before", AFTER: "after", EVALUATIONS: "best_of_n", SECONDS: "best_of_n_seconds"}
GIF_SIDE, FRAME_MS, LAST_MS = 256, 150, 1500
STRIP = 8
"""Pictures of one prompt in the strip."""


def write_record(found: Optimized, backbone: Backbone, folder: Path) -> None:
    """Write all of it; files of an earlier run with the same names are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage, media in found.media.items():
        _write_pictures(media, folder / FOLDERS[stage])
    _write_way(found, folder)
    rows = [
        Row(prompt.text, before, after, notes=(f"{b:.3g}", f"{a:.3g}"))
        for prompt, before, after, b, a in zip(
            found.prompts,
            found.media[BEFORE],
            found.media[AFTER],
            found.rewards[BEFORE].tolist(),
            found.rewards[AFTER].tolist(),
            strict=True,
        )
    ]
    comparison_grid(rows[:24], names=("before", "after")).save(folder / "comparison.png")
    noises = NoiseFile(
        found.noises,
        [prompt.text for prompt in found.prompts],
        [prompt.seed for prompt in found.prompts],
        backbone.config.model_dump(mode="json"),
        found.settings,
    )
    write_noises(folder / "noise.safetensors", noises, backbone.family)
    write_sheets(found.sheets, found.prompts, found.settings, backbone, folder / "archive")
    _write_text(folder / "result.json", json.dumps(as_json(found), indent=2, ensure_ascii=False))
    _write_text(folder / "report.md", report(found))


def as_json(found: Optimized) -> dict[str, Any]:
    """All numbers of a run."""
    return {
        "method": found.method,
        "reward": found.reward,
        "settings": found.settings,
        "stopped": found.stopped,
        "cost": {
            "evaluations": found.evaluations,
            "backwards": found.backwards,
            "seconds": round(found.seconds, 3),
            "baselines": {
                name: {"evaluations": evaluations, "seconds": round(seconds, 3)}
                for name, (evaluations, seconds) in found.baseline_cost.items()
            },
        },
        "summary": summary(found),
        "trajectory": [
            {
                "evaluations": point.evaluations,
                "backwards": point.backwards,
                "seconds": round(point.seconds, 3),
                "rewards": _numbers(point.rewards),
                "best": _numbers(point.best),
            }
            for point in found.trajectory
        ],
        "prompts": [_prompt(found, row) for row in range(len(found.prompts))],
    }


def _prompt(found: Optimized, row: int) -> dict[str, Any]:
    prompt = found.prompts[row]
    looks = {stage: look[row] for stage, look in found.gaussianity.items()}
    return {
        "prompt": prompt.text,
        "category": prompt.category,
        "seed": prompt.seed,
        "reward": {stage: _number(values[row]) for stage, values in found.rewards.items()},
        "held_out": {
            name: {stage: _number(values[row]) for stage, values in stages.items()}
            for name, stages in found.held_out.items()
        },
        "noise": {stage: None if look is None else asdict(look) for stage, look in looks.items()},
        "failure": found.failures.get(row, ""),
        "notes": {name: _note(values[row]) for name, values in found.notes.items()},
    }


def _write_pictures(media: Tensor, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for row, picture in enumerate(media):
        write_picture(picture, folder / f"{row:04d}.png")


def _write_way(found: Optimized, folder: Path) -> None:
    """An animation per shown prompt, and a strip of stills of all of them."""
    if not found.frames or not len(found.frames[0]):
        return
    (folder / "during").mkdir(exist_ok=True)
    shown = len(found.frames[0])
    for row in range(shown):
        last = (found.media[AFTER][row].clamp(0, 1) * 255).round().byte()
        frames = [_frame(picture) for picture in [*(frame[row] for frame in found.frames), last]]
        times = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
        path = folder / "during" / f"{row:04d}.gif"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)
    count = min(STRIP, len(found.frames))
    picked = [found.frames[round(i * (len(found.frames) - 1) / max(1, count - 1))] for i in range(count)]
    stills = torch.stack([frame.float() / 255 for frame in picked], 1).flatten(0, 1)
    image_grid(stills, count, cell=128).save(folder / "during.png")


def _frame(picture: Tensor) -> Image.Image:
    return fit(Image.fromarray(to_uint8(picture.float() / 255)), GIF_SIDE)


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def _numbers(values: Tensor) -> list[float | None]:
    return [_number(value) for value in values]


def _note(values: Tensor) -> Any:
    """A number or a list of them; integers stay integers."""
    if values.dim():
        return [_note(value) for value in values]
    return _number(values) if values.is_floating_point() else int(values)


def _number(value: Any) -> float | None:
    """A float for JSON, which has no NaN."""
    number = float(value)
    return round(number, 6) if number == number and abs(number) != float("inf") else None
