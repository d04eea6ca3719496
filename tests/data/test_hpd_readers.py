"""HPDv2, HPDv3 and ImageRewardDB, in the schemas of their cards and loaders; and rankings as pairs."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pair_fakes import data_config
from reader_files import PICTURES, ranked_picture, save, save_json, save_table

from diffalign.data.rankings import rank_label, ranking_pairs, vote_share
from diffalign.data.records import read_image
from diffalign.data.sources import open_records, open_source
from diffalign.data.validate import validate
from diffalign.errors import DiffalignError

UNICODE = "eine Katze 猫 🐈"

# Rankings


def test_pairs_of_a_ranking_worked_out_by_hand() -> None:
    ranks = [2, 1, None, 4]
    assert ranking_pairs(ranks, "all") == [(0, 1), (0, 3), (1, 3)]
    assert ranking_pairs(ranks, "best_worst") == [(1, 3)]
    assert ranking_pairs(ranks, "adjacent") == [(1, 0), (0, 3)]
    assert ranking_pairs([1], "all") == ranking_pairs([None, 1], "best_worst") == []


@given(st.lists(st.integers(0, 4), min_size=2, max_size=7))
def test_the_best_and_the_worst_are_extreme_and_neighbours_never_go_up(ranks: list[int]) -> None:
    ((best, worst),) = ranking_pairs(ranks, "best_worst")
    assert (ranks[best], ranks[worst]) == (min(ranks), max(ranks))
    steps = ranking_pairs(ranks, "adjacent")
    assert all(ranks[i] <= ranks[j] for i, j in steps)
    assert len(steps) == len(ranks) - 1
    assert ranking_pairs(ranks, "all") == list(combinations(range(len(ranks)), 2))


def test_smaller_ranks_win_and_equal_ones_tie() -> None:
    assert (rank_label(1, 2), rank_label(2, 1), rank_label(3, 3)) == (1.0, 0.0, 0.5)
    assert vote_share([[1, 2], [1, 2], [2, 1], [1, 1]], 0, 1) == 0.625


# HPDv2


def hpdv2(folder: Path) -> Path:
    """The unpacked data set: `train.json`, `test.json` and pictures in folders named like them."""
    train = [
        {"human_preference": [1, 0], "prompt": UNICODE, "file_path": ["0.jpg", "1.jpg"]},
        {"human_preference": [0, 1], "prompt": "b", "file_path": ["2.jpg", "3.jpg"]},
        {"human_preference": [1, 1], "prompt": "c", "file_path": ["4.jpg", "5.jpg"]},
        {"human_preference": None, "prompt": "d", "file_path": ["4.jpg", "5.jpg"]},
    ]
    votes = [{"rank": [2, 1, 3], "user_hash": "x"}, {"rank": [1, 2, 3], "user_hash": "y"}]
    test = [
        {
            "prompt": "t",
            "image_path": ["a.jpg", "b.jpg", "c.jpg"],
            "rank": [2, 1, 3],
            "raw_annotations": votes,
        }
    ]
    for i in range(6):
        save(folder / "train" / f"{i}.jpg", i)
    for i, name in enumerate("abc"):
        save(folder / "test" / f"{name}.jpg", 6 + i)
    save_json(folder / "train.json", train)
    save_json(folder / "test.json", test)
    return folder


def test_hpdv2_training_pairs(tmp_path: Path) -> None:
    found = open_source(str(hpdv2(tmp_path)))
    assert [(r.prompt, r.label_0) for r in found.rows] == [(UNICODE, 1.0), ("b", 0.0), ("c", 0.5)]
    assert found.unlabelled == 1
    assert read_image(found[1].chosen) == PICTURES[3]
    assert read_image(found[1].rejected) == PICTURES[2]
    assert found.rows[0].image_0 == b""


def test_hpdv2_test_rankings(tmp_path: Path) -> None:
    folder = str(hpdv2(tmp_path))
    found = open_source(folder, "test")
    assert [r.label_0 for r in found] == [0.0, 1.0, 1.0]
    assert [read_image(r.chosen) for r in found] == [PICTURES[7], PICTURES[6], PICTURES[7]]
    assert [r.label_0 for r in open_source(folder, "test", votes="share")] == [0.5, 1.0, 1.0]
    (only,) = open_source(folder, "test", pairs="best_worst")
    assert (read_image(only.chosen), read_image(only.rejected)) == (PICTURES[7], PICTURES[8])


def test_hpdv2_validates_with_ties_and_missing_pictures(tmp_path: Path) -> None:
    (hpdv2(tmp_path) / "train" / "3.jpg").unlink()
    report = validate(open_source(str(tmp_path)))
    assert (report.records, report.unlabelled, report.ties, report.missing_images) == (3, 1, 1, 1)
    assert report.usable_pairs == 1


def test_pictures_are_found_where_the_file_names_them_or_by_their_last_part(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.jpg", 1)
    save(tmp_path / "images" / "b.jpg", 2)
    pair = {"human_preference": [1, 0], "prompt": "p", "file_path": ["x/y/a.jpg", "x/y/b.jpg"]}
    path = save_json(tmp_path / "pairs.json", [pair])
    assert read_image(open_source(str(path))[0].image_1) == PICTURES[2]
    save(tmp_path / "x" / "y" / "a.jpg", 3)
    save(tmp_path / "x" / "y" / "b.jpg", 4)
    assert read_image(open_source(str(path))[0].image_1) == PICTURES[4]


def test_identity_follows_pictures_pairs_and_limit(tmp_path: Path) -> None:
    folder = str(hpdv2(tmp_path))
    first = open_source(folder, "test").identity
    assert open_source(folder, "test").identity == first
    assert open_source(folder, "test", pairs="adjacent").identity != first
    assert open_source(folder, "test", limit=1).identity != first
    save(tmp_path / "test" / "b.jpg", 11).touch()
    (tmp_path / "test" / "b.jpg").write_bytes(PICTURES[1] + b"longer")
    assert open_source(folder, "test").identity != first


def test_limit_counts_pairs(tmp_path: Path) -> None:
    config = data_config(tmp_path, source=str(hpdv2(tmp_path)), split="test", limit=2, pairs="adjacent")
    assert len(open_records(config)) == 2


GOOD = {"human_preference": [1, 0], "prompt": "p", "file_path": ["a", "b"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_path": ["../../etc/a.png", "b"]}, r"record 2: the path '\.\./\.\./etc/a\.png' leads out"),
        ({"file_path": ["/etc/a.png", "b"]}, "leads out of the data set's folder"),
        ({"file_path": ["C:\\a.png", "b"]}, "leads out"),
        ({"file_path": ["a", 3]}, "path is 3; expected text"),
        ({"file_path": ["a"]}, "expected a list of two or more paths"),
        ({"file_path": ["a", "b", "c"]}, "human_preference with 3 pictures; expected two"),
        ({"prompt": None}, "prompt is None; expected text"),
        ({"human_preference": [1]}, "expected a list of 2 numbers"),
        ({"human_preference": ["1", 0]}, "human_preference is '1'; expected a number"),
        ({"human_preference": [-1, 0]}, r"expected \[1, 0\] or \[0, 1\]"),
    ],
)
def test_bad_hpdv2_records_name_their_place(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = save_json(tmp_path / "x.json", [GOOD, GOOD | change])
    with pytest.raises(DiffalignError, match=message):
        open_source(str(path), format="hpdv2")


@pytest.mark.parametrize("lost", ["prompt", "file_path", "human_preference"])
def test_missing_hpdv2_fields_are_named(tmp_path: Path, lost: str) -> None:
    path = save_json(tmp_path / "x.json", [{k: v for k, v in GOOD.items() if k != lost}])
    with pytest.raises(DiffalignError, match=rf"lacks .*{lost}.*; found: "):
        open_source(str(path), format="hpdv2")


def test_empty_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="no labelled pair"):
        open_source(str(save_json(tmp_path / "x.json", [])), format="hpdv2")
    (tmp_path / "x.json").write_text('[{"prompt": "a", ', encoding="utf-8")
    with pytest.raises(DiffalignError, match="is not JSON in UTF-8"):
        open_source(str(tmp_path / "x.json"), format="hpdv2")
    with pytest.raises(DiffalignError, match="record 1 is a int; expected an object"):
        open_source(str(save_json(tmp_path / "x.json", [3])), format="hpdv2")


# HPDv3


def hpdv3(folder: Path) -> Path:
    """Preferred picture first; a second line without votes, as the card has them for some sources."""
    rows = [
        {"path1": "images/a.jpg", "path2": "images/b.jpg", "choice_dist": [3, 9], "confidence": 0.98},
        {"path1": "images/c.jpg", "path2": "images/a.jpg", "choice_dist": None, "confidence": "null"},
    ]
    more = {"prompt": UNICODE, "model1": "flux", "model2": "sdxl"}
    for i, name in enumerate("abc"):
        save(folder / "images" / f"{name}.jpg", i)
    return save_json(folder / "train.json", [row | more for row in rows])


def test_hpdv3_first_path_is_preferred(tmp_path: Path) -> None:
    found = open_source(str(hpdv3(tmp_path).parent))
    assert [(r.prompt, r.label_0, r.weight) for r in found] == [(UNICODE, 1.0, 1.0)] * 2
    assert [read_image(r.chosen) for r in found] == [PICTURES[0], PICTURES[2]]


def test_hpdv3_votes_as_label_or_weight(tmp_path: Path) -> None:
    path = str(hpdv3(tmp_path))
    assert [(r.label_0, r.weight) for r in open_source(path, votes="share")] == [(0.75, 1.0), (1.0, 1.0)]
    assert [(r.label_0, r.weight) for r in open_source(path, votes="confidence")] == [(1.0, 0.98), (1.0, 1.0)]


def test_hpdv3_as_lines_and_bad_values(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "p", "path1": "a", "path2": "b", "confidence": -2}\n', encoding="utf-8")
    assert len(open_source(str(path))) == 1
    with pytest.raises(DiffalignError, match=r"line 1, confidence: weight is -2"):
        open_source(str(path), votes="confidence")
    path.write_text('{"prompt": "p", "path1": "a", "path2": "../b"}\n', encoding="utf-8")
    with pytest.raises(DiffalignError, match="leads out"):
        open_source(str(path))
    path.write_text('{"prompt": "p", "path1": "a"}\n', encoding="utf-8")
    with pytest.raises(DiffalignError, match="line 1 lacks path2; found: prompt, path1"):
        open_source(str(path), format="hpdv3")


# ImageRewardDB


def ranked_rows() -> list[dict[str, Any]]:
    """Two prompts in turn; the pictures 0 and 2 of the first one tie."""
    folder = "images/train/train_1"
    return [
        ranked_picture(f"{folder}/0.webp", "p1", UNICODE, 2, (4, 3, 4)),
        ranked_picture(f"{folder}/1.webp", "p1", UNICODE, 1, (6, 6, 2)),
        ranked_picture(f"{folder}/2.webp", "p1", UNICODE, 2, (4, 4, 4)),
        ranked_picture(f"{folder}/3.webp", "p2", "alone", 1, (7, 7, 7)),
    ]


def test_image_reward_metadata_and_pictures(tmp_path: Path) -> None:
    save_table(tmp_path / "metadata-train.parquet", ranked_rows())
    save_table(tmp_path / "metadata-test.parquet", ranked_rows()[:2])
    for i in range(4):
        save(tmp_path / "images" / "train" / "train_1" / f"{i}.webp", i)
    found = open_source(str(tmp_path))
    assert [(r.prompt, r.label_0) for r in found] == [(UNICODE, 0.0), (UNICODE, 0.5), (UNICODE, 1.0)]
    assert read_image(found[0].chosen) == PICTURES[1]
    assert found[0].labels == {"overall_rating": 0.0, "alignment": 0.0, "fidelity": 1.0}
    assert found[1].labels == {"overall_rating": 0.5, "alignment": 0.0, "fidelity": 0.5}
    assert found.notes == ("prompts with fewer than two ranked pictures: 1",)
    assert validate(found).notes == list(found.notes)
    assert len(open_source(str(tmp_path), "test")) == 1
    with pytest.raises(DiffalignError, match="no files of split 'validation'; found: test, train"):
        open_source(str(tmp_path), "validation")


def test_image_reward_notes_are_said_when_training_data_are_opened(tmp_path: Path) -> None:
    save_table(tmp_path / "metadata-train.parquet", ranked_rows())
    with pytest.warns(UserWarning, match="left out prompts with fewer than two ranked pictures: 1"):
        open_records(data_config(tmp_path, source=str(tmp_path)))


def test_image_reward_part_beside_its_pictures(tmp_path: Path) -> None:
    path = save_json(tmp_path / "train_1.json", ranked_rows())
    for i in range(4):
        save(tmp_path / f"{i}.webp", i)
    found = open_source(str(path), pairs="best_worst")
    assert [(read_image(r.chosen), read_image(r.rejected)) for r in found] == [(PICTURES[1], PICTURES[2])]


def test_image_reward_table_that_holds_the_pictures(tmp_path: Path) -> None:
    rows = [
        {k: v for k, v in row.items() if k != "image_path"} | {"image": {"bytes": PICTURES[i], "path": None}}
        for i, row in enumerate(ranked_rows())
    ]
    rows[2]["rank"] = None
    found = open_source(str(save_table(tmp_path / "x.parquet", rows, 1)))
    assert [(r.image_0, r.image_1, r.label_0) for r in found] == [(PICTURES[0], PICTURES[1], 0.0)]
    assert found.unlabelled == 1
    del rows[0]["image"]
    with pytest.raises(DiffalignError, match=r"lacks the column\(s\) image_path"):
        open_source(str(save_table(tmp_path / "y.parquet", [{"prompt": "p"}])), format="imagereward_db")


def test_image_reward_rankings_of_the_repository(tmp_path: Path) -> None:
    item = {"id": "1", "prompt": "p", "generations": ["part/a.webp", "part/b.webp"], "ranking": [5, 2]}
    path = save_json(tmp_path / "test.json", [item])
    for i, name in enumerate("ab"):
        save(tmp_path / "test_images" / "part" / f"{name}.webp", i)
    assert read_image(open_source(str(path))[0].chosen) == PICTURES[1]
    with pytest.raises(DiffalignError, match="record 1: expected lists of equal length"):
        open_source(str(save_json(path, [item | {"ranking": [1]}])))
    with pytest.raises(DiffalignError, match="leads out"):
        open_source(str(save_json(path, [item | {"generations": ["a", "/b"]}])))


def test_image_reward_records_without_rank(tmp_path: Path) -> None:
    row = {"image_path": "a.webp", "prompt_id": "1", "prompt": "p"}
    with pytest.raises(DiffalignError, match=r"record 1 lacks rank; found: image_path, prompt_id, prompt"):
        open_source(str(save_json(tmp_path / "x.json", [row])), format="imagereward_db")
