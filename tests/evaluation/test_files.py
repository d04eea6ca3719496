"""Scoring picture files: prompts, broken files, failing scorers, what is written."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import Brightness, Lit
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.evaluation.catalogue import catalogue
from diffalign.evaluation.files import file_prompts, picture_files, score_files, write_scores
from diffalign.rewards import REWARDS, RewardOutput


class Seen(Lit):
    """Remembers its prompts and the sizes of its batches; 1 for every picture."""

    name = "seen"

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        self.prompts += prompts
        self.shapes.append(tuple(media.shape))
        return RewardOutput(torch.ones(len(media)))


class AlwaysNaN(Lit):
    name = "nan"

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        return RewardOutput(torch.full((len(media),), torch.nan))


class OfSets(Lit):
    """The number of pictures in the set."""

    name = "count"
    kind = "set"

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        return RewardOutput(torch.full((len(media),), float(len(media))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures with levels 0, 51 and 255; the first two in a sidecar, the third beside a text file."""
    for name, level, size in (("a.png", 0, 8), ("b.png", 51, 8), ("c.jpg", 255, 16)):
        Image.new("RGB", (size, size), (level,) * 3).save(tmp_path / name)
    lines = [{"file": "b.png", "prompt": "second"}, {"file": "a.png", "prompt": "first", "seed": 1}]
    (tmp_path / "pictures.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "c.txt").write_text("third\n")
    return tmp_path


def test_scores_of_a_folder(folder: Path) -> None:
    found = score_files([folder], [Brightness(), Lit()])
    assert [p.name for p in found.files] == ["a.png", "b.png", "c.jpg"]
    assert found.prompts == ["first", "second", "third"]
    assert found.scores["brightness"] == pytest.approx([0.0, 0.2, 1.0])
    assert found.stds["brightness"] == pytest.approx([0.25] * 3)
    summary = found.summary()["brightness"]
    assert summary == pytest.approx(
        {"mean": 0.4, "std": np.std([0, 0.2, 1], ddof=1), "min": 0, "max": 1, "n": 3, "skipped": 0}
    )
    assert found.summary()["lit"]["mean"] == pytest.approx(1 / 3)


def test_pictures_of_one_size_are_scored_together(folder: Path) -> None:
    seen = Seen()
    score_files([folder], [seen], batch_size=8)
    assert seen.shapes == [(2, 3, 8, 8), (1, 3, 16, 16)]
    seen = Seen()
    score_files([folder], [seen], batch_size=1)
    assert len(seen.shapes) == 3


def test_prompt_options(folder: Path) -> None:
    seen = Seen()
    score_files([folder / "c.jpg"], [seen], prompt="for all")
    assert seen.prompts == ["for all"]
    (folder / "list.txt").write_text("x\ny\nz\n")
    assert score_files([folder], [Seen()], prompts=folder / "list.txt").prompts == ["x", "y", "z"]
    assert file_prompts(folder / "pictures.jsonl", picture_files([folder])) == ["first", "second", None]


def test_broken_picture_is_an_error_or_a_counted_skip(folder: Path) -> None:
    (folder / "b.png").write_bytes(b"\x89PNG nonsense")
    with pytest.raises(DiffalignError, match=r"b.png cannot be decoded.*--on-error skip"):
        score_files([folder], [Brightness()])
    found = score_files([folder], [Brightness()], on_error="skip")
    assert np.isnan(found.scores["brightness"]).tolist() == [False, True, False]
    assert found.summary()["brightness"]["skipped"] == 1
    assert "cannot be decoded" in found.faults[folder / "b.png"]


def test_decompression_bomb_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffalign.evaluation.files.decode.__defaults__", (100,))
    with pytest.raises(DiffalignError, match=r"c.jpg .*pixels"):
        score_files([folder], [Brightness()])


def test_missing_prompt_is_an_error_or_a_counted_skip(folder: Path) -> None:
    (folder / "c.txt").unlink()
    with pytest.raises(DiffalignError, match=r"c.jpg has no prompt.*--prompt TEXT"):
        score_files([folder], [Brightness()])
    found = score_files([folder], [Brightness()], on_error="skip")
    assert list(found.faults) == [folder / "c.jpg"]
    assert found.summary()["brightness"]["n"] == 2


def test_scorer_without_finite_scores(folder: Path) -> None:
    with pytest.raises(
        DiffalignError, match=r"nan gave 2 scores that are not finite numbers, the first for .*a.png"
    ):
        score_files([folder], [AlwaysNaN()])
    found = score_files([folder], [AlwaysNaN(), Lit()], on_error="skip")
    assert found.summary()["nan"]["skipped"] == 3
    assert found.summary()["lit"]["n"] == 3
    with pytest.raises(DiffalignError, match="none of 3 pictures could be scored"):
        score_files([folder], [AlwaysNaN()], on_error="skip")


def test_set_rewards_see_all_pictures_at_once(folder: Path) -> None:
    found = score_files([folder / "a.png", folder / "b.png"], [OfSets(), Lit()], batch_size=1)
    assert found.scores["count"].tolist() == [2.0, 2.0]
    with pytest.raises(DiffalignError, match="pictures of one size; got 16x16, 8x8"):
        score_files([folder], [OfSets()])


def test_csv_and_jsonl(folder: Path, tmp_path: Path) -> None:
    (folder / "b.png").write_bytes(b"")
    found = score_files([folder], [Brightness()], on_error="skip")
    write_scores(found, tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "prompt", "brightness", "brightness_std", "error"]
    assert (rows[1]["brightness"], rows[1]["error"]) == ("", "is empty: no bytes")
    assert float(rows[2]["brightness"]) == 1.0
    write_scores(found, tmp_path / "s.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert lines[1]["brightness"] is None
    assert lines[0] == {
        "file": str(folder / "a.png"), "prompt": "first", "brightness": 0.0, "brightness_std": 0.25, "error": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        (["none"], {}, "no file or folder 'none'"),
        (["empty"], {}, "no pictures there"),
        (["a.png"], {"prompt": "x", "prompts": "y"}, "give either --prompt TEXT"),
        (["a.png"], {"prompts": "absent.txt"}, "no prompt file 'absent.txt'"),
        (["a.png"], {"prompts": "c.txt", "rewards": []}, "no reward to score by"),
        (["a.png", "b.png"], {"prompts": "c.txt"}, "1 lines for 2 pictures"),
        (["a.png"], {"prompts": "bad.jsonl"}, "bad.jsonl, line 1: expected an object"),
    ],
)
def test_bad_requests(
    folder: Path, paths: list, options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    (folder / "bad.jsonl").write_text('{"file": "a.png"}\n')
    rewards = options.pop("rewards", [Lit()])
    with pytest.raises(DiffalignError, match=message):
        score_files(paths, rewards, **options)


def test_catalogue_describes_every_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "broken", "no.such.module:Thing")
    entries = {entry.name: entry for entry in catalogue()}
    assert set(entries) == set(REWARDS)
    assert "No module named" in entries["broken"].problem
    assert entries["saturation"].facts.scale.startswith("mean HSV saturation")
    assert entries["uwo"].kind == "wrapper"
    assert entries["scenes-judge"].as_json()["differentiable"] is False
    assert [e.name for e in entries.values() if e.problem] == ["broken"]
    assert all(entry.summary for entry in entries.values() if not entry.problem)
