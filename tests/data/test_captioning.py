"""Written captions: a source that reads back, nothing finished is lost, failures are counted and tried again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pair_fakes import encoded, records
from PIL import Image

from diffalign import cli
from diffalign.data.captioning import FIRST_FAILURES, LOG, CaptionLog, caption_records, load_captioner
from diffalign.data.captions import perturb_caption
from diffalign.data.records import PreferenceRecord, as_records
from diffalign.data.sources import open_source
from diffalign.errors import DiffalignError
from diffalign.samples.judge import judge

TWO = "a red circle and a blue star"


def red_level(image: Image.Image, prompt: str) -> str:
    """Of record i of `records` 4 i for the first picture and 4 i + 2 for the second."""
    return f"{prompt}, red {image.getpixel((0, 0))[0]}"


class Counted:
    """A captioner that notes which pictures it saw, and fails on those of one red level."""

    def __init__(self, error: BaseException | None = None, on: int = -1) -> None:
        self.seen: list[int] = []
        self.error, self.on = error, on

    def __call__(self, image: Image.Image, prompt: str) -> str:
        level = image.getpixel((0, 0))[0]
        if self.error is not None and level == self.on:
            raise self.error
        self.seen.append(level)
        return f"red {level}"


def prompts(folder):
    return [record.prompts for record in open_source(str(folder))]


def test_captions_are_written_as_a_source_that_reads_back(tmp_path):
    source = [replace(row, weight=2.0, labels={"style": 0.25}) for row in records(2, labels=(1.0, 0.25))]
    broken = PreferenceRecord("p", b"not a picture", encoded((1, 2, 3)), 1.0)
    done = caption_records(as_records([*source, broken]), red_level, tmp_path / "out")
    assert (done.pairs, done.written, done.broken, done.failed, done.changed) == (3, 2, 1, 0, 4)
    assert "cannot be decoded" in done.reason
    first, second = open_source(str(tmp_path / "out"))
    assert first.prompts == ("prompt 0, red 0", "prompt 0, red 2")
    # The second picture is the preferred one, and is written first.
    assert second.prompts == ("prompt 1, red 6", "prompt 1, red 4")
    assert (second.label_0, second.weight, dict(second.labels)) == (0.75, 2.0, {"style": 0.75})
    assert second.image_0.read_bytes() == source[1].image_1
    assert second.image_0.suffix == ".png"


def test_picture_files_stay_where_they_are(tmp_path):
    for name, level in (("a", 10), ("b", 20)):
        (tmp_path / f"{name}.png").write_bytes(encoded((level, 0, 0)))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}\n')
    caption_records(
        open_source(str(tmp_path / "pairs.jsonl")), red_level, tmp_path / "out", split="validation"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["captions", "validation.jsonl"]
    record = open_source(str(tmp_path / "out"), "validation")[0]
    assert [image.resolve() for image in record.images] == [tmp_path / "a.png", tmp_path / "b.png"]


def test_hybrid_captions_perturb_the_written_caption_of_the_rejected_picture(tmp_path):
    caption_records(as_records(records(1)), lambda image, prompt: f" {TWO}\n", tmp_path, "strong")
    assert prompts(tmp_path) == [(TWO, perturb_caption(TWO, "strong"))]


def test_stopped_work_goes_on_and_another_perturbation_asks_nobody(tmp_path):
    source = as_records(records(4))
    stopped = Counted(KeyboardInterrupt(), on=10)
    with pytest.raises(KeyboardInterrupt):
        caption_records(source, stopped, tmp_path)
    with (tmp_path / LOG).open("a") as file:
        file.write('{"key": "ab')  # a line that was cut off
    left = Counted()
    caption_records(source, left, tmp_path)
    assert (stopped.seen, left.seen) == ([0, 2, 4, 6, 8], [10, 12, 14])
    again = Counted()
    caption_records(source, again, tmp_path, "weak")
    assert again.seen == []
    # A larger part of the source, with a picture of earlier pairs: only the new one is asked for.
    more = [*records(4), PreferenceRecord("prompt 0", encoded((0, 0, 0)), encoded((99, 0, 0)), 1.0)]
    caption_records(as_records(more), again, tmp_path)
    assert again.seen == [99]
    assert prompts(tmp_path)[-1] == ("red 0", "red 99")


def test_a_picture_on_which_the_captioner_fails_leaves_its_pair_out_and_is_tried_again(tmp_path):
    source = as_records(records(3))
    done = caption_records(source, Counted(TimeoutError("busy"), on=6), tmp_path)
    assert (done.written, done.failed, done.reason) == (2, 1, "TimeoutError: busy")
    again = Counted()
    assert caption_records(source, again, tmp_path).written == 3
    assert again.seen == [6]


def test_no_text_is_a_failure(tmp_path):
    empty = lambda image, prompt: "fine" if prompt == "prompt 1" else " "  # noqa: E731
    done = caption_records(as_records(records(2)), empty, tmp_path)
    assert (done.written, done.failed) == (1, 1)
    assert "returned ' ' for 'prompt 0'" in done.reason


def test_a_captioner_that_only_fails_is_stopped_soon(tmp_path):
    calls = []

    def broken(image, prompt):
        calls.append(prompt)
        raise RuntimeError("no key")

    with pytest.raises(DiffalignError, match=f"first {FIRST_FAILURES} pictures: RuntimeError: no key"):
        caption_records(as_records(records(40)), broken, tmp_path)
    assert len(calls) == FIRST_FAILURES
    assert not (tmp_path / "train.jsonl").exists()


def test_nothing_captioned_and_messages_of_the_captioner_are_errors(tmp_path):
    unreadable = as_records([PreferenceRecord("p", b"", b"", 1.0)])
    with pytest.raises(
        DiffalignError, match=r"1 with a picture that cannot be read, 0 failed\): a picture is empty"
    ):
        caption_records(unreadable, red_level, tmp_path / "a")
    with pytest.raises(DiffalignError, match="returned None"):
        caption_records(as_records(records(1)), lambda image, prompt: None, tmp_path / "b")
    with pytest.raises(DiffalignError, match="Did you mean 'weak'"):
        caption_records(as_records(records(1)), lambda *_: pytest.fail("was asked"), tmp_path / "c", "weka")
    with pytest.raises(DiffalignError, match="start the server"):
        caption_records(
            as_records(records(1)), Counted(DiffalignError("start the server"), on=0), tmp_path / "d"
        )


def test_captions_of_another_captioner_are_not_taken_for_its_own(tmp_path):
    CaptionLog(tmp_path / LOG, "mine:one").add(b"x", "p", "c")
    assert CaptionLog(tmp_path / LOG, "mine:one").find(b"x", "p") == "c"
    assert CaptionLog(tmp_path / LOG, "mine:one").find(b"x", "q") is None
    with pytest.raises(
        DiffalignError, match=r"another captioner \(there: 'mine:one', asked for: 'mine:two'\)"
    ):
        CaptionLog(tmp_path / LOG, "mine:two")


def test_captioners_are_found_by_name_and_refused_with_a_reason():
    assert load_captioner("posixpath:basename")("a/b") == "b"
    # What is called with the argument gives the function.
    assert load_captioner("operator:itemgetter@1")({"1": "one"}) == "one"
    for path, message in (
        ("posixpath", "module:name"),
        ("no_such_module:f", "no_such_module"),
        ("posixpath:nothing", "nothing"),
        ("posixpath:sep", "expected a function"),
        ("posixpath:basename@a/b", "is a str; expected a function"),
    ):
        with pytest.raises(DiffalignError, match=message):
            load_captioner(path)


# The command


def test_the_command_captions_the_embedded_pairs_and_says_what_is_there(tmp_path, capsys):
    line = ["data", "caption", "scenes:preferences", "--limit", "8", "--out", str(tmp_path)]
    line += ["--captioner", "diffalign.samples.captioner:describe"]
    assert cli.run(line) == 0
    assert "8 pairs in" in capsys.readouterr().out
    found = open_source(str(tmp_path))
    assert len(found) == 8
    right = [
        judge(_pixels(image), text).correct
        for record in found
        for image, text in zip(record.images, record.prompts, strict=True)
    ]
    # Of two pictures with more objects than the language can tell, some are told.
    assert sum(right) >= 14
    kept = (tmp_path / LOG).read_bytes()
    assert cli.run([*line, "--perturb", "medium"]) == 0
    assert (tmp_path / LOG).read_bytes() == kept
    perturbed = open_source(str(tmp_path))
    assert all(a.prompts[0] == b.prompts[0] for a, b in zip(found, perturbed, strict=True))
    assert all(
        b.prompts[1] == perturb_caption(a.prompts[1], "medium") for a, b in zip(found, perturbed, strict=True)
    )


def test_bad_options_of_the_command_give_one_message(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wordless.py").write_text("def say(image, prompt):\n    raise KeyError('x')\n")
    line = ["data", "caption", "scenes:preferences", "--limit", "2", "--out", "out", "--captioner"]
    assert cli.run([*line, "wordless:say"]) == 2
    assert "2 failed): KeyError: 'x'" in " ".join(capsys.readouterr().err.split())
    assert cli.run([*line, "describe"]) == 2
    assert "diffalign.samples.captioner:describe" in capsys.readouterr().err
    assert cli.run([*line, "wordless:say", "--perturb", "mild"]) == 2


def _pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))
