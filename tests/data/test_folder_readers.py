"""Twin folders and suffixes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pair_fakes import data_config
from reader_files import PICTURES, save

from diffalign.data.records import read_image
from diffalign.data.sources import open_records, open_source
from diffalign.data.validate import validate
from diffalign.errors import DiffalignError


def caption(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def twins(folder: Path, names: tuple[str, str] = ("chosen", "rejected")) -> Path:
    """Pairs `a` and `b` of red levels 0 and 20, and 40 and 60."""
    for i, name in enumerate("ab"):
        save(folder / names[0] / f"{name}.png", 2 * i)
        save(folder / names[1] / f"{name}.jpg", 2 * i + 1)
        caption(folder / names[0] / f"{name}.txt", f"prompt {name} 猫\n")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("chosen", "rejected"),
        ("preferred", "rejected"),
        ("win", "lose"),
        ("winner", "loser"),
        ("good", "bad"),
    ],
)
def test_twin_folders_are_paired_by_name(tmp_path: Path, names: tuple[str, str]) -> None:
    found = open_source(str(twins(tmp_path, names)))
    assert [r.prompt for r in found] == ["prompt a 猫", "prompt b 猫"]
    assert [(read_image(r.chosen), read_image(r.rejected)) for r in found] == [
        (PICTURES[0], PICTURES[1]),
        (PICTURES[2], PICTURES[3]),
    ]
    assert validate(found).usable_pairs == 2


def test_pictures_without_partner_are_counted_and_named_once(tmp_path: Path) -> None:
    save(twins(tmp_path) / "chosen" / "c.png", 5)
    save(tmp_path / "rejected" / "d.png", 5)
    with pytest.warns(UserWarning, match="left out") as caught:
        found = open_records(data_config(tmp_path, source=str(tmp_path)))
    note = "pictures without partner of the same name: 2 (chosen/c.png, rejected/d.png)"
    assert found.notes == (note,)
    assert [note in str(warning.message) for warning in caught] == [True]
    assert validate(found).to_dict()["notes"] == [note]
    assert len(found) == 2


def test_long_lists_of_pictures_without_partner_are_cut(tmp_path: Path) -> None:
    twins(tmp_path)
    for i in range(12):
        save(tmp_path / "chosen" / f"x{i:02}.png")
    (note,) = open_source(str(tmp_path)).notes
    assert note.startswith("pictures without partner of the same name: 12 (chosen/x00.png, ")
    assert note.endswith("chosen/x09.png, ...)")


def test_missing_captions_are_counted_and_named(tmp_path: Path) -> None:
    (twins(tmp_path) / "chosen" / "b.txt").unlink()
    with pytest.raises(DiffalignError, match=r"1 of 2 pairs have no caption: b\. Write NAME\.txt"):
        open_source(str(tmp_path))
    caption(tmp_path / "chosen" / "b.txt", "")
    assert validate(open_source(str(tmp_path))).empty_prompts == 1


def test_metadata_lines_give_caption_label_and_weight(tmp_path: Path) -> None:
    lines = [
        '{"file_name": "chosen/a.png", "text": "of a", "label": 0.5, "weight": 3}',
        '{"file_name": "../../b.png", "caption": "of b", "label": null}',
    ]
    caption(twins(tmp_path) / "metadata.jsonl", "\n".join(lines))
    found = open_source(str(tmp_path))
    assert [(r.prompt, r.label_0, r.weight) for r in found] == [("of a", 0.5, 3.0)]
    assert found.unlabelled == 1
    assert found[0].image_0 == tmp_path / "chosen" / "a.png"


def test_metadata_csv(tmp_path: Path) -> None:
    caption(
        twins(tmp_path) / "chosen" / "metadata.csv",
        'file_name,prompt,label\na,"red, round",0.75\nb.png,blue,\n',
    )
    found = open_source(str(tmp_path))
    assert [(r.prompt, r.label_0) for r in found] == [("red, round", 0.75)]
    assert found.unlabelled == 1
    caption(tmp_path / "chosen" / "metadata.csv", "file_name,prompt,label\na,p,sure\n")
    with pytest.raises(DiffalignError, match=r"metadata\.csv, line 2: the label is 'sure'"):
        open_source(str(tmp_path))
    caption(tmp_path / "chosen" / "metadata.csv", "name,prompt\na,p\n")
    with pytest.raises(DiffalignError, match="lacks file_name"):
        open_source(str(tmp_path))


def test_splits_are_subfolders_and_never_mixed(tmp_path: Path) -> None:
    twins(tmp_path / "train")
    twins(tmp_path / "validation")
    assert open_source(str(tmp_path), "validation")[0].image_0 == tmp_path / "validation" / "chosen" / "a.png"
    assert len(open_source(str(tmp_path), limit=1)) == 1
    with pytest.raises(DiffalignError, match="no files of split 'test'; found: train, validation"):
        open_source(str(tmp_path), "test")


def test_twins_without_any_pair_and_repeated_names(tmp_path: Path) -> None:
    save(tmp_path / "chosen" / "a.png")
    save(tmp_path / "rejected" / "b.png")
    with pytest.raises(
        DiffalignError,
        match=r"no pair of pictures .*without partner of the same name: 2 \(chosen/a\.png, rejected/b\.png\)",
    ):
        open_source(str(tmp_path))
    save(tmp_path / "chosen" / "a.jpg")
    with pytest.raises(DiffalignError, match=r"both a\.jpg and a\.png"):
        open_source(str(tmp_path))


def test_two_sets_of_twin_folders_are_ambiguous(tmp_path: Path) -> None:
    twins(tmp_path)
    twins(tmp_path, ("good", "bad"))
    with pytest.raises(DiffalignError, match="several pairs of folders: chosen/rejected, good/bad"):
        open_source(str(tmp_path))


def test_identity_follows_pictures_and_captions(tmp_path: Path) -> None:
    first = open_source(str(twins(tmp_path))).identity
    assert open_source(str(tmp_path)).identity == first
    caption(tmp_path / "chosen" / "a.txt", "another caption")
    second = open_source(str(tmp_path)).identity
    (tmp_path / "rejected" / "a.jpg").write_bytes(PICTURES[7] + b"longer")
    assert len({first, second, open_source(str(tmp_path)).identity}) == 3


# Suffixes


@pytest.mark.parametrize(
    ("first", "second"), [("_w", "_l"), ("_chosen", "_rejected"), ("_win", "_lose"), ("_winner", "_loser")]
)
def test_suffixes_are_paired_by_the_rest_of_the_name(tmp_path: Path, first: str, second: str) -> None:
    save(tmp_path / f"x_1{first}.png", 3)
    save(tmp_path / f"x_1{second}.webp", 4)
    caption(tmp_path / "x_1.txt", "p")
    found = open_source(str(tmp_path))
    assert [(r.prompt, read_image(r.chosen), read_image(r.rejected)) for r in found] == [
        ("p", PICTURES[3], PICTURES[4])
    ]


def test_suffixes_with_metadata_and_other_pictures(tmp_path: Path) -> None:
    for name in ("a_w", "a_l", "b_w", "cover"):
        save(tmp_path / f"{name}.png")
    caption(tmp_path / "metadata.jsonl", '{"file_name": "a_w.png", "prompt": "p", "weight": 2}')
    found = open_source(str(tmp_path))
    assert [(r.prompt, r.weight) for r in found] == [("p", 2.0)]
    assert found.notes == ("pictures without partner of the same name: 1 (b_w.png)",)


def test_numbers_do_not_say_which_is_preferred(tmp_path: Path) -> None:
    save(tmp_path / "a_0.png")
    save(tmp_path / "a_1.png")
    with pytest.raises(DiffalignError, match="end in _0 and _1, which does not say which one is preferred"):
        open_source(str(tmp_path))
    with pytest.raises(DiffalignError, match="rename them to _w and _l"):
        open_source(str(tmp_path), format="suffixes")


def test_a_file_is_no_folder_of_pairs(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"is a file; data\.format twin_folders expects a folder"):
        open_source(str(save(tmp_path / "a.png")), format="twin_folders")
