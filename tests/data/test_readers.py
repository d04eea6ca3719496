from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pair_fakes import data_config, encoded, pickapic_row, write_pickapic

from diffalign.data import pickapic, sources, tables
from diffalign.data.records import read_image
from diffalign.data.sources import open_held_out, open_records, open_source
from diffalign.errors import DiffalignError

IMAGES = [encoded((i, 0, 0), (8, 8), "JPEG") for i in range(10)]


def rows(first: int, count: int) -> list[dict[str, Any]]:
    return [pickapic_row(f"caption {i}", 1.0, IMAGES[i], IMAGES[-1]) for i in range(first, first + count)]


def write_jsonl(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


# Pick-a-Pic parquet


def test_parquet_gives_prompt_bytes_and_first_label(tmp_path: Path) -> None:
    labels = [1.0, 0.0, 0.5]
    path = write_pickapic(
        tmp_path / "x.parquet",
        [pickapic_row(f"p{i}", y, IMAGES[i], IMAGES[i + 3]) for i, y in enumerate(labels)],
    )
    found = open_source(str(path))
    assert [record.label_0 for record in found] == labels
    assert [record.prompt for record in found] == ["p0", "p1", "p2"]
    assert [record.image_0 for record in found] == IMAGES[:3]
    assert [record.image_1 for record in found] == IMAGES[3:6]
    assert found[-1].prompt == "p2"
    assert (found[0].user, found[0].source, found[2].is_tie) == ("7", "x.parquet", True)


def test_rows_that_nobody_judged_are_skipped_and_counted(tmp_path: Path) -> None:
    table = [
        pickapic_row("a", 1.0, IMAGES[0], IMAGES[1]),
        pickapic_row("b", 0.0, IMAGES[2], IMAGES[3], has_label=False),
        pickapic_row("c", None, IMAGES[4], IMAGES[5], has_label=True),
        pickapic_row("d", float("nan"), IMAGES[4], IMAGES[5]),
        pickapic_row("e", 0.0, IMAGES[6], IMAGES[7]),
    ]
    found = open_source(str(write_pickapic(tmp_path / "x.parquet", table)))
    assert [record.prompt for record in found] == ["a", "e"]
    assert found[1].image_0 == IMAGES[6]
    assert found.unlabelled == 3


def test_v1_without_has_label_column_is_read(tmp_path: Path) -> None:
    table = [{k: v for k, v in row.items() if k not in ("has_label", "user_id")} for row in rows(0, 2)]
    assert len(open_source(str(write_pickapic(tmp_path / "x.parquet", table)))) == 2


def test_missing_columns_are_listed_with_the_found_ones(tmp_path: Path) -> None:
    path = write_pickapic(tmp_path / "x.parquet", [{"caption": "a", "jpg_0": b"x", "score": 1.0}])
    with pytest.raises(
        DiffalignError, match=r"lacks the column\(s\) jpg_1, label_0; found: caption, jpg_0, score"
    ):
        open_source(str(path))


def test_columns_of_paths_are_refused(tmp_path: Path) -> None:
    path = write_pickapic(tmp_path / "x.parquet", [pickapic_row("a", 1.0, "a.jpg", "b.jpg")])  # type: ignore[arg-type]
    with pytest.raises(DiffalignError, match="jpg_0 holds string; expected the bytes"):
        open_source(str(path))


def test_label_outside_zero_to_one_names_file_and_row(tmp_path: Path) -> None:
    path = write_pickapic(tmp_path / "x.parquet", [*rows(0, 1), pickapic_row("b", 3.0, IMAGES[0], IMAGES[1])])
    with pytest.raises(DiffalignError, match=r"x\.parquet, row 1: the label is 3\.0"):
        open_source(str(path))


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DiffalignError, match="not a readable parquet file"):
        open_source(str(path))


def test_folder_takes_the_shards_of_the_split_in_order(tmp_path: Path) -> None:
    write_pickapic(tmp_path / "train-00001.parquet", rows(3, 2))
    write_pickapic(tmp_path / "train-00000.parquet", rows(0, 3))
    write_pickapic(tmp_path / "validation-00000.parquet", rows(6, 1))
    (tmp_path / "._train-00000.parquet").write_bytes(b"left by an archive program")
    assert [r.prompt for r in open_source(str(tmp_path))] == [f"caption {i}" for i in range(5)]
    assert [r.prompt for r in open_source(str(tmp_path), "validation")] == ["caption 6"]


def test_folder_without_split_names_takes_all(tmp_path: Path) -> None:
    write_pickapic(tmp_path / "data" / "part-b.parquet", rows(2, 2))
    write_pickapic(tmp_path / "data" / "part-a.parquet", rows(0, 2))
    assert [r.prompt for r in open_source(str(tmp_path))] == [f"caption {i}" for i in range(4)]


def test_another_split_is_never_taken_instead(tmp_path: Path) -> None:
    write_pickapic(tmp_path / "validation-00000.parquet", rows(0, 2))
    with pytest.raises(DiffalignError, match="no files of split 'train'; found: validation"):
        open_source(str(tmp_path))


def test_random_access_over_row_groups_and_files(tmp_path: Path) -> None:
    write_pickapic(tmp_path / "a.parquet", rows(0, 5), row_group_size=2)
    write_pickapic(tmp_path / "b.parquet", rows(5, 4), row_group_size=1)
    found = open_source(str(tmp_path))
    for i in (8, 0, 4, 5, 1, 8, 3):
        assert (found[i].prompt, found[i].image_0) == (f"caption {i}", IMAGES[i])
    assert [record.image_0 for record in found[2:7:2]] == [IMAGES[2], IMAGES[4], IMAGES[6]]


def test_only_the_last_row_groups_stay_in_memory(tmp_path: Path) -> None:
    table = tables.ParquetTable([write_pickapic(tmp_path / "a.parquet", rows(0, 8), row_group_size=1)])
    for record in pickapic.read_pickapic(table):
        assert record.image_0
    assert len(table._groups) == 2 * tables.CACHED_ROW_GROUPS  # two columns of pictures


def test_limit_keeps_the_first_labelled_records(tmp_path: Path) -> None:
    table = [pickapic_row("none", None, b"", b""), *rows(0, 6)]
    path = write_pickapic(tmp_path / "x.parquet", table)
    found = open_records(data_config(tmp_path, source=str(path), limit=3))
    assert [record.prompt for record in found] == ["caption 0", "caption 1", "caption 2"]


def test_held_out_source_and_split(tmp_path: Path) -> None:
    write_pickapic(tmp_path / "train-0.parquet", rows(0, 2))
    write_pickapic(tmp_path / "validation-0.parquet", rows(5, 1))
    config = data_config(tmp_path, source=str(tmp_path), held_out=str(tmp_path))
    held_out = open_held_out(config)
    assert held_out is not None
    assert [record.prompt for record in held_out] == ["caption 5"]
    assert open_held_out(data_config(tmp_path)) is None


def test_identity_follows_the_file_and_the_number_of_records(tmp_path: Path) -> None:
    path = write_pickapic(tmp_path / "x.parquet", rows(0, 4))
    first = open_source(str(path)).identity
    assert open_source(str(path)).identity == first
    assert open_source(str(path), limit=2).identity != first
    write_pickapic(path, rows(1, 4))
    assert open_source(str(path)).identity != first


def test_no_labelled_record_at_all_is_refused(tmp_path: Path) -> None:
    path = write_pickapic(tmp_path / "x.parquet", [pickapic_row("a", None, b"", b"")] * 3)
    with pytest.raises(DiffalignError, match=r"no labelled pair \(3 unlabelled"):
        open_source(str(path))


# Hub data sets


def test_hub_data_set_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    table = [pickapic_row("a", 0.0, IMAGES[0], IMAGES[1]), pickapic_row("b", None, b"", b""), *rows(3, 1)]
    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list(table)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = open_source("owner/pairs", "validation")
    assert asked == [("owner/pairs", "validation")]
    assert [(r.prompt, r.label_0, r.image_0) for r in found] == [
        ("a", 0.0, IMAGES[0]),
        ("caption 3", 1.0, IMAGES[3]),
    ]
    assert found.unlabelled == 1
    assert found.identity is not None


def test_hub_images_column_is_not_decoded() -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(rows(0, 2))
    for name in ("jpg_0", "jpg_1"):
        dataset = dataset.cast_column(name, datasets.Image())
    found = pickapic.read_pickapic(tables.HubTable(dataset, "d"))
    assert found[1].image_0 == IMAGES[1]


def test_a_name_that_is_neither_path_nor_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(name: str, split: str) -> Any:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DiffalignError, match=r"cannot load 'owner/pairs'.*offline.*no local file"):
        open_source("owner/pairs")


# Paths


@pytest.mark.parametrize("source", ["nowhere", "folder/pairs.parquet", "a/b/c"])
def test_missing_source_says_what_to_set(source: str) -> None:
    with pytest.raises(DiffalignError, match=r"no such file or folder.*Set data\.source"):
        open_source(source)


def test_folder_without_data_and_file_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"holds no \*\.json or \*\.jsonl or \*\.parquet or \*\.tar"):
        open_source(str(tmp_path))
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DiffalignError, match=r"ends in \.csv; expected \.json, \.jsonl, \.parquet"):
        open_source(str(tmp_path / "x.csv"))


def test_shipped_data_set_is_found_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "package_files", lambda package: tmp_path)
    write_pickapic(tmp_path / "preferences" / "train-00000.parquet", rows(0, 2))
    write_pickapic(tmp_path / "preferences" / "validation-00000.parquet", rows(4, 1))
    config = data_config(tmp_path, source="scenes:preferences", held_out="scenes:preferences")
    held_out = open_held_out(config)
    assert held_out is not None
    assert (len(open_records(config)), len(held_out)) == (2, 1)
    with pytest.raises(DiffalignError, match="known: scenes:preferences"):
        open_source("scenes:preference")


def test_unknown_shipped_data_set_is_named() -> None:
    with pytest.raises(DiffalignError, match="no data set 'scenes:nothing' is shipped"):
        open_source("scenes:nothing")


# JSONL


def test_jsonl_resolves_paths_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(IMAGES[0])
    (tmp_path / "images" / "b.jpg").write_bytes(IMAGES[1])
    line = {"prompt": "p", "chosen": "images/a.jpg", "rejected": "images/b.jpg"}
    found = open_source(str(write_jsonl(tmp_path / "pairs.jsonl", [line])))
    assert found[0].label_0 == 1.0
    assert read_image(found[0].chosen) == IMAGES[0]
    assert read_image(found[0].rejected) == IMAGES[1]


def test_jsonl_optional_fields(tmp_path: Path) -> None:
    base = {"chosen": "a.jpg", "rejected": "b.jpg"}
    lines = [
        {"prompt": "p", "label": 0.8, "weight": 2, "user": "u", "source": "s", **base},
        {"chosen_prompt": "of a", "rejected_prompt": "of b", **base},
        {"prompt": "p", "rejected_prompt": "of b", **base},
        {"prompt": "p", "label": None, **base},
    ]
    found = open_source(str(write_jsonl(tmp_path / "x.jsonl", lines)))
    assert (found[0].label_0, found[0].weight, found[0].user, found[0].source) == (0.8, 2.0, "u", "s")
    assert found[1].prompts == ("of a", "of b")
    assert found[2].prompts == ("p", "of b")
    assert (len(found), found.unlabelled) == (3, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "line 2 lacks rejected; found: prompt, chosen"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "wieght": 1},
            "unknown field 'wieght'.*Did you mean 'weight'",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "rejected is 3; expected text"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "label": 2}, "the label is 2"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": -1}, "weight is -1"),
    ],
)
def test_bad_jsonl_lines_name_file_line_and_fault(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = write_jsonl(tmp_path / "x.jsonl", [good, line])
    with pytest.raises(DiffalignError, match=message):
        open_source(str(path))


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('\n{"prompt": ', encoding="utf-8")
    with pytest.raises(DiffalignError, match="line 2 is not JSON"):
        open_source(str(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DiffalignError, match="not UTF-8"):
        open_source(str(tmp_path / "x.jsonl"))


def test_format_overrides_the_file_name(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.txt", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert len(open_source(str(path), format="jsonl")) == 1
