"""A person judges triplets for QDHF: what is shown, what answers mean, stops and going on."""

from __future__ import annotations

import io
import json

import pytest
import torch
from few_steps import PROMPTS, RED, turbo

from diffalign.data.labelling import PersonLabeller
from diffalign.evaluation.pictures import read_picture
from diffalign.inference.budget import Budget, Meter
from diffalign.inference.config import GenerationConfig
from diffalign.inference.diversity import judged_by
from diffalign.inference.generation import Generation
from diffalign.inference.objective import Objective
from diffalign.inference.problem import Problem
from diffalign.inference.qdhf import QDHF, WORDS, QDHFConfig
from diffalign.inference.run import optimize
from diffalign.inference.trace import begun
from diffalign.rewards.encoders import PixelEncoder

ONE = GenerationConfig(steps=1, guidance=0.0, batch_size=16)
SMALL = {"encoder": "pixels:2", "initial": 12, "grid": 4, "refits": [0, 0.5], "sheet": 0}


def ran(labeller=None, **options):
    generation = Generation(turbo(), PROMPTS, steps=1, guidance=0.0, batch_size=16)
    start = generation.start([1, 2])
    problem = Problem(generation, Objective(RED), Meter(Budget(evaluations=32), 2), start, [1, 2])
    trace = begun(problem.meter, start, torch.zeros(2), torch.zeros(2, 3, 64, 64), 0)
    QDHF(QDHFConfig(**SMALL, **options), labeller).run(problem, trace)
    return problem, trace


class Like:
    """Answers as the proxy would that sees mean colours."""

    def __init__(self):
        self.asked = []

    def judge(self, comparisons):
        self.asked += comparisons
        return [0.0 if self._second_nearer(each) else 1.0 for each in comparisons]

    def _second_nearer(self, question):
        width = question.first.shape[-1] // 2
        assert torch.equal(question.first[..., :width], question.second[..., :width]), "the reference"
        three = [question.first[..., :width], question.first[..., width:], question.second[..., width:]]
        return bool(judged_by(PixelEncoder(1).embed(torch.stack(three))[None])[0])


def test_somebody_who_judges_like_the_proxy_gets_its_axes():
    like = Like()
    problem, by_hand = ran(like, judgements=20)
    _, by_proxy = ran(proxy="pixels:1", judgements=20)
    assert len(like.asked) == 2 * 2 * 20, "two prompts, two refits"
    assert problem.meter.evaluations == 32, "drawing them again is not counted"
    for name in ("agreement", "coverage", "qd_score"):
        torch.testing.assert_close(by_hand.notes[name], by_proxy.notes[name], atol=1e-4, rtol=0)
    assert {each.prompt for each in like.asked} == set(PROMPTS)


class Undecided:
    """Sees no difference, or skips."""

    def judge(self, comparisons):
        return [0.5 if number % 2 else None for number, _ in enumerate(comparisons)]


def test_no_answer_teaches_nothing():
    _, undecided = ran(Undecided(), judgements=6)
    _, unasked = ran(judgements=0)
    assert undecided.notes["agreement"].isnan().all()
    assert torch.equal(undecided.notes["coverage"], unasked.notes["coverage"])


class Terminal:
    """Types given lines, then asks to stop; remembers what was shown."""

    def __init__(self, lines):
        self.lines, self.shown = list(lines), ""

    def read(self, prompt):
        assert prompt == "more alike? "
        return self.lines.pop(0) if self.lines else "q"

    def show(self, text):
        self.shown += text + "\n"


def person(place, lines):
    terminal = Terminal(lines)
    return PersonLabeller(place, terminal.read, terminal.show, WORDS), terminal


def test_a_stopped_session_goes_on(tmp_path):
    """Eight answers in two sittings give what eight in one give, and none is asked for twice."""
    lines = ["1", "2", "x", "1", "s", "2", "1", "=", "2"]
    whole, terminal = person(tmp_path / "whole", lines)
    _, expected = ran(whole, judgements=2)
    assert "2 of 2 triplets to judge. Each sheet shows the same picture on the left." in terminal.shown
    assert "'x' is no answer" in terminal.shown
    first, _ = person(tmp_path / "parts", lines[:6])
    with pytest.raises(
        Exception, match=r"stopped. 5 answers are kept in .*the same run with the same folder"
    ):
        ran(first, judgements=2)
    second, terminal = person(tmp_path / "parts", lines[6:])
    _, found = ran(second, judgements=2)
    assert terminal.lines == []
    for name in ("agreement", "coverage", "qd_score"):
        assert torch.equal(found.notes[name].nan_to_num(-1), expected.notes[name].nan_to_num(-1))
    answers = (tmp_path / "parts" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 8
    sheet = tmp_path / "parts" / f"{json.loads(answers[0])['key']}-1.png"
    assert read_picture(sheet).shape[-1] == 2 * read_picture(sheet).shape[-2]


def test_without_a_terminal_the_run_ends_with_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    method = {"method": "qd", **SMALL, "judgements": 3, "person": str(tmp_path / "judged")}
    found = optimize(
        turbo(), PROMPTS, RED, method=method, generation=ONE, budget=Budget(evaluations=32), baseline="none"
    )
    assert "method.person is set, but nobody can be asked" in found.stopped
    assert (found.rewards["after"] >= found.rewards["before"]).all()
