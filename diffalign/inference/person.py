"""A person in the terminal who ranks pictures, in place of a reward.

Each round a prompt's candidates are written as one picture with numbers, and as single ones, to a folder; the person
types numbers, best first. Every answer is appended to `answers.jsonl` as it is given and the exact state of the search
is stored after every round, so that a session that was stopped in any way goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.data.labelling import Stopped, write_png
from diffalign.data.lines import append_lines, open_log
from diffalign.errors import DiffalignError
from diffalign.evaluation.grids import image_grid
from diffalign.evaluation.pictures import read_picture
from diffalign.inference.problem import Problem
from diffalign.inference.rank_sgd import read_ranking
from diffalign.inference.ranking import Question
from diffalign.inference.search import NoiseSearch
from diffalign.inference.session_file import SessionFile
from diffalign.inference.trace import Trace
from diffalign.rewards import RewardOutput

ANSWERS = "answers.jsonl"
FORMAT = "diffalign rankings 1"
HELP = (
    "Type the numbers of the pictures that you like, best first, such as: 3 1. The others are below them. "
    "Empty: no preference; q: stop."
)
CELL, COLUMNS = 320, 4


class Person:
    """Ranks candidates in the terminal; stands where a reward stands in `optimize`.

    As a reward it gives the first picture 0; a prompt's score is then how often a picture was preferred to the one
    before.

    Args:
        folder: of answers, states and pictures. resume: whether to go on with a session that is there.
        read: asks for a line with a prompt. show: prints.
    """

    name = "person"
    modality: Literal["image", "audio"] = "image"
    differentiable = False
    kind: Literal["sample", "set"] = "sample"

    def __init__(
        self,
        folder: Path,
        *,
        resume: bool = False,
        read: Callable[[str], str] = input,
        show: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.resume, self.quit = folder, resume, False
        self._read, self._show = read, show
        self._answers: dict[tuple[int, int], list[int]] = {}
        self._groups: list[int] = []
        self._file = SessionFile(folder)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """0 for every picture `[B, 3, H, W]`: nothing was preferred to anything yet."""
        return RewardOutput(torch.zeros(len(media)))

    def open(self, facts: Mapping[str, Any]) -> None:
        """Begin or go on, before anything is drawn.

        Args:
            facts: plain values that decide on what is shown: model, prompts, method and the like.

        Raises:
            DiffalignError: there is a session and `resume` is off, or it is of something else.
        """
        path = self.folder / ANSWERS
        if path.is_file() and not self.resume:
            raise DiffalignError(
                f"{self.folder} already holds a session. Add --resume to go on with it, or choose another folder with "
                "--out."
            )
        self._answers, self._groups = {}, []
        open_log(path, {"format": FORMAT, **facts}, "rankings", self._take)
        kept = f"{len(self._answers)} answers are there already. " if self._answers else ""
        self._show(f"{kept}Pictures to rank are written to {self.folder}. {HELP}")

    def restore(self, search: NoiseSearch, problem: Problem, trace: Trace) -> None:
        """Bring the next group of prompts to where an earlier session left it."""
        self._groups.append(len(problem))
        self._file = SessionFile(self.folder / f"session-{self._number(0):04d}.safetensors")
        found = self._file.load(search)
        if found is None:
            return
        self._file.retrace(trace, problem.meter, self._pictures_after(trace.media))
        trace.noises, trace.media = found

    def rank(self, question: Question) -> list[int]:
        """The person's ranking, or the one that was given before.

        Raises:
            Stopped: the person typed q, or there is no terminal.
        """
        key = (self._number(question.row), question.round)
        if key not in self._answers:
            self._exhibit(question)
            ranking = self._line(len(question.names))
            line = {"prompt": key[0], "round": key[1], "ranking": [number + 1 for number in ranking]}
            append_lines(self.folder / ANSWERS, [line])
            self._answers[key] = ranking
        return self._answers[key]

    def keep(self, search: NoiseSearch, problem: Problem, trace: Trace, picked: Tensor) -> None:
        """Store where the group is after a round."""
        self._file.save(search, trace, picked)

    def _number(self, row: int) -> int:
        """Place of a prompt of the group at hand among all prompts."""
        return sum(self._groups[:-1]) + row

    def _take(self, line: dict[str, Any]) -> None:
        ranking = [int(number) - 1 for number in line["ranking"]]
        self._answers[int(line["prompt"]), int(line["round"])] = ranking

    def _place(self, number: int, round_: int) -> Path:
        """Folder of the single pictures; the one with all of them has its name with `.png`."""
        return self.folder / f"{number:04d}" / f"round-{round_ + 1:03d}"

    def _exhibit(self, question: Question) -> None:
        """Draw and write the pictures, and say where they are."""
        place = self._place(self._number(question.row), question.round)
        media, count = question.draw(), len(question.names)
        for number, picture in enumerate(media, 1):
            write_png(picture, place / f"{number}.png")
        labels = [f"{number}: {name}" for number, name in enumerate(question.names, 1)]
        columns = min(COLUMNS, -(-count // 2)) if count > 3 else count
        image_grid(media, columns, labels, cell=CELL).save(f"{place}.png")
        to_beat = "" if question.current is None else f", to beat: {question.current + 1}"
        self._show(f"\nround {question.round + 1}: {question.prompt}\n  {place}.png (1 to {count}{to_beat})")

    def _line(self, count: int) -> list[int]:
        """What was typed, asked for until it can be understood."""
        while True:
            try:
                typed = self._read("best first? ").strip()
            except EOFError as error:
                raise Stopped(
                    f"a person is to rank, but nobody can be asked: the input has ended. {self._progress()}"
                ) from error
            if typed.lower() == "q":
                self.quit = True
                raise Stopped(f"stopped by q. {self._progress()}")
            try:
                return read_ranking(typed, count)
            except DiffalignError as error:
                self._show(str(error))

    def _progress(self) -> str:
        return f"{len(self._answers)} answers are kept in {self.folder / ANSWERS}; add --resume to go on."

    def _pictures_after(self, first: Tensor) -> list[Tensor]:
        """Current pictures `[B, 3, H, W]` after each stored round, read from the files that were shown.

        One that was removed is left out, so that the animation shows the one before it longer.
        """
        now, found = first.clone(), []
        for round_, picked in enumerate(self._file.picked):
            for row, number in enumerate(picked.tolist()):
                path = self._place(self._number(row), round_) / f"{number + 1}.png"
                if number >= 0 and path.is_file():
                    now[row] = read_picture(path)
            found.append(now.clone())
        return found
