"""Who says which of two pictures is better: a rule in your code, or a person in the terminal.

A person is shown two picture files and types 1, 2, = (a tie), s (skip) or q (stop). Answers are appended to a JSONL
file as they are given, so a session that was stopped goes on with the first question that has none.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffalign.data.lines import cut_unfinished, whole_lines
from diffalign.errors import DiffalignError
from diffalign.randomness import derive_seed

ANSWERS = "answers.jsonl"
# Sides of the grey thumbnail that tells whether an answer was given on these pictures, and how far it may be off: a
# picture drawn again on another machine differs a little, another sample of the same prompt much more.
THUMBNAIL, TOLERANCE = 8, 12
KEYS = {"1": 1.0, "2": 0.0, "=": 0.5, "s": None}


@dataclass(frozen=True)
class Words:
    """What a person is asked.

    Fields:
        question: before an answer. help: what may be typed. what: things to judge. unasked: what to do where nobody
            can be asked. again: how to go on after a stop.
    """

    question: str = "better? "
    help: str = "1: the first is better, 2: the second is, =: they are alike, s: skip, q: stop"
    what: str = "pairs"
    unasked: str = (
        "trainer.labels is person, but nobody can be asked: the input has ended. Run in a terminal, or set "
        "trainer.labels to reward."
    )
    again: str = "resume the run to go on"


@dataclass(frozen=True)
class Comparison:
    """Two pictures of one prompt.

    Fields:
        key: its own in the run, with `/` as in a path. first, second: `[3, H, W]` in [0, 1].
    """

    key: str
    prompt: str
    first: Tensor
    second: Tensor


class Labeller(Protocol):
    """Judges pairs of pictures."""

    def judge(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        """Probability that `first` is better, 0.5 for a tie; None where nobody can tell."""
        ...


class Stopped(DiffalignError):
    """A person ended the session."""


class RuleLabeller:
    """A function `f(prompt, first [3, H, W], second [3, H, W])` as the judge.

    It returns the probability that the first picture is better (True and False will do), or None.
    """

    def __init__(self, function: Callable[[str, Tensor, Tensor], Any], name: str) -> None:
        self.function, self.name = function, name

    def judge(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        """What the function says of each.

        Raises:
            DiffalignError: it returned something else than None or a number in [0, 1].
        """
        return [self._one(each) for each in comparisons]

    def _one(self, comparison: Comparison) -> float | None:
        found = self.function(comparison.prompt, comparison.first, comparison.second)
        if found is None:
            return None
        try:
            value = float(found)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value <= 1:
            raise DiffalignError(
                f"rule {self.name} returned {found!r} for {comparison.prompt!r}; expected the probability in [0, 1] "
                "that the first picture is better, or None."
            )
        return value


class AnswerLog:
    """Answers of a person, in memory and as lines of a file.

    Raises:
        DiffalignError: the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self._read()

    def __len__(self) -> int:
        return len(self._lines)

    def find(self, comparison: Comparison) -> tuple[bool, float | None]:
        """Whether these pictures were judged, and the answer."""
        line = self._lines.get(comparison.key)
        if line is None or line["prompt"] != comparison.prompt:
            return False, None
        shown = (line["first"], line["second"])
        now = (thumbnail(comparison.first), thumbnail(comparison.second))
        same = all(likeness(old, new) <= TOLERANCE for old, new in zip(shown, now, strict=True))
        return same, line["answer"] if same else None

    def add(self, comparison: Comparison, answer: float | None) -> None:
        """Append an answer, and wait until it is on the disk.

        Raises:
            DiffalignError: the file cannot be written.
        """
        line = {
            "key": comparison.key,
            "prompt": comparison.prompt,
            "answer": answer,
            "first": thumbnail(comparison.first),
            "second": thumbnail(comparison.second),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DiffalignError(
                f"cannot write {self.path}: {error}. Free some space and resume: earlier answers are kept."
            ) from error
        self._lines[comparison.key] = line

    def _read(self) -> None:
        """Take the lines of an earlier session, and cut off a last one that was not finished."""
        for number, text in enumerate(whole_lines(self.path), 1):
            try:
                line = json.loads(text)
                likeness(line["first"], line["second"])
                self._lines[line["key"]] = {**line, "prompt": line["prompt"], "answer": line["answer"]}
            except (ValueError, KeyError, TypeError) as error:
                raise DiffalignError(
                    f"{self.path}, line {number} is not an answer ({type(error).__name__}: {error}). Remove the line, "
                    "or the file to judge everything again."
                ) from error
        cut_unfinished(self.path)


class PersonLabeller:
    """Asks a person in the terminal. Which picture is called 1 is decided by chance, once per comparison.

    Args:
        folder: where `answers.jsonl` and the pictures are written. read: asks for a line with a prompt. show: prints.
        words: what is asked.
    """

    def __init__(
        self,
        folder: Path,
        read: Callable[[str], str] = input,
        show: Callable[[str], None] = print,
        words: Words | None = None,
    ) -> None:
        self.folder, self._read, self._show, self.words = folder, read, show, words or Words()
        self.log = AnswerLog(folder / ANSWERS)

    def judge(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        """Answers to all; those in the file are not asked for again.

        Raises:
            Stopped: the person typed q, or there is no terminal.
        """
        left = sum(not self.log.find(each)[0] for each in comparisons)
        if left:
            self._show(f"\n{left} of {len(comparisons)} {self.words.what} to judge. {self.words.help}")
        found: list[float | None] = []
        for number, each in enumerate(comparisons, 1):
            known, answer = self.log.find(each)
            if not known:
                answer = self._ask(each, f"[{number}/{len(comparisons)}]")
                self.log.add(each, answer)
            found.append(answer)
        return found

    def _ask(self, comparison: Comparison, place: str) -> float | None:
        """One answer, about `first` whichever side it was shown on."""
        swapped = bool(derive_seed("shown first", comparison.key) % 2)
        sides = [comparison.first, comparison.second]
        paths = [self.folder / f"{comparison.key}-{side}.png" for side in (1, 2)]
        for picture, path in zip(reversed(sides) if swapped else sides, paths, strict=True):
            write_png(picture, path)
        self._show(f"{place} {comparison.prompt}\n  1: {paths[0]}\n  2: {paths[1]}")
        answer = self._line()
        return None if answer is None else 1 - answer if swapped else answer

    def _line(self) -> float | None:
        """What was typed, asked for until it can be understood."""
        while True:
            try:
                typed = self._read(self.words.question).strip().lower()
            except EOFError as error:
                raise Stopped(f"{self.words.unasked} {self._progress()}") from error
            if typed in KEYS:
                return KEYS[typed]
            if typed == "q":
                raise Stopped(f"labelling was stopped. {self._progress()}")
            self._show(f"{typed!r} is no answer. {self.words.help}")

    def _progress(self) -> str:
        return f"{len(self.log)} answers are kept in {self.log.path}; {self.words.again}."


def open_labeller(labels: str, folder: Path) -> Labeller | None:
    """The judge that `trainer.labels` names; None for `reward`, which needs none.

    Args:
        labels: `reward`, `person` or `rule:module:function`. folder: of a person's answers.

    Raises:
        DiffalignError: the rule cannot be imported, or `answers.jsonl` is broken.
    """
    if labels == "reward":
        return None
    if labels == "person":
        return PersonLabeller(folder)
    name = labels.removeprefix("rule:")
    return RuleLabeller(imported(name), name)


def check_labels(labels: str) -> str:
    """The value of `trainer.labels`, if it can be one.

    Raises:
        ValueError: it cannot.
    """
    module, _, function = labels.removeprefix("rule:").partition(":")
    if labels not in ("reward", "person") and not (labels.startswith("rule:") and module and function):
        raise ValueError("should be reward, person or rule:module:function")
    return labels


def imported(name: str) -> Callable[..., Any]:
    """The function `module:function`; modules of the working directory are found, too.

    Raises:
        DiffalignError: no such module or function.
    """
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise DiffalignError(
            f"trainer.labels is rule:{name}, but {error}; expected rule:module:function of an importable module."
        ) from error
    if not callable(found):
        raise DiffalignError(
            f"trainer.labels is rule:{name}, a {type(found).__name__}; expected a function f(prompt, first, second)."
        )
    return found  # type: ignore[no-any-return]


def write_png(picture: Tensor, path: Path) -> None:
    """Store `[3, H, W]` in [0, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path, format="PNG")


def thumbnail(picture: Tensor) -> str:
    """A grey 8 x 8 version of `[3, H, W]` in [0, 1], as hexadecimal digits."""
    grey = picture.detach().float().clamp(0, 1).mean(0, keepdim=True)
    small = F.adaptive_avg_pool2d(grey, THUMBNAIL)
    return bytes((small * 255).round().to(torch.uint8).flatten().tolist()).hex()


def likeness(first: str, second: str) -> int:
    """Largest difference of two thumbnails, in 255ths.

    Raises:
        ValueError: one is no thumbnail.
    """
    a, b = bytes.fromhex(first), bytes.fromhex(second)
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
