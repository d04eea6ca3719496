"""Webdataset shards."""

from __future__ import annotations

import gzip
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from reader_files import PICTURES, save_tar

from diffalign.data.sources import open_source
from diffalign.data.validate import validate
from diffalign.errors import DiffalignError


def sample(key: str, i: int, names: tuple[str, str] = ("0.jpg", "1.jpg"), **values: Any) -> dict[str, bytes]:
    """The members of one pair; `values` stand in its JSON."""
    text = json.dumps({"prompt": f"prompt {key} 猫"} | values, ensure_ascii=False)
    return {
        f"{key}.{names[0]}": PICTURES[i],
        f"{key}.json": text.encode(),
        f"{key}.{names[1]}": PICTURES[i + 1],
    }


@pytest.mark.parametrize(
    "names",
    [("0.jpg", "1.jpg"), ("jpg_0", "jpg_1"), ("image_0.webp", "image_1.webp"), ("0.PNG", "1.jpeg")],
)
def test_pictures_by_number_with_a_label(tmp_path: Path, names: tuple[str, str]) -> None:
    path = save_tar(tmp_path / "x.tar", sample("a", 0, names, label_0=0) | sample("b", 2, names, label_0=0.5))
    found = open_source(str(path))
    assert [(r.prompt, r.label_0) for r in found] == [("prompt a 猫", 0.0), ("prompt b 猫", 0.5)]
    assert [r.image_0 for r in found] == [PICTURES[0], PICTURES[2]]
    assert found[0].chosen == PICTURES[1]
    assert found.rows[0].image_0 == b""
    assert (validate(found).ties, validate(found).usable_pairs) == (1, 1)


def test_chosen_and_rejected_need_no_label(tmp_path: Path) -> None:
    members = {
        "deep/x.y/a.rejected.png": PICTURES[4],
        "deep/x.y/a.chosen.png": PICTURES[3],
        "deep/x.y/a.txt": b"a caption\n",
        **sample("deep/b", 5, ("chosen.png", "rejected.png"), label=0.75, weight=2),
    }
    found = open_source(str(save_tar(tmp_path / "x.tar", members)))
    assert [(r.prompt, r.label_0, r.weight) for r in found] == [
        ("a caption", 1.0, 1.0),
        ("prompt deep/b 猫", 0.75, 2.0),
    ]
    assert (found[0].chosen, found[0].rejected) == (PICTURES[3], PICTURES[4])


def test_shards_of_a_split_in_order_with_random_access(tmp_path: Path) -> None:
    for shard in range(3):
        members = sample("a", 3 * shard, label_0=1) | sample("b", 3 * shard + 1, label_0=None)
        save_tar(tmp_path / f"train-{shard:05}.tar", members)
    save_tar(tmp_path / "validation-00000.tar", sample("v", 10, label_0=1))
    found = open_source(str(tmp_path))
    assert [found[i].chosen for i in (2, 0, 1)] == [PICTURES[6], PICTURES[0], PICTURES[3]]
    assert found.unlabelled == 3
    assert [r.chosen for r in open_source(str(tmp_path), "validation")] == [PICTURES[10]]
    assert len(open_source(str(tmp_path), limit=2)) == 2
    assert open_source(str(tmp_path), limit=2).identity != found.identity


def test_a_key_with_one_picture_is_left_out_and_named(tmp_path: Path) -> None:
    members = sample("a", 0, label_0=1) | {"b.0.jpg": PICTURES[0], "c.json": b"not read: no pictures"}
    found = open_source(str(save_tar(tmp_path / "x.tar", members)))
    assert found.notes == ("keys with one picture only: 1 (x.tar: b)",)
    assert len(found) == 1


class Trap:
    """Unpickling it would raise."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    members = sample("a", 0, label_0=1) | {"a.pkl": pickle.dumps(Trap()), "a.pyd": pickle.dumps(Trap())}
    assert open_source(str(save_tar(tmp_path / "x.tar", members)))[0].chosen == PICTURES[0]


def test_paths_and_links_that_climb_out_are_harmless(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(PICTURES[9])
    path = tmp_path / "shards" / "x.tar"
    save_tar(path, sample("../../a", 0, label_0=1))
    with tarfile.open(path, "a") as tar:
        for number in (0, 1):
            link = tarfile.TarInfo(f"b.{number}.png")
            link.type, link.linkname = tarfile.SYMTYPE, "../secret.png"
            tar.addfile(link)
    found = open_source(str(path))
    assert [r.chosen for r in found] == [PICTURES[0]]
    assert {p.name for p in tmp_path.rglob("*")} == {"secret.png", "shards", "x.tar"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (sample("a", 0), r"a does not say which picture is preferred\. Put label_0"),
        (sample("a", 0, label_0=7), "a: the label is 7"),
        (sample("a", 0, label_0=1, weight="x"), "a: weight is 'x'"),
        (sample("a", 0, ("0.jpg", "chosen.png"), label_0=1), "has the pictures 0, chosen; expected 0 and 1"),
        ({"a.0.jpg": b"", "a.1.jpg": b"", "a.json": b"{"}, "text is not UTF-8 or not JSON"),
        ({"a.0.jpg": b"", "a.1.jpg": b"", "a.txt": b"\xff"}, "text is not UTF-8 or not JSON"),
        ({"a.0.jpg": b"", "a.1.jpg": b"", "a.json": b"[]"}, "its JSON is a list; expected an object"),
        ({"a.0.jpg": b"", "a.1.jpg": b"", "a.json": b'{"label_0": 1}'}, "lacks prompt or caption or text"),
        (sample("a", 0, label_0=1) | {"a.jpg_0": b""}, "a.jpg_0 or the like twice"),
        ({"readme.md": b"hello"}, "no labelled pair"),
    ],
)
def test_bad_samples_name_their_place(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DiffalignError, match=message):
        open_source(str(save_tar(tmp_path / "x.tar", members)))


@pytest.mark.parametrize("cut", [100, 700, 1536, 2100, 3072, 4608])
def test_a_shard_cut_off_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    path = save_tar(tmp_path / "x.tar", sample("a", 0, label_0=1) | sample("b", 1, label_0=1))
    assert path.stat().st_size > 6 * 1024
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DiffalignError, match=r"cut off or damaged|not an uncompressed tar"):
        open_source(str(path), format="webdataset")


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = save_tar(tmp_path / "x.tar", sample("a", 0, label_0=1) | sample("b", 1, label_0=1))
    with tarfile.open(path) as tar:
        offset = tar.getmember("b.0.jpg").offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 20] = b"?" * 20
    path.write_bytes(data)
    with pytest.raises(DiffalignError, match="damaged after 3 members"):
        open_source(str(path))


def test_compressed_and_empty_shards(tmp_path: Path) -> None:
    plain = save_tar(tmp_path / "x.tar", sample("a", 0, label_0=1)).read_bytes()
    (tmp_path / "x.tar").write_bytes(gzip.compress(plain))
    with pytest.raises(DiffalignError, match="not an uncompressed tar file"):
        open_source(str(tmp_path / "x.tar"))
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(DiffalignError, match="not an uncompressed tar file"):
        open_source(str(tmp_path / "x.tar"))


def test_long_names_and_captions(tmp_path: Path) -> None:
    key = "k" * 300
    found = open_source(str(save_tar(tmp_path / "x.tar", sample(key, 0, label_0=1))))
    assert (found[0].image_0, found[0].image_1) == (PICTURES[0], PICTURES[1])
    members = sample("a", 0, label_0=1, more="x" * (1 << 20))
    with pytest.raises(DiffalignError, match="bytes; expected a caption"):
        open_source(str(save_tar(tmp_path / "y.tar", members)))


def test_broken_pictures_are_counted(tmp_path: Path) -> None:
    members = sample("a", 0, label_0=1) | {
        "b.0.jpg": b"no",
        "b.1.jpg": b"",
        "b.json": b'{"text": "p", "label": 1}',
    }
    report = validate(open_source(str(save_tar(tmp_path / "x.tar", members))))
    assert (report.broken_images, report.missing_images, report.usable_pairs) == (1, 1, 1)
