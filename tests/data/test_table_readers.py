"""Tables with preferred and rejected pictures, and how formats are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pair_fakes import pickapic_row, write_pickapic
from reader_files import PICTURES, ranked_picture, save, save_json, save_table, save_tar

from diffalign.config import DataConfig
from diffalign.data.formats import FALLBACK
from diffalign.data.pickapic import read_pickapic
from diffalign.data.sources import FORMATS, OF_FILES, OF_FOLDERS, OF_TABLES, open_source
from diffalign.data.tables import HubTable, ParquetTable
from diffalign.data.validate import validate
from diffalign.errors import DiffalignError


def pair(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"prompt {i} 猫", "chosen": PICTURES[i], "rejected": PICTURES[i + 1]} | more


@pytest.mark.parametrize("prompt", ["prompt", "caption", "text"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("chosen", "rejected"),
        ("chosen_image", "rejected_image"),
        ("image_chosen", "image_rejected"),
        ("img_better", "img_worse"),
    ],
)
def test_chosen_and_rejected_by_their_names(tmp_path: Path, first: str, second: str, prompt: str) -> None:
    rows = [
        {
            prompt: f"p{i}",
            first: {"bytes": PICTURES[i], "path": None},
            second: {"bytes": PICTURES[i + 5], "path": "x"},
        }
        for i in range(3)
    ]
    found = open_source(str(save_table(tmp_path / "x.parquet", rows)))
    assert [(r.prompt, r.chosen, r.rejected) for r in found] == [
        (f"p{i}", PICTURES[i], PICTURES[i + 5]) for i in range(3)
    ]
    assert found.rows[0].image_0 == b""


def test_optional_columns(tmp_path: Path) -> None:
    rows = [
        pair(0, label=0.5, weight=2.0, user_id=7, rejected_prompt="other"),
        pair(1, label=None, weight=None, user_id=None, rejected_prompt=None),
        pair(2, label=0.25, weight=None, user_id=None, rejected_prompt=""),
    ]
    found = open_source(str(save_table(tmp_path / "x.parquet", rows)))
    assert found.unlabelled == 1
    assert (found[0].label_0, found[0].weight, found[0].user) == (0.5, 2.0, "7")
    assert found[0].prompts == ("prompt 0 猫", "other")
    assert (found[1].prompt_1, found[1].weight, found[1].chosen) == (None, 1.0, PICTURES[3])
    report = validate(found)
    assert (report.ties, report.usable_pairs, report.unlabelled) == (1, 1, 1)


def test_splits_and_limit_of_shards(tmp_path: Path) -> None:
    save_table(tmp_path / "data" / "train-00000.parquet", [pair(0), pair(1), pair(2)])
    save_table(tmp_path / "data" / "train-00001.parquet", [pair(3)], 1)
    save_table(tmp_path / "data" / "test-00000.parquet", [pair(7)])
    found = open_source(str(tmp_path))
    assert [r.chosen for r in found] == PICTURES[:4]
    assert [r.chosen for r in open_source(str(tmp_path), "test")] == [PICTURES[7]]
    assert len(open_source(str(tmp_path), limit=3)) == 3
    assert open_source(str(tmp_path), limit=3).identity != found.identity


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"chosen": b"x", "rejected": b"y"}], r"lacks the column\(s\) prompt; found: chosen, rejected"),
        ([{"prompt": "p", "chosen": b"x"}], r"lacks the column\(s\) rejected"),
        ([pair(0, img_better=b"x", img_worse=b"y")], "chosen/rejected and img_better/img_worse"),
        ([pair(0) | {"chosen": "a.png"}], "column chosen holds string; expected the bytes"),
        ([pair(0) | {"chosen": [{"role": "user"}]}], "column chosen holds list"),
        (
            [pair(0, label=1.0), pair(1, label=0.0), pair(2, label=3.0)],
            r"x\.parquet, row 2: the label is 3\.0",
        ),
        ([pair(0, weight=-1.0)], r"row 0: weight is -1\.0"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    path = save_table(tmp_path / "x.parquet", rows)
    with pytest.raises(DiffalignError, match=message):
        open_source(str(path), format="chosen_rejected")


def test_empty_cells_count_as_missing_pictures(tmp_path: Path) -> None:
    path = save_table(
        tmp_path / "x.parquet", [pair(0), pair(1) | {"chosen": None}, pair(2) | {"rejected": b"no"}]
    )
    report = validate(open_source(str(path)))
    assert (report.missing_images, report.broken_images, report.usable_pairs) == (1, 1, 1)


def test_pickapic_with_own_captions_weights_and_aspects(tmp_path: Path) -> None:
    more = {"caption_1": "of the second", "weight": 0.5, "labels": '{"alignment": 1, "style": null}'}
    row = pickapic_row("of the first", 0.0, PICTURES[0], PICTURES[1], **more)
    path = write_pickapic(tmp_path / "x.parquet", [row])
    (found,) = open_source(str(path))
    assert found.prompts == ("of the first", "of the second")
    assert (found.weight, found.labels) == (0.5, {"alignment": 1.0})
    write_pickapic(path, [row | {"labels": "[1]"}])
    with pytest.raises(DiffalignError, match=r"row 0: labels is '\[1\]'; expected a JSON object"):
        open_source(str(path))


# Hub data sets


@pytest.mark.parametrize("format", ["auto", "chosen_rejected"])
def test_hub_data_set_is_told_by_its_columns(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([pair(0), pair(1)]).cast_column("chosen", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    found = open_source("owner/pairs", format=format)
    assert [(r.chosen, r.rejected) for r in found] == [(PICTURES[0], PICTURES[1]), (PICTURES[1], PICTURES[2])]
    assert (
        found.identity == open_source("owner/pairs").identity != open_source("owner/pairs", limit=1).identity
    )
    with pytest.raises(DiffalignError, match=r"is a table; data\.format hpdv2 cannot be read from one"):
        open_source("owner/pairs", format="hpdv2")


def test_hub_rankings_become_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [ranked_picture("", "p1", "p", rank, (1, 1, 1)) | {"image": PICTURES[rank]} for rank in (2, 1)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows))
    assert [r.chosen for r in open_source("owner/rewards")] == [PICTURES[1]]


def test_a_table_is_read_from_the_start_each_time(tmp_path: Path) -> None:
    table = ParquetTable([save_table(tmp_path / "x.parquet", [pair(i) for i in range(5)])])
    for _ in range(2):
        assert [chunk.start for chunk in table.chunks(("prompt",))] == [0, 2, 4]
    assert table.image(3, "chosen") == PICTURES[3]


def test_both_kinds_of_table_give_the_same_records(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [pickapic_row(f"p{i}", float(i % 2), PICTURES[i], PICTURES[i + 1]) for i in range(4)]
    hub = list(read_pickapic(HubTable(datasets.Dataset.from_list(rows), "x.parquet")))
    assert hub == list(read_pickapic(ParquetTable([write_pickapic(tmp_path / "x.parquet", rows)])))


# Telling formats apart


def test_every_format_has_a_reader_and_stands_in_the_configuration() -> None:
    assert {*OF_TABLES, *OF_FILES, *OF_FOLDERS} == set(FORMATS) - {"auto"}
    allowed = DataConfig.model_fields["format"].annotation.__args__  # type: ignore[union-attr]
    assert set(FORMATS) <= set(allowed)
    assert set(FALLBACK.values()) <= set(FORMATS)


def test_unknown_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"data\.format is 'hdpv2'; expected one of: auto, pickapic"):
        open_source(str(tmp_path), format="hdpv2")


def test_columns_that_fit_two_formats_are_asked_about(tmp_path: Path) -> None:
    rows = [
        pickapic_row("p", 1.0, PICTURES[0], PICTURES[1], prompt="q", chosen=PICTURES[2], rejected=PICTURES[3])
    ]
    path = str(save_table(tmp_path / "x.parquet", rows))
    with pytest.raises(
        DiffalignError, match=r"fits the formats pickapic and chosen_rejected.*Set data\.format"
    ):
        open_source(path)
    assert open_source(path, format="pickapic")[0].chosen == PICTURES[0]
    (found,) = open_source(path, format="chosen_rejected")
    assert (found.prompt, found.chosen) == ("q", PICTURES[2])


def test_a_folder_with_two_kinds_of_data_is_asked_about(tmp_path: Path) -> None:
    save_table(tmp_path / "train-0.parquet", [pair(0)])
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}', encoding="utf-8")
    (tmp_path / "notes.jsonl").write_text('{"note": "no data"}', encoding="utf-8")
    save_json(tmp_path / "dataset_info.json", {"features": {}})
    with pytest.raises(
        DiffalignError,
        match=r"several kinds of preference data: jsonl \(pairs\.jsonl\); chosen_rejected \(train-0\.parquet\)",
    ):
        open_source(str(tmp_path))
    assert open_source(str(tmp_path), format="chosen_rejected")[0].chosen == PICTURES[0]
    (tmp_path / "pairs.jsonl").unlink()
    assert open_source(str(tmp_path))[0].chosen == PICTURES[0]


def test_archives_of_pictures_beside_json_are_no_shards(tmp_path: Path) -> None:
    save(tmp_path / "train" / "a.jpg", 1)
    save(tmp_path / "train" / "b.jpg", 2)
    save_json(
        tmp_path / "train.json",
        [{"prompt": "p", "human_preference": [0, 1], "file_path": ["a.jpg", "b.jpg"]}],
    )
    save_tar(tmp_path / "train.tar", {"train/a.jpg": PICTURES[0]})
    assert len(open_source(str(tmp_path))) == 1


def test_json_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = save_json(tmp_path / "x.json", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(
        DiffalignError, match=r"fields prompt, chosen, rejected; .*one object per line.*\.jsonl"
    ):
        open_source(str(path))
    with pytest.raises(DiffalignError, match="have the fields none"):
        open_source(str(save_json(tmp_path / "y.json", "text")))


def test_files_without_a_telling_name_are_read_by_format(tmp_path: Path) -> None:
    rows = [pickapic_row("p", 1.0, PICTURES[0], PICTURES[1])]
    path = write_pickapic(tmp_path / "pairs.dat", rows)
    assert open_source(str(path), format="pickapic")[0].chosen == PICTURES[0]
