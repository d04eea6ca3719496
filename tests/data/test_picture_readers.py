"""Readers of single pictures: lines, tables, two folders; what a source is taken for; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pair_fakes import data_config, encoded, pickapic_row, write_pickapic

from diffalign.data.picture_sources import find_pictures, open_pictures, source_kinds
from diffalign.data.pictures import (
    PictureRecord,
    as_pictures,
    read_good_bad,
    read_picture_lines,
    read_picture_table,
    write_pictures,
)
from diffalign.data.tables import ParquetTable
from diffalign.errors import DiffalignError

RED, BLUE = encoded((255, 0, 0)), encoded((0, 0, 255))
EVERYTHING = ("pairs", "judgements", "pictures", "groups")
PICTURES_ONLY = ("pictures", "groups")


def write_lines(folder: Path, *lines: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (("a.png", RED), ("b.png", BLUE)):
        (folder / name).write_bytes(data)
    path = folder / "pictures.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def line(**more: Any) -> dict[str, Any]:
    return {"image": "a.png", "prompt": "a cat", "score": 0.5} | more


def test_lines_keep_all_that_is_known_and_read_images_lazily(tmp_path: Path) -> None:
    full = line(label=0.25, scores={"judge": -2}, group=7, rank=1.5, weight=2, source="base")
    path = write_lines(
        tmp_path, full, "", line(image="b.png", score=None, label=None), line(image="b.png", score=-3)
    )
    found = read_picture_lines(path)
    assert (len(found), found.unlabelled) == (2, 1)
    assert found[0] == PictureRecord(
        "a cat", tmp_path / "a.png", 0.25, 0.5, {"judge": -2.0}, "7", 1.5, 2.0, "base"
    )
    assert (found[1].score, found[1].label, found[1].source) == (-3.0, None, "pictures.jsonl")
    assert [row.group_name for row in found.rows] == ["7", "a cat"]
    assert found.rows[0].image == b""
    assert len(read_picture_lines(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (line(scroe=1), r"line 1: unknown field 'scroe'.*score"),
        ({"prompt": "p", "score": 1}, "image is missing; expected text"),
        (line(prompt=3), "prompt is 3; expected text"),
        (line(label=1.5), "label is 1.5; expected a number from 0 to 1"),
        (line(rank=0), "rank is 0; expected a number from 1"),
        (line(score="good"), "score is 'good'; expected a number"),
        (line(score=True), "score is True; expected a number"),
        (line(scores={"judge": None}), "scores of judge is None; expected a number"),
        (line(scores=[1]), "scores is"),
        (line(weight=-1), "weight is -1"),
        (line(group=1.5), "group is 1.5; expected text or a whole number"),
        ("[1]", "is a list; expected an object"),
        ("{", "is not JSON"),
        ('{"image": "a.png", "prompt": "p", "score": NaN}', "score is nan"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, bad: Any, expected: str) -> None:
    with pytest.raises(DiffalignError, match=expected):
        read_picture_lines(write_lines(tmp_path, bad))


def test_written_pictures_are_read_back(tmp_path: Path) -> None:
    write_lines(tmp_path)
    records = [
        PictureRecord("a cat", tmp_path / "a.png", score=0.5, scores={"judge": 0.5}, group="p1", source="m"),
        PictureRecord("ein Fuß", tmp_path / "b.png", label=0.0, rank=2, weight=0.5, source="m"),
    ]
    path = write_pictures(tmp_path, records)
    assert list(read_picture_lines(path)) == records
    assert json.loads(path.read_text().splitlines()[1]) == {
        "image": "b.png", "prompt": "ein Fuß", "label": 0.0, "rank": 2, "weight": 0.5, "source": "m",
    }  # fmt: skip
    with pytest.raises(DiffalignError, match="not a file inside"):
        write_pictures(tmp_path / "other", records)


def test_tables_of_pictures(tmp_path: Path) -> None:
    rows = [
        {"image": RED, "caption": "one", "score": 1.0, "rank": 1, "prompt_id": "x", "other": 3},
        {"image": BLUE, "caption": "one", "score": None, "rank": None, "prompt_id": "x", "other": 3},
        {"image": BLUE, "caption": "two", "score": float("nan"), "rank": 2, "prompt_id": "y", "other": 3},
    ]
    found = read_picture_table(ParquetTable([write_pickapic(tmp_path / "p.parquet", rows)]))
    assert (len(found), found.unlabelled) == (2, 1)
    assert [(r.prompt, r.score, r.rank, r.group, r.image) for r in found] == [
        ("one", 1.0, 1.0, "x", RED),
        ("two", None, 2.0, "y", BLUE),
    ]


def test_good_and_bad_folders(tmp_path: Path) -> None:
    for name, data in (("good/1", RED), ("bad/1", BLUE), ("bad/deep/2", BLUE)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(data)
        (tmp_path / f"{name}.txt").write_text(f"caption of {name}\n")
    found = read_good_bad(tmp_path)
    assert [(r.prompt, r.label, r.image) for r in found] == [
        ("caption of good/1", 1.0, tmp_path / "good/1.png"),
        ("caption of bad/1", 0.0, tmp_path / "bad/1.png"),
        ("caption of bad/deep/2", 0.0, tmp_path / "bad/deep/2.png"),
    ]
    (tmp_path / "bad/1.txt").unlink()
    with pytest.raises(DiffalignError, match=r"1\.png has no caption.*1\.txt"):
        read_good_bad(tmp_path)


def test_the_identity_follows_pictures_and_captions(tmp_path: Path) -> None:
    path = write_lines(tmp_path, line())
    before = read_picture_lines(path).identity
    assert read_picture_lines(path).identity == before
    (tmp_path / "a.png").write_bytes(BLUE + b"\0")
    assert read_picture_lines(path).identity != before


def test_what_can_be_made_of_a_source(tmp_path: Path) -> None:
    def kinds(source: Path, **options: Any) -> tuple[str, ...]:
        return source_kinds(data_config(tmp_path, source=str(source), **options))

    lines = write_lines(tmp_path / "lines", line())
    assert kinds(lines) == kinds(lines.parent) == kinds(lines, format="pictures") == PICTURES_ONLY
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "p", "chosen": "a.png", "rejected": "b.png"}\n')
    assert kinds(pairs) == EVERYTHING
    scored = write_pickapic(tmp_path / "t/train-0.parquet", [{"image": RED, "prompt": "p", "label": 1.0}])
    assert kinds(scored) == kinds(scored.parent) == PICTURES_ONLY
    assert kinds(write_pickapic(tmp_path / "pick.parquet", [pickapic_row("p", 1.0, RED, BLUE)])) == EVERYTHING
    # ImageRewardDB: pairs of a ranking, or the ranking itself.
    ranked = [{"image": RED, "prompt": "p", "prompt_id": "1", "rank": 1}]
    both = write_pickapic(tmp_path / "ranked.parquet", ranked)
    assert kinds(both) == EVERYTHING
    assert kinds(both, format="pictures") == PICTURES_ONLY
    assert source_kinds(data_config(tmp_path, source="scenes:preferences")) == EVERYTHING
    assert source_kinds(data_config(tmp_path, source="owner/name")) == EVERYTHING


def test_other_splits_and_other_data_are_refused(tmp_path: Path) -> None:
    write_pickapic(tmp_path / "t/validation-0.parquet", [{"image": RED, "prompt": "p", "label": 1.0}])
    with pytest.raises(DiffalignError, match="no files of split 'train'; found: validation"):
        find_pictures(data_config(tmp_path, source=str(tmp_path / "t")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffalignError, match=r"no single pictures at .*pictures\.jsonl"):
        find_pictures(data_config(tmp_path, source=str(tmp_path / "empty"), format="pictures"))
    nothing = write_lines(tmp_path / "x", line(score=None))
    with pytest.raises(DiffalignError, match="holds no judged picture"):
        open_pictures(data_config(tmp_path, source=str(nothing)))


def test_any_sequence_can_be_viewed_as_lazy_records() -> None:
    records = as_pictures([PictureRecord("p", RED, label=1.0)])
    assert records.rows[0].image == b""
    assert records[0].image == RED
    assert as_pictures(records) is records
