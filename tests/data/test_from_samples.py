"""Pairs from samples: ranking, pairs by rule, files, and the whole command on a random model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from pair_fakes import encoded

from diffalign import cli
from diffalign.data.from_samples import (
    COLUMNS,
    Sample,
    pairs_of,
    rank_samples,
    score_samples,
    summary,
    write_samples,
)
from diffalign.data.pair_rules import Selection
from diffalign.data.sources import open_source
from diffalign.errors import DiffalignError
from diffalign.rewards import RewardOutput

LEVELS = {"a": [10, 200, 200, 90], "b": [5, 5], "c": [30], "d": [0, 20]}
"""Red level of each picture per prompt."""


def red(media, prompts):
    return RewardOutput(255 * media[:, 0].mean((1, 2)))


@pytest.fixture
def samples(tmp_path):
    found = []
    for prompt, levels in LEVELS.items():
        for i, level in enumerate(levels):
            path = tmp_path / "pictures" / f"{prompt}{i}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encoded((level, 0, 0)))
            found.append(Sample(prompt, path))
    return found


def ranked(folder, samples, scorer=red):
    log = score_samples(folder, samples, {"red": scorer}, {"rewards": ["red"]})
    return rank_samples(folder, samples, log, "red", "a model")


def test_pictures_carry_scores_groups_and_ranks(tmp_path, samples):
    pictures, unscored = ranked(tmp_path, samples)
    assert unscored == 0
    assert [p.rank for p in pictures] == [4, 1, 1, 3, 1, 1, 1, 2, 1]
    assert [p.group for p in pictures] == ["p0"] * 4 + ["p1"] * 2 + ["p2"] + ["p3"] * 2
    assert pictures[3].score == pytest.approx(90)
    assert pictures[3].scores == {"red": pytest.approx(90)}


def test_groups_without_spread_or_company_are_counted(tmp_path, samples):
    pictures, _ = ranked(tmp_path, samples)
    rows, counts = pairs_of(pictures, Selection("best_worst", min_margin=50))
    assert (counts.groups, counts.flat, counts.small, counts.without) == (4, 1, 1, 1)
    assert [(Path(r.record.image_0).name, Path(r.record.image_1).name) for r in rows] == [
        ("a1.png", "a0.png")
    ]
    assert rows[0].more["margin"] == pytest.approx(190)
    assert (rows[0].record.label_0, rows[0].more["rank_1"]) == (1.0, 4)
    facts = summary(pictures, rows, counts)
    assert facts["mean_best"] == pytest.approx((200 + 5 + 30 + 20) / 4)
    assert facts["mean_score"] == pytest.approx((125 + 5 + 30 + 10) / 4)


def test_soft_labels_are_the_sigmoid_of_the_gap(tmp_path, samples):
    pictures, _ = ranked(tmp_path, samples)
    rows, _ = pairs_of(pictures, Selection("best_worst"), temperature=20 / math.log(3))
    assert rows[-1].record.label_0 == pytest.approx(0.75)  # a gap of 20
    with pytest.raises(DiffalignError, match="temperature of the labels is 0"):
        pairs_of(pictures, Selection("best_worst"), temperature=0)


def test_random_partners_depend_on_seed_and_prompt_only(tmp_path, samples):
    pictures, _ = ranked(tmp_path, samples)
    found = [
        pairs_of(pictures, Selection("best_random"), seed=seed)[0][0].more["score_1"] for seed in range(20)
    ]
    assert len(set(found)) == 2  # levels 10 and 90
    alone = pairs_of(pictures[:4], Selection("best_random"), seed=3)[0][0]
    assert alone.more["score_1"] == found[3]


def test_pictures_without_a_score_are_left_out(tmp_path, samples):
    def shy(media, prompts):
        bright = media[:, 0].mean((1, 2)) > 0.5
        return RewardOutput(red(media, prompts).mean.masked_fill(bright, torch.nan))

    samples[0].path.write_bytes(b"broken")
    pictures, unscored = ranked(tmp_path, samples, shy)
    assert unscored == 3
    assert [p.score for p in pictures if p.prompt == "a"] == [pytest.approx(90)]
    with pytest.raises(DiffalignError, match="none of 1 pictures has a score"):
        rank_samples(tmp_path, samples[:1], score_samples(tmp_path, [], {}, {"rewards": ["red"]}), "red", "")


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_files_are_sources_and_replace_the_other_format(tmp_path, samples, format):
    pictures, _ = ranked(tmp_path, samples)
    rows, _ = pairs_of(pictures, Selection("ranked"))
    other = "parquet" if format == "jsonl" else "jsonl"
    write_samples(tmp_path, pictures, rows, other, {})
    target = write_samples(tmp_path, pictures, rows[:2], format, {"n": 2})
    found = open_source(str(target))
    assert [record.prompt for record in found] == ["a", "a"]
    assert [record.label_0 for record in found] == [1.0, 1.0]
    assert len(list(target.iterdir())) == 1
    lines = [json.loads(line) for line in (tmp_path / "pictures.jsonl").read_text().splitlines()]
    assert lines[3] == {
        "prompt": "a", "image": "pictures/a3.png", "score": pytest.approx(90), "scores": {"red": pytest.approx(90)},
        "group": "p0", "rank": 3.0, "source": "a model",
    }  # fmt: skip
    if format == "parquet":
        import pyarrow.parquet as pq

        assert set(COLUMNS) <= set(pq.read_schema(target / "train-00000.parquet").names)


def test_the_command_makes_pairs_that_train_reads(tmp_path, tiny_sdxl, capsys, monkeypatch):
    """Six pictures of a random model scored by a plain function; a second call makes none of them again."""
    monkeypatch.chdir(tmp_path)
    Path("level.py").write_text("def level(images, prompts):\n    return images.mean((1, 2, 3))\n")
    Path("prompts.txt").write_text("one\ntwo\n")
    line = [
        "data",
        "from-samples",
        str(tiny_sdxl),
        "--prompts",
        "prompts.txt",
        "--per-prompt",
        "3",
        "--steps",
        "2",
    ]
    line += ["--rewards", "level:level,saturation", "--out", "out", "--resolution", "64", "--batch-size", "4"]
    assert cli.run([*line, "--rule", "ranked"]) == 0
    assert "6 pairs" in capsys.readouterr().out
    pairs = open_source("out/pairs")
    assert len(pairs) == 6
    lines = [json.loads(text) for text in Path("out/pictures.jsonl").read_text().splitlines()]
    assert sorted(entry["rank"] for entry in lines) == [1, 1, 2, 2, 3, 3]
    assert set(lines[0]["scores"]) == {"level", "saturation"}
    assert all(lines[0]["score"] == entry["scores"]["level"] for entry in lines[:1])

    def never(*arguments, **options):
        raise AssertionError("a picture was made again")

    monkeypatch.setattr("diffalign.evaluation.pictures.generate_images", never)
    assert cli.run([*line, "--rule", "best_worst", "--format", "parquet"]) == 0
    found = open_source("out/pairs")
    assert [record.prompt for record in found] == ["one", "two"]
    best = max((entry for entry in lines if entry["prompt"] == "one"), key=lambda entry: entry["score"])
    assert found[0].image_0 == (Path("out") / best["image"]).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chosen-ranks", "one"], "expected ranks such as 1-3"),
        (["--chosen-ranks", "3-1"], "expected first <= last"),
        (["--rewards", "saturation,"], "holds an empty name"),
    ],
)
def test_bad_options_give_one_message_before_anything_is_made(tmp_path, tiny_sdxl, capsys, options, message):
    line = [
        "data",
        "from-samples",
        str(tiny_sdxl),
        "--prompts",
        "scenes:held-out",
        "--out",
        str(tmp_path / "out"),
    ]
    rewards = [] if "--rewards" in options else ["--rewards", "saturation"]
    assert cli.run([*line, *rewards, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
