"""Relabelling: scores kept and taken up again, labels restored by the judge, the new set read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pair_fakes import encoded
from pair_world import scene_records

from diffalign import cli
from diffalign.data.pair_rules import LabelRule
from diffalign.data.records import PreferenceRecord, Records, as_records
from diffalign.data.relabel import Options, feedback, relabel, score_records, summary, write_relabelled
from diffalign.data.sources import open_source
from diffalign.data.writers import PairRow, write_jsonl, write_parquet
from diffalign.errors import DiffalignError
from diffalign.rewards import RewardOutput, load_reward

ABOUT = {"rewards": ["red"]}


def red(media, prompts):
    """The red level in [0, 1]: of pair i 4 i / 255 for the first and 4 i + 2 for the second picture."""
    return RewardOutput(media[:, 0].mean((1, 2)))


def two_heads(media, prompts):
    level = media[:, 0].mean((1, 2))
    return RewardOutput(level, parts={"member-0": 2 * level, "member_1": level, "level": level})


def plain(first, **more) -> Records:
    """Pairs of plain pictures; the second one is redder by 102 / 255 = 0.4."""
    return as_records(
        [
            PreferenceRecord(f"p{i}", encoded((51, 0, i)), encoded((153, 0, i)), y, "test", **more)
            for i, y in enumerate(first)
        ]
    )


def given(records):
    return np.array([row.label_0 for row in records.rows])


def relabelled(records, folder, rule, scorer=red, **options):
    options = Options(rule, **{"temperature": 0.4, "label_noise": 0.1, **options})
    log = score_records(records, {"red": scorer}, folder, ABOUT)
    return relabel(records, feedback(log, given(records), options), options)


def test_margins_and_chances_of_one_reward(tmp_path):
    said = relabelled(plain([1.0, 0.0]), tmp_path, LabelRule("replace")).feedback
    assert said.margin == pytest.approx([-0.4, -0.4])
    assert said.chance == pytest.approx([1 / (1 + np.e)] * 2)
    assert said.margin_std is None
    assert said.uncertainty is None


def test_members_of_a_reward_are_an_ensemble(tmp_path):
    said = relabelled(plain([1.0]), tmp_path, LabelRule("replace"), two_heads).feedback
    assert said.margin == pytest.approx([-0.6])  # of -0.8 and -0.4
    assert said.margin_std == pytest.approx([0.4 / np.sqrt(2)])
    low, high = 1 / (1 + np.exp(2)), 1 / (1 + np.e)
    assert said.chance == pytest.approx([(low + high) / 2])
    assert said.uncertainty == pytest.approx([high - low])


def test_several_rewards_are_one_ensemble_and_leave_their_own_chances(tmp_path):
    records = plain([0.0] * 9 + [1.0])
    options = Options(LabelRule("replace"), label_noise=0.0)
    half = lambda media, prompts: RewardOutput(media[:, 0].mean((1, 2)) / 2)  # noqa: E731
    log = score_records(records, {"red": red, "half": half}, tmp_path, ABOUT)
    said = feedback(log, given(records), options)
    # Each has its own temperature, so one that is half as large says the same.
    assert said.by_reward["red"] == pytest.approx(said.by_reward["half"], abs=1e-3)
    assert said.chance == pytest.approx(said.by_reward["red"], abs=1e-3)
    # Nine labels of ten agree, none counted as more certain than 11 / 12: (9 x 11 + 1) / 120 = 5 / 6 agree.
    assert said.chance[0] == pytest.approx(1 / 6, abs=1e-3)


def test_the_new_set_is_read_back_with_labels_weights_captions_and_aspects(tmp_path):
    records = plain([1.0, 0.0, 0.5], weight=2.0, prompt_1="own", user="ann", labels={"style": 1.0})
    result = relabelled(records, tmp_path, LabelRule("flip", threshold=0.7), two_heads, weights="uncertainty")
    write_relabelled(tmp_path, "train", records, result)
    found = open_source(str(tmp_path))
    assert [row.label_0 for row in found.rows] == [0.0, 0.0, 0.5]
    assert [record.images for record in found] == [record.images for record in records]
    factor = 2 * np.exp(-float(result.feedback.uncertainty[0]))
    assert [row.weight for row in found.rows] == pytest.approx([factor] * 3)
    row = found.rows[0]
    assert (row.prompt, row.prompt_1, row.user) == ("p0", "own", "ann")
    chance = pytest.approx(result.feedback.chance[0])
    assert row.labels == {"style": 1.0, "red": chance, "chance": chance}
    table = pq.read_table(tmp_path / "train-00000.parquet").to_pydict()
    assert table["label_given"] == [1.0, 0.0, 0.5]
    assert table["action"] == ["flipped", "kept", "kept"]
    assert table["margin"] == pytest.approx([-0.6] * 3)
    assert json.loads((tmp_path / "relabel.json").read_text())["actions"] == {"kept": 2, "flipped": 1}


def test_scores_are_not_made_again_and_one_batch_is_lost_at_most(tmp_path):
    records, calls = plain([1.0] * 5), []

    def counting(media, prompts):
        calls.append(len(media))
        if sum(calls) > 6:
            raise KeyboardInterrupt
        return red(media, prompts)

    with pytest.raises(KeyboardInterrupt):
        score_records(records, {"red": counting}, tmp_path, ABOUT, batch_size=2)
    with (tmp_path / "scores/scores.jsonl").open("a") as file:
        file.write('{"key": "3/0", "sco')  # a line that was cut off
    calls.clear()
    log = score_records(records, {"red": counting}, tmp_path, ABOUT, batch_size=2)
    assert calls == [2, 2]
    assert sorted(log.scores) == [f"{i}/{side}" for i in range(5) for side in (0, 1)]
    assert len((tmp_path / "scores/scores.jsonl").read_text().splitlines()) == 11


def test_scores_of_other_rewards_or_pairs_are_refused(tmp_path):
    score_records(plain([1.0]), {"red": red}, tmp_path, ABOUT)
    with pytest.raises(DiffalignError, match="another rewards"):
        score_records(plain([1.0]), {"red": red}, tmp_path, {"rewards": ["blue"]})
    with pytest.raises(DiffalignError, match="another pairs"):
        score_records(plain([1.0, 1.0]), {"red": red}, tmp_path, ABOUT)


def test_broken_pictures_leave_the_pair_out_and_skipped_ones_keep_their_label(tmp_path):
    def shy(media, prompts):
        skip = torch.tensor([prompt == "p1" for prompt in prompts])
        return RewardOutput(red(media, prompts).mean.masked_fill(skip, torch.nan))

    rows = list(plain([1.0, 1.0, 1.0]))
    records = as_records([rows[0], rows[1], rows[2].with_images((b"x", rows[2].image_1))])
    result = relabelled(records, tmp_path, LabelRule("replace"), shy)
    assert result.kept.tolist() == [True, True, False]
    assert result.labels.label[1] == 1.0
    assert result.counts() == {"flipped": 1, "unscored": 1, "left out: broken picture": 1}
    write_relabelled(tmp_path, "train", records, result)
    assert len(open_source(str(tmp_path))) == 2


def test_nothing_scored_nothing_left_and_foreign_folders_are_refused(tmp_path):
    broken = as_records([PreferenceRecord("p", b"x", b"y", 1.0)])
    with pytest.raises(
        DiffalignError, match="none of 1 pairs has scores of both pictures: cannot be decoded"
    ):
        relabelled(broken, tmp_path / "a", LabelRule("replace"))
    records = plain([1.0])
    dropped = relabelled(records, tmp_path / "b", LabelRule("drop", threshold=0.7))
    with pytest.raises(DiffalignError, match="no pair is left"):
        write_relabelled(tmp_path / "b", "train", records, dropped)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.parquet").write_bytes(b"")
    with pytest.raises(DiffalignError, match="no earlier result"):
        write_relabelled(tmp_path / "c", "train", records, dropped)


def test_a_limit_on_uncertainty_needs_one(tmp_path):
    with pytest.raises(DiffalignError, match="state no uncertainty"):
        relabelled(plain([1.0]), tmp_path, LabelRule("drop", max_uncertainty=0.5))


def test_agreement_before_and_after(tmp_path):
    result = relabelled(plain([1.0, 0.0, 0.0, 0.5]), tmp_path, LabelRule("flip", threshold=0.7))
    report = summary(result)
    assert report["agreement"] == {"right": 2.0, "pairs": 3}
    assert report["agreement_after"] == {"right": 3.0, "pairs": 3}
    assert (report["pairs"], report["written"], report["ties"]) == (4, 4, 1)


def test_the_judge_restores_flipped_labels(tmp_path):
    """Right against wrong pictures of scenes; a quarter of the labels is turned, the judge turns them back."""
    clean = scene_records(24)
    noisy = as_records(
        [
            record if i % 4 else PreferenceRecord(record.prompt, *record.images, 1 - record.label_0, "scenes")
            for i, record in enumerate(clean)
        ]
    )
    options = Options(LabelRule("flip", threshold=0.8), temperature=0.2)
    log = score_records(noisy, {"judge": load_reward("scenes-judge").score}, tmp_path, {"rewards": ["judge"]})
    result = relabel(noisy, feedback(log, given(noisy), options), options)
    assert [r.label_0 for r in clean] == result.labels.label.tolist()
    assert result.counts() == {"kept": 18, "flipped": 6}
    assert result.feedback.calibration.label_noise == pytest.approx(0.25, abs=0.06)


# The writers


def test_shards_hold_row_groups_and_replace_a_longer_set(tmp_path, monkeypatch):
    from diffalign.data import writers

    monkeypatch.setattr(writers, "ROWS_PER_GROUP", 2)
    monkeypatch.setattr(writers, "GROUPS_PER_SHARD", 2)
    rows = [PairRow(record, {"note": f"n{i}"}) for i, record in enumerate(plain([1.0] * 9))]
    assert len(write_parquet(tmp_path, "train", rows, {"note": str})) == 3
    assert [r.prompt for r in open_source(str(tmp_path))] == [f"p{i}" for i in range(9)]
    with pq.ParquetFile(tmp_path / "train-00000.parquet") as file:
        assert (file.num_row_groups, file.metadata.num_rows) == (2, 4)
    write_parquet(tmp_path, "train", rows[:4], {"note": str})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train-00000.parquet"]


def test_a_failing_write_keeps_the_earlier_set(tmp_path):
    write_parquet(tmp_path, "train", [PairRow(record) for record in plain([1.0])])
    missing = PreferenceRecord("p", Path("absent.png"), b"", 1.0)
    with pytest.raises(DiffalignError, match=r"absent\.png"):
        write_parquet(tmp_path, "train", [PairRow(missing)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train-00000.parquet"]
    assert open_source(str(tmp_path)).rows[0].prompt == "p0"


def test_jsonl_names_files_relative_to_itself_with_the_chosen_first(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(encoded((1, 2, 3)))
    record = PreferenceRecord(
        "one", tmp_path / "a.png", tmp_path / "b.png", 0.25, "me", 2.0, "other", labels={"style": 0.1}
    )
    write_jsonl(tmp_path / "pairs" / "train.jsonl", [PairRow(record)])
    row = open_source(str(tmp_path / "pairs"))[0]
    assert (row.prompts, row.label_0, row.weight) == (("other", "one"), 0.75, 2.0)
    assert row.labels == {"style": pytest.approx(0.9)}
    assert [image.resolve().name for image in row.images] == ["b.png", "a.png"]
    with pytest.raises(DiffalignError, match="write parquet instead"):
        write_jsonl(tmp_path / "x.jsonl", [PairRow(plain([1.0])[0])])


# The command


def test_the_command_relabels_the_embedded_pairs(tmp_path, capsys):
    line = ["data", "relabel", "scenes:preferences", "--limit", "12", "--rewards", "scenes-ensemble"]
    line += ["--mode", "replace", "--temperature", "1", "--label-noise", "0.1", "--out", str(tmp_path)]
    assert cli.run([*line, "--dry-run"]) == 0
    assert "no pairs written" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.parquet"))
    kept = (tmp_path / "scores/scores.jsonl").read_bytes()
    assert cli.run(line) == 0
    assert "12 pairs in" in capsys.readouterr().out
    assert (tmp_path / "scores/scores.jsonl").read_bytes() == kept
    found = open_source(str(tmp_path))
    assert len(found) == 12
    assert all(0 < row.label_0 < 1 and set(row.labels) == {"scenes-ensemble", "chance"} for row in found.rows)


SET_REWARD = """
class Spread:
    name, modality, differentiable, kind = "spread", "image", False, "set"

    def score(self, media, prompts): ...


spread = Spread()
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rewards", "set_scorers:spread"], "judges whole sets"),
        (["--rewards", "brightness", "--threshold", "0.3"], "threshold is 0.3"),
        (["--rewards", "brightness", "--temperature", "warm"], "expected fit or a number"),
        (["--rewards", "brightness", "--max-uncertainty", "0.5"], "state no uncertainty"),
    ],
)
def test_bad_options_give_one_message(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("set_scorers.py").write_text(SET_REWARD)
    line = ["data", "relabel", "scenes:preferences", "--limit", "4", "--out", str(tmp_path), *options]
    assert cli.run(line) == 2
    assert message in capsys.readouterr().err
