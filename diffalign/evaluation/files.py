"""Score picture files: which files, which prompt belongs to each, their scores, and what was skipped."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffalign.data.images import FORMATS, BrokenImage, decode
from diffalign.errors import DiffalignError
from diffalign.evaluation.pictures import Progress, silent
from diffalign.evaluation.result import write_text
from diffalign.evaluation.scoring import Array, may_skip, unique_names
from diffalign.rewards import Reward
from diffalign.rewards.guard import Guarded, ask

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
SIDECAR = "pictures.jsonl"


@dataclass(frozen=True)
class FileScores:
    """Scores of picture files.

    Fields:
        files, prompts: `N` each. scores: reward to `[N]`, NaN where there is none. stds: of rewards with an
        uncertainty. faults: file to why it has no score at all (broken, or without a prompt).
    """

    files: list[Path]
    prompts: list[str]
    scores: dict[str, Array]
    stds: dict[str, Array] = field(default_factory=dict)
    faults: dict[Path, str] = field(default_factory=dict)

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean, std, min, max, number of scores and number of files without one, per reward."""
        return {name: _summary(values) for name, values in self.scores.items()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One record per file: file, prompt, each reward's score (None without one), its std, and a fault."""
        for i, (path, prompt) in enumerate(zip(self.files, self.prompts, strict=True)):
            columns = {name: values[i] for name, values in self.scores.items()}
            columns |= {f"{name}_std": values[i] for name, values in self.stds.items()}
            numbers = {name: None if math.isnan(v) else float(v) for name, v in columns.items()}
            yield {"file": str(path), "prompt": prompt, **numbers, "error": self.faults.get(path, "")}


def score_files(
    paths: Sequence[str | Path],
    rewards: Sequence[Reward],
    *,
    prompt: str | None = None,
    prompts: str | Path | None = None,
    batch_size: int = 8,
    on_error: Literal["raise", "skip"] = "raise",
    progress: Progress = silent,
) -> FileScores:
    """Score picture files and the pictures of folders.

    A file's prompt is `prompt` for all; or a line of `prompts` (see `file_prompts`); or that of a `pictures.jsonl`
    in its folder, as `diffalign generate` writes it; or the text file of the same name (`0000.txt`).

    Args:
        on_error: `skip` leaves out what cannot be read or scored and counts it; `raise` stops at the first.

    Raises:
        DiffalignError: no pictures, no reward, nothing could be scored; with `raise` also a broken picture, a
            missing prompt or a scorer's failure.
    """
    if not rewards:
        raise DiffalignError("no reward to score by; expected at least one, such as --rewards sharpness")
    files = picture_files(paths)
    texts, faults = _prompts(files, prompt, prompts)
    if faults and on_error == "raise":
        path, reason = next(iter(faults.items()))
        raise DiffalignError(f"{path} {reason}")
    job = _Job(files, texts, faults, on_error, batch_size, progress)
    names = unique_names(rewards)
    found = FileScores(files, texts, {name: np.full(len(files), np.nan) for name in names}, {}, faults)
    samples = {name: r for name, r in zip(names, rewards, strict=True) if r.kind == "sample"}
    sets = {name: r for name, r in zip(names, rewards, strict=True) if r.kind == "set"}
    _score_samples(job, {name: _guarded(reward, on_error) for name, reward in samples.items()}, found)
    _score_sets(job, sets, found)
    if all(np.isnan(values).all() for values in found.scores.values()):
        reason = next(iter(faults.values()), "every scorer skipped every picture")
        raise DiffalignError(f"none of {len(files)} pictures could be scored: the first {reason}")
    return found


def picture_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files given, and the pictures directly in the folders given, sorted by name.

    Raises:
        DiffalignError: a path does not exist, or there is no picture.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = (
                p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
            )
            found += sorted(inside)
        elif path.is_file():
            found.append(path)
        else:
            raise DiffalignError(f"no file or folder {str(path)!r}; expected pictures or folders of pictures")
    if not found:
        raise DiffalignError(f"no pictures there; expected files in {', '.join(FORMATS)} format")
    return list(dict.fromkeys(found))


def file_prompts(source: str | Path, files: Sequence[Path]) -> list[str | None]:
    """Prompts of files from a list: JSONL with `file` and `prompt`, matched by name; else one line per file.

    Raises:
        DiffalignError: a line is broken, or a plain list has another length than there are files.
    """
    path = Path(source)
    if not path.is_file():
        raise DiffalignError(
            f"no prompt file {str(path)!r}; expected JSONL with file and prompt, or text lines"
        )
    if path.suffix.lower() == ".jsonl":
        named = _sidecar(path)
        return [named.get(file.name) for file in files]
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    if len(lines) != len(files):
        raise DiffalignError(
            f"{path} has {len(lines)} lines for {len(files)} pictures; expected one prompt per picture in order "
            "of their names, or JSONL with file and prompt"
        )
    return list(lines)


def write_scores(scores: FileScores, path: Path) -> None:
    """Write one record per file: `.csv`, or `.jsonl`.

    Raises:
        DiffalignError: another file ending.
    """
    rows = list(scores.rows())
    if path.suffix.lower() == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix.lower() == ".csv":
        part = path.with_name(path.name + ".part")
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        part.replace(path)
    else:
        raise DiffalignError(f"cannot write scores to {path}; expected a name that ends in .csv or .jsonl")


@dataclass(frozen=True)
class _Job:
    """What is scored and how; `faults` grows as pictures turn out to be broken."""

    files: list[Path]
    prompts: list[str]
    faults: dict[Path, str]
    on_error: str
    batch_size: int
    progress: Progress

    def batches(self) -> Iterator[tuple[list[int], Tensor]]:
        """Rows and pictures `[B, 3, H, W]`: neighbours of the same size together, each file read once."""
        rows: list[int] = []
        images: list[Tensor] = []
        for row, path in enumerate(self.files):
            image = self._read(path)
            if image is None:
                continue
            if images and (image.shape != images[0].shape or len(images) == self.batch_size):
                yield rows, torch.stack(images)
                rows, images = [], []
            rows.append(row)
            images.append(image)
        if images:
            yield rows, torch.stack(images)

    def _read(self, path: Path) -> Tensor | None:
        """A picture `[3, H, W]` in [0, 1]; None for one that is left out."""
        if path in self.faults:
            return None
        try:
            return torch.from_numpy(np.array(decode(path))).permute(2, 0, 1).float() / 255
        except BrokenImage as error:
            if self.on_error == "raise":
                raise DiffalignError(f"{path} {error}. Use --on-error skip to go on without it.") from error
            self.faults[path] = str(error)
            return None


def _score_samples(job: _Job, rewards: dict[str, Reward], found: FileScores) -> None:
    """Every batch by every reward, so that each file is read once."""
    if not rewards:
        return
    done = 0
    for rows, images in job.batches():
        job.progress("scoring", done, len(job.files))
        done = rows[-1] + 1
        for name, reward in rewards.items():
            _enter(found, name, rows, reward, images, [job.prompts[i] for i in rows])
    job.progress("scoring", len(job.files), len(job.files))


def _enter(
    found: FileScores, name: str, rows: list[int], reward: Reward, images: Tensor, prompts: list[str]
) -> None:
    """Score a batch and put the numbers into their rows.

    Raises:
        DiffalignError: scores that are not finite, of a reward that does not skip.
    """
    with torch.no_grad():
        output = ask(reward, images, prompts)
    mean = output.mean.double().cpu().numpy()
    if not may_skip(reward) and not np.isfinite(mean).all():
        raise DiffalignError(
            f"{name} gave {int((~np.isfinite(mean)).sum())} scores that are not finite numbers, the first for "
            f"{found.files[rows[int(np.flatnonzero(~np.isfinite(mean))[0])]]}. Use --on-error skip to go on."
        )
    found.scores[name][rows] = mean
    if output.std is not None:
        column = found.stds.setdefault(name, np.full(len(found.files), np.nan))
        column[rows] = output.std.double().cpu().numpy()


def _score_sets(job: _Job, rewards: dict[str, Reward], found: FileScores) -> None:
    """All pictures at once, which a set reward needs; they must have one size.

    Raises:
        DiffalignError: pictures of different sizes.
    """
    if not rewards:
        return
    batches = list(job.batches())
    sizes = sorted({f"{images.shape[-1]}x{images.shape[-2]}" for _, images in batches})
    if len(sizes) > 1:
        raise DiffalignError(
            f"{', '.join(rewards)} judges a set of pictures of one size; got {', '.join(sizes)}"
        )
    rows = [row for part, _ in batches for row in part]
    images = torch.cat([images for _, images in batches])
    for name, reward in rewards.items():
        _enter(found, name, rows, _guarded(reward, job.on_error), images, [job.prompts[i] for i in rows])


def _guarded(reward: Reward, on_error: str) -> Reward:
    return Guarded(reward, "skip") if on_error == "skip" else reward


def _prompts(
    files: Sequence[Path], prompt: str | None, source: str | Path | None
) -> tuple[list[str], dict[Path, str]]:
    """A prompt per file (empty where there is none), and the files without one with the reason."""
    if prompt is not None and source is not None:
        raise DiffalignError("give either --prompt TEXT for all pictures, or --prompts FILE")
    if prompt is not None:
        return [prompt] * len(files), {}
    found = file_prompts(source, files) if source is not None else _beside(files)
    missing = (
        f"has no prompt: not in {source}"
        if source
        else f"has no prompt: neither a line in {SIDECAR} of its folder nor a .txt file of the same name. Give "
        "--prompt TEXT ('' for scorers that do not read it) or --prompts FILE"
    )
    faults = {file: missing for file, text in zip(files, found, strict=True) if text is None}
    return [text or "" for text in found], faults


def _beside(files: Sequence[Path]) -> list[str | None]:
    """Prompts from the sidecar of each folder, else from a text file beside the picture."""
    sidecars = {folder: _sidecar(folder / SIDECAR) for folder in {file.parent for file in files}}
    return [sidecars[file.parent].get(file.name, _text_beside(file)) for file in files]


def _text_beside(file: Path) -> str | None:
    path = file.with_suffix(".txt")
    return path.read_text(encoding="utf-8-sig").strip() if path.is_file() else None


def _sidecar(path: Path) -> dict[str, str]:
    """File name to prompt; empty when the file is not there.

    Raises:
        DiffalignError: a line is not an object with `file` and `prompt`.
    """
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            found[Path(entry["file"]).name] = str(entry["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise DiffalignError(
                f"{path}, line {number}: expected an object with file and prompt ({type(error).__name__}: {error})"
            ) from error
    return found


def _summary(values: Array) -> dict[str, float]:
    kept = values[~np.isnan(values)]
    counts = {"n": float(len(kept)), "skipped": float(len(values) - len(kept))}
    if len(kept) == 0:
        return dict.fromkeys(("mean", "std", "min", "max"), float("nan")) | counts
    spread = float(kept.std(ddof=1)) if len(kept) > 1 else 0.0
    return {
        "mean": float(kept.mean()),
        "std": spread,
        "min": float(kept.min()),
        "max": float(kept.max()),
        **counts,
    }
