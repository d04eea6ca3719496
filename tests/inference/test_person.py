"""A person in the terminal ranks candidates: sessions, stops at any point and going on, wrong answers, refusals."""

from __future__ import annotations

import io
import json
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from few_steps import PROMPTS, RED, folder, turbo
from PIL import Image

from diffalign import cli
from diffalign.errors import DiffalignError
from diffalign.evaluation.pictures import read_picture
from diffalign.inference.budget import Budget, Meter
from diffalign.inference.config import GenerationConfig
from diffalign.inference.person import Person
from diffalign.inference.rank_sgd import RankSGD, RankSGDConfig
from diffalign.inference.ranking import Round
from diffalign.inference.run import optimize
from diffalign.inference.search import draw
from diffalign.inference.zero_order import ZeroOrder

ONE = GenerationConfig(steps=1, guidance=0.0, batch_size=2)
model = lru_cache(turbo)


class Terminal:
    """Types given lines; what is asked for after the last one ends in `end`."""

    def __init__(self, lines, end: type[BaseException] = EOFError):
        self.lines, self.end, self.shown = list(lines), end, ""

    def read(self, prompt):
        if not self.lines:
            raise self.end
        return self.lines.pop(0)

    def show(self, text):
        self.shown += text + "\n"


class Painter:
    """Ranks by looking at the files: redder is better."""

    def __init__(self):
        self.path, self.shown, self.typed = Path(), "", []

    def show(self, text):
        self.shown += text + "\n"
        lines = text.strip().splitlines()
        if lines[0].startswith("round"):
            self.path = Path(lines[1].split(".png")[0].strip())

    def read(self, prompt):
        red = {int(file.stem): float(read_picture(file)[0].mean()) for file in self.path.iterdir()}
        self.typed.append(" ".join(str(number) for number in sorted(red, key=lambda each: -red[each])))
        return self.typed[-1]


def session(place, terminal, method="rank_sgd", rounds=4, resume=False, prompts=PROMPTS, **options):
    person = Person(place, resume=resume, read=terminal.read, show=terminal.show)
    method = {"method": method, "candidates": 4} if isinstance(method, str) else method
    budget = Budget(evaluations=4 * rounds)
    return optimize(model(), prompts, person, method=method, budget=budget, generation=ONE, **options)


def test_a_session_climbs_by_looking_at_files(tmp_path):
    painter = Painter()
    found = session(tmp_path, painter, rounds=6, held_out=[RED])
    assert len(painter.typed) == 12
    assert (found.held_out["red"]["after"] > found.held_out["red"]["before"]).all()
    assert list(found.rewards) == ["before", "after"], "no baseline: a person cannot be asked twice"
    moves = found.rewards["after"]
    assert found.rewards["before"].tolist() == [0, 0]
    assert (moves >= 1).all()
    assert (moves <= 3).all(), "only a line search moves"
    assert found.evaluations == 24
    assert found.reward == "person"
    grid = Image.open(tmp_path / "0001" / "round-002.png")
    assert grid.width > 2 * 320
    assert sorted(p.name for p in (tmp_path / "0001" / "round-002").iterdir()) == [
        f"{i}.png" for i in range(1, 5)
    ]
    assert (
        f"round 2: {PROMPTS[1]}\n  {tmp_path / '0001' / 'round-002'}.png (1 to 4, to beat: 4)"
        in painter.shown
    )


@pytest.mark.parametrize("method", ["zero_order", "best_of_n", "random_search"])
def test_other_searches_need_a_choice_only(tmp_path, method):
    painter = Painter()
    found = session(tmp_path, painter, method, held_out=[RED])
    red = found.held_out["red"]
    assert (red["after"] >= red["before"]).all()
    assert (found.rewards["after"] >= 1).any()
    # The first round holds the first picture itself, later ones show the current one beside the candidates.
    assert "(1 to 4, to beat: 1)" in painter.shown
    assert "(1 to 5, to beat: 5)" in painter.shown
    best = max(float(read_picture(p)[0].mean()) for p in tmp_path.glob("0000/*/*.png"))
    assert red["after"][0] == pytest.approx(best, abs=0.01)


LINES = ["3 1", "2", "", "4 1", "1 2 3", "3", "2 3", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Sessions of four rounds that nobody interrupts, by method: their folder and what they found."""
    places = {method: tmp_path_factory.mktemp("whole") for method in ("rank_sgd", "zero_order")}
    return {method: (place, session(place, Terminal(LINES), method)) for method, place in places.items()}


@pytest.mark.parametrize(
    ("method", "end", "answers"),
    [
        ("rank_sgd", "q", 0),
        ("rank_sgd", EOFError, 1),
        ("rank_sgd", KeyboardInterrupt, 4),
        ("rank_sgd", "q", 7),
        ("zero_order", KeyboardInterrupt, 3),
        ("zero_order", "q", 6),
    ],
)
def test_stop_and_go_on_equals_no_stop(tmp_path, whole, method, end, answers):
    """Stopped in the first round, between the prompts of a round, between rounds: nothing differs in the end."""
    first = Terminal([*LINES[:answers], "q"]) if end == "q" else Terminal(LINES[:answers], end)
    stopped = session(tmp_path, first, method)
    assert ("interrupted" if end is KeyboardInterrupt else "add --resume to go on") in stopped.stopped
    assert stopped.evaluations == 4 * (answers // 2)
    second = Terminal(LINES[answers:])
    same(session(tmp_path, second, method, resume=True), *reversed(whole[method]), tmp_path)
    assert second.lines == []


def same(found, expected, expected_place, place):
    """Whether two sessions agree to the bit."""
    assert found.stopped == expected.stopped == ""
    for name in ("noises", "first"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.media["after"], expected.media["after"])
    assert torch.equal(found.rewards["after"], expected.rewards["after"])
    assert [p.evaluations for p in found.trajectory] == [4, 8, 12, 16]
    for ours, theirs in zip(found.trajectory, expected.trajectory, strict=True):
        assert torch.equal(ours.best, theirs.best)
    for ours, theirs in zip(found.frames, expected.frames, strict=True):
        assert torch.equal(ours, theirs)
    files = [folder / "answers.jsonl" for folder in (place, expected_place)]
    assert files[0].read_text() == files[1].read_text()


def test_answers_alone_bring_a_session_back(tmp_path, whole):
    """The state is lost, or the process died before the first one was written; a line is cut in the middle."""
    session(tmp_path, Terminal(LINES[:5]))
    (tmp_path / "session-0000.safetensors").unlink()
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"prompt": 1, "rou')
    same(session(tmp_path, Terminal(LINES[5:]), resume=True), *reversed(whole["rank_sgd"]), tmp_path)


def test_a_finished_session_asks_nothing_and_takes_a_larger_budget(tmp_path, whole):
    session(tmp_path, Terminal(LINES))
    nobody = Terminal([])
    same(session(tmp_path, nobody, resume=True), *reversed(whole["rank_sgd"]), tmp_path)
    assert "8 answers are there already" in nobody.shown
    longer = session(tmp_path, Terminal(["1", "2"]), resume=True, rounds=5)
    assert longer.evaluations == 20
    assert longer.stopped == ""


def test_groups_are_sessions_of_their_own(tmp_path):
    one = ONE.model_copy(update={"batch_size": 1})
    order = [*LINES[::2], *LINES[1::2]]
    options = {"method": {"method": "rank_sgd", "candidates": 4}, "budget": Budget(evaluations=16)}

    def sit(lines, resume=False):
        terminal = Terminal(lines)
        person = Person(tmp_path, resume=resume, read=terminal.read, show=terminal.show)
        return optimize(model(), PROMPTS, person, generation=one, **options)

    cut = sit([*order[:6], "q"])
    assert len(cut.prompts) == 2
    done = sit(order[6:], resume=True)
    assert done.stopped == ""
    numbers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()[1:]]
    assert [each["prompt"] for each in numbers] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert numbers[0]["ranking"] == [3, 1]
    assert done.rewards["after"].tolist() == [1, 1]
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {
        "session-0000.safetensors",
        "session-0001.safetensors",
    }


def test_a_wrong_answer_asks_again_with_one_line(tmp_path):
    terminal = Terminal(["7", "1 1", "first", "q"])
    found = session(tmp_path, terminal, prompts=PROMPTS[:1])
    assert found.stopped.startswith("stopped by q. 0 answers are kept in")
    for typed in ("7", "1 1", "first"):
        message = (
            f"'{typed}' is no ranking; expected different numbers from 1 to 4, best first, such as: 3 1\n"
        )
        assert terminal.shown.count(message) == 1
    assert terminal.shown.count("round 1") == 1


def test_a_line_search_without_a_direction_is_not_shown(tmp_path):
    """Nobody said anything about prompt 0: its steps would all be the current picture."""
    terminal = Terminal(["", "2 1", "1", "", "", "q"])
    found = session(tmp_path, terminal, rounds=9)
    assert terminal.lines == []
    assert "round 2: two blue squares" in terminal.shown
    assert "round 2: a red circle" not in terminal.shown
    assert found.rewards["after"].tolist() == [0, 1]
    # In rounds 3 and 4 nothing is known of either direction: round 4 costs nothing and is over at once.
    assert [p.evaluations for p in found.trajectory] == [4, 8, 12, 12]
    assert "round 5: a red circle" in terminal.shown


def test_what_is_shown_of_a_search_by_scores():
    start = draw([0], 1, (4,), "start")[:, 0]
    search = ZeroOrder(start, [0])
    now = Round(search)
    assert now.names(0) == ["current", "candidate 2", "candidate 3", "candidate 4"]
    now.tell([[2, 0]])
    assert torch.equal(search.best[0][0], now.noises[0, 2])
    now = Round(search)
    assert now.names(0)[4] == "current"
    # Number 4 is the current one: 1 is above it, 3 below, and the others are below both.
    assert now.picked([[1, 4, 3]]).tolist() == [1]
    assert now.picked([[4, 1]]).tolist() == now.picked([[]]).tolist() == [-1]
    before = float(search.best[1][0])
    now.tell([[1, 4, 3]])
    assert float(search.best[1][0]) == before + 1
    now = Round(search)
    now.tell([[4, 1]])
    assert float(search.best[1][0]) == before + 1, "the current one is above all"
    now = Round(search)
    now.tell([[]])
    assert torch.equal(Round(search).best, now.best)


def test_only_line_searches_move_rank_sgd():
    start = draw([0], 1, (4,), "start")[:, 0]
    search = RankSGD(start, [0], RankSGDConfig(candidates=4))
    assert Round(search).picked([[2, 1]]).tolist() == [-1]
    Round(search).tell([[2, 1]])
    now = Round(search)
    assert now.picked([[3, 1]]).tolist() == [-1], "the last one is the current point"
    assert now.picked([[1, 3]]).tolist() == [1]
    now.tell([[1, 3]])
    assert torch.equal(search.point[0], now.noises[0, 1])


def test_a_meter_goes_on():
    meter = Meter(Budget(evaluations=10), 1)
    meter.resume(8, 5.0)
    assert (meter.evaluations, meter.seconds, meter.affordable(1)) == (8, 5.0, 2)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(
        DiffalignError, match=r"method reno needs scores, .* for a person: best_of_n, .*rank_sgd"
    ):
        session(tmp_path / "a", Terminal([]), {"method": "reno"})
    session(tmp_path / "b", Terminal(["q"]))
    with pytest.raises(DiffalignError, match=r"already holds a session. Add --resume"):
        session(tmp_path / "b", Terminal([]))
    with pytest.raises(DiffalignError, match=r"another method.candidates \(there: 4, asked for: 5\)"):
        session(tmp_path / "b", Terminal([]), {"method": "rank_sgd", "candidates": 5}, resume=True)
    with pytest.raises(DiffalignError, match=r"another prompts, seeds"):
        session(tmp_path / "b", Terminal([]), resume=True, prompts=PROMPTS[:1])
    session(tmp_path / "c", Terminal(LINES[:3]))
    (tmp_path / "c" / "session-0000.safetensors").write_bytes(b"no")
    broken = session(tmp_path / "c", Terminal([]), resume=True)
    assert "session-0000.safetensors cannot be read (SafetensorError" in broken.stopped
    assert "Remove it: the answers beside it bring the session back" in broken.stopped


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [
        "optimize",
        str(folder("sdxl-turbo")),
        "--prompt",
        "a red circle",
        "--method",
        "rank_sgd",
        "--out",
        "o",
    ]
    command += ["--labels", "person", "--held-out", "brightness", "method.candidates=4"]

    def sit(*lines, more=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return cli.run([*command, *more])

    assert sit("3 1", "2", "q") == 0
    out = capsys.readouterr().out
    assert "Type the numbers of the pictures that you like, best first" in out
    assert "stopped by q. 2 answers are kept in o/person/answers.jsonl; add --resume to go on." in out
    assert json.loads(Path("o/result.json").read_text())["prompts"][0]["reward"] == {"before": 0, "after": 1}
    assert sit() == 2
    assert "o/person already holds a session" in capsys.readouterr().err
    assert sit("1", "1", more=["--resume", "--budget", "16"]) == 0
    result = json.loads(Path("o/result.json").read_text())
    assert result["cost"]["evaluations"] == 16
    assert result["prompts"][0]["reward"]["after"] == 2
    assert set(result["summary"]) == {"person", "brightness"}
    assert sit(more=["--resume", "--budget", "20"]) == 2
    assert "nobody can be asked: the input has ended. 4 answers are kept" in capsys.readouterr().err
    assert cli.run(["optimize", "optimize/tiny_lcm", "--resume"]) == 2
    assert "give it with --labels person" in capsys.readouterr().err
