"""Scores of pictures, written as they come: an interrupted scoring goes on where it stopped.

`scores.jsonl` begins with a line that says what was scored by what; then there is one line per picture with its key,
and per reward mean, std and members, or the reason why the picture cannot be read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffalign.data.images import MAX_PIXELS, BrokenImage, decode
from diffalign.data.keys import Progress
from diffalign.data.lines import append_lines, open_log
from diffalign.data.records import ImageSource

FORMAT = "diffalign-scores"
MEMBER = re.compile(r"member[-_]\d+")
"""Names of those parts of a reward that are members of its ensemble."""


class Output(Protocol):
    """What a scorer says about a batch; a `RewardOutput` is one."""

    @property
    def mean(self) -> Tensor:
        """Scores `[B]`."""

    @property
    def std(self) -> Tensor | None:
        """The scorer's own uncertainty `[B]`."""

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """Named components `[B]`."""


Scorer = Callable[[Tensor, Sequence[str]], Output]
"""Scores pictures `[B, 3, H, W]` in [0, 1] for B prompts."""


@dataclass(frozen=True)
class Score:
    """One reward's score of one picture.

    Fields:
        mean: None where the scorer left the picture out. std: its own uncertainty, None without one.
        members: the scores of its ensemble, empty when it has none.
    """

    mean: float | None
    std: float | None = None
    members: tuple[float, ...] = ()


@dataclass(frozen=True)
class Item:
    """A picture to score: a key that is its own, the encoded file, and its prompt."""

    key: str
    image: ImageSource
    prompt: str


class ScoreLog:
    """The file of scores, held in memory as well.

    Fields:
        scores: key to reward to score. broken: key to why the picture cannot be read.

    Args:
        path: `scores.jsonl`. about: what is scored by what, as plain values; those of an earlier file must agree.

    Raises:
        DiffalignError: the file holds scores of something else, or is none of scores.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.scores: dict[str, dict[str, Score]] = {}
        self.broken: dict[str, str] = {}
        open_log(path, {"format": FORMAT, "version": 1, **about}, "scores", self._take)

    def __contains__(self, key: str) -> bool:
        return key in self.scores or key in self.broken

    def add(self, scores: Mapping[str, dict[str, Score]], broken: Mapping[str, str]) -> None:
        """Append a batch.

        Raises:
            DiffalignError: the disk is full or not writable.
        """
        lines = [
            {"key": key, "scores": {n: asdict(s) for n, s in found.items()}} for key, found in scores.items()
        ]
        lines += [{"key": key, "broken": reason} for key, reason in broken.items()]
        append_lines(self.path, lines)
        self.scores.update(scores)
        self.broken.update(broken)

    def _take(self, line: dict[str, Any]) -> None:
        if "broken" in line:
            self.broken[line["key"]] = line["broken"]
            return
        self.scores[line["key"]] = {
            name: Score(one["mean"], one["std"], tuple(one["members"]))
            for name, one in line["scores"].items()
        }


def score_items(
    items: Iterable[Item],
    total: int,
    scorers: Mapping[str, Scorer],
    log: ScoreLog,
    *,
    batch_size: int = 16,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
) -> None:
    """Score what the log does not hold; at most one batch is lost when it is interrupted.

    Args:
        items: pictures, read only when they are scored. total: how many there are, for the progress.
        scorers: by name. batch_size: pictures decoded and scored at once.
    """
    done = len(log.scores) + len(log.broken)
    left = (item for item in items if item.key not in log)
    if progress is not None:
        progress("scoring", done, total)
    while batch := list(islice(left, batch_size)):
        pictures, broken = _decoded(batch, max_pixels)
        log.add(score_pictures(pictures, scorers), broken)
        done += len(batch)
        if progress is not None:
            progress("scoring", done, total)


def score_pictures(
    pictures: Sequence[tuple[Item, Tensor]], scorers: Mapping[str, Scorer]
) -> dict[str, dict[str, Score]]:
    """Scores by key and reward of pictures `[3, H, W]`; those of one size are scored together."""
    sizes: dict[torch.Size, list[int]] = {}
    for i, (_, picture) in enumerate(pictures):
        sizes.setdefault(picture.shape, []).append(i)
    found: dict[str, dict[str, Score]] = {item.key: {} for item, _ in pictures}
    for rows in sizes.values():
        media = torch.stack([pictures[i][1] for i in rows])
        prompts = [pictures[i][0].prompt for i in rows]
        for name, scorer in scorers.items():
            with torch.no_grad():
                scores = _scores(scorer(media, prompts))
            for i, score in zip(rows, scores, strict=True):
                found[pictures[i][0].key][name] = score
    return found


def _scores(output: Output) -> Iterator[Score]:
    """A score per picture of a batch."""
    mean = output.mean.double().tolist()
    std = [None] * len(mean) if output.std is None else output.std.double().tolist()
    parts = [part.double().tolist() for name, part in output.parts.items() if MEMBER.fullmatch(name)]
    for i, value in enumerate(mean):
        members = tuple(part[i] for part in parts)
        if math.isfinite(value) and all(map(math.isfinite, members)):
            yield Score(value, _finite(std[i]), members)
        else:
            yield Score(None)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _decoded(batch: Sequence[Item], max_pixels: int) -> tuple[list[tuple[Item, Tensor]], dict[str, str]]:
    """Pictures `[3, H, W]` in [0, 1], and why the others cannot be read."""
    good: list[tuple[Item, Tensor]] = []
    broken: dict[str, str] = {}
    for item in batch:
        try:
            pixels = torch.from_numpy(np.array(decode(item.image, max_pixels)))
        except BrokenImage as error:
            broken[item.key] = str(error)
            continue
        good.append((item, pixels.permute(2, 0, 1).float() / 255))
    return good, broken
