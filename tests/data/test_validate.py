from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pair_fakes import encoded, records
from rich.console import Console

from diffalign.data.records import PreferenceRecord, Records, as_records
from diffalign.data.validate import ValidationReport, validate


def text(report: ValidationReport) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    return console.export_text()


def test_clean_data_is_clean() -> None:
    report = validate(records(4))
    assert (report.records, report.usable_pairs, report.prompts) == (4, 4, 2)
    assert report.usable
    assert report.clean
    assert report.sizes == {"16x16": 8}


def test_ties_and_unlabelled_are_counted() -> None:
    source = as_records(records(6, (1.0, 0.5, 0.0)))
    report = validate(replace(source, unlabelled=9))
    assert (report.ties, report.unlabelled, report.usable_pairs) == (2, 9, 4)


def test_all_ties_are_not_usable() -> None:
    report = validate(records(3, (0.5,)))
    assert not report.usable
    assert "nothing to train on" in text(report)


def test_broken_and_missing_images_are_told_apart_and_listed_up_to_a_limit(tmp_path: Path) -> None:
    source = records(6)
    source[1] = replace(source[1], image_0=b"junk", image_1=b"junk")
    source[3] = replace(source[3], image_1=tmp_path / "gone.png")
    report = validate(source, listed=2)
    assert (report.broken_images, report.missing_images, report.unusable) == (2, 1, 2)
    assert report.usable_pairs == 4
    assert [(fault["record"], fault["image"]) for fault in report.faults] == [(1, 0), (1, 1)]
    assert not report.clean
    assert "1 images" in text(report)
    assert validate(source).faults[2]["source"].endswith("gone.png")


def test_size_mismatch_within_pairs() -> None:
    pair = PreferenceRecord("p", encoded((1, 1, 1), (16, 8)), encoded((2, 2, 2), (8, 16)), 1.0)
    report = validate([pair, *records(2)])
    assert report.size_mismatches == 1
    assert report.sizes == {"16x16": 4, "16x8": 1, "8x16": 1}


def test_duplicates_in_either_order_and_contradictions() -> None:
    first = records(1)[0]
    turned = replace(first, image_0=first.image_1, image_1=first.image_0)
    agreeing = replace(turned, label_0=0.0)
    tied = replace(first, label_0=0.5)
    other_prompt = replace(first, prompt="else")
    report = validate([first, agreeing, turned, tied, other_prompt])
    assert report.duplicates == 3
    assert report.contradictions == 1


def test_prompts_shared_with_held_out_ignore_case_and_spaces() -> None:
    train = [
        replace(record, prompt=name)
        for record, name in zip(records(3), ("A red  cube", "b", "c"), strict=True)
    ]
    held = [
        replace(record, prompt=name)
        for record, name in zip(records(3), ("a red cube ", "d", "c"), strict=True)
    ]
    report = validate(train, held)
    assert (report.held_out, report.overlap) == (3, 2)
    assert report.overlapping == ["a red cube ", "c"]
    assert not report.clean


def test_held_out_images_are_not_read() -> None:
    def unread(index: int) -> tuple[bytes, bytes]:
        raise AssertionError("images of the held-out set are not needed")

    held_out = Records([PreferenceRecord("p", b"", b"", 1.0)], unread)
    assert validate(records(2), held_out).overlap == 0


def test_empty_prompts_are_counted() -> None:
    blank = replace(records(1)[0], prompt="  ")
    assert validate([blank, *records(2)]).empty_prompts == 1


def test_report_is_json_and_table_shows_user_text_as_it_is() -> None:
    source = replace(as_records(records(2)), description="[bold]file")
    report = validate(source, held_out=records(1))
    assert json.loads(json.dumps(report.to_dict()))["usable_pairs"] == 2
    assert "[bold]file" in text(report)
    assert "1 of 1 held-out records" in text(report)
