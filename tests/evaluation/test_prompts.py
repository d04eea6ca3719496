"""Prompt readers on small files in the shapes of the public sets."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.errors import DiffalignError
from diffalign.evaluation import prompt_sets
from diffalign.evaluation.prompts import EvalPrompt, read_prompts, with_seeds


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_has_a_prompt_per_line(tmp_path: Path) -> None:
    path = _write(tmp_path, "animals.txt", "\ufeffcat\r\n\n  dog \nwolf, howling")
    assert [p.text for p in read_prompts(path)] == ["cat", "dog", "wolf, howling"]


def test_repeated_prompts_count_once_in_order_of_first_appearance(tmp_path: Path) -> None:
    path = _write(tmp_path, "p.txt", "b\na\nb\nc\na\n")
    assert [p.text for p in read_prompts(path)] == ["b", "a", "c"]


def test_jsonl_with_category_or_tag(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "a cow", "category": "single"}',
        "",
        '{"tag": "two_object", "prompt": "a cow, a cup"}',
    ]
    assert read_prompts(_write(tmp_path, "p.jsonl", "\n".join(lines))) == [
        EvalPrompt("a cow", "single"),
        EvalPrompt("a cow, a cup", "two_object"),
    ]


def test_json_list_with_capital_keys(tmp_path: Path) -> None:
    path = _write(tmp_path, "parti.json", json.dumps([{"Prompt": "bond", "Category": "Abstract"}, "life"]))
    assert read_prompts(path) == [EvalPrompt("bond", "Abstract"), EvalPrompt("life")]


def test_json_object_gives_categories(tmp_path: Path) -> None:
    path = _write(tmp_path, "hps.json", json.dumps({"anime": ["x", "y"], "photo": [{"prompt": "z"}]}))
    assert [(p.text, p.category) for p in read_prompts(path)] == [
        ("x", "anime"), ("y", "anime"), ("z", "photo"),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "mark"), [("p.csv", ","), ("p.tsv", "\t")])
def test_tables(tmp_path: Path, name: str, mark: str) -> None:
    text = f'Prompts{mark}Category\n"a red car, ""fast"""{mark}Colors\nsea{mark}\n'
    assert read_prompts(_write(tmp_path, name, text)) == [
        EvalPrompt('a red car, "fast"', "Colors"),
        EvalPrompt("sea"),
    ]


def test_the_first_prompts_are_taken(tmp_path: Path) -> None:
    path = _write(tmp_path, "p.txt", "a\nb\nc")
    assert [p.text for p in read_prompts(path, 2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2: not valid JSON"),
        ("p.jsonl", '{"title": "a"}', "line 1: no prompt text; keys are .'title'."),
        ("p.jsonl", '{"prompt": 3}', "no prompt text"),
        ("p.json", "3", "expected a list of prompts"),
        ("p.json", "[[1]]", "item 1: expected a prompt or an object with a prompt; got list"),
        ("p.csv", "id,words\n1,a\n", "columns are .'id', 'words'.; expected one of prompt"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DiffalignError, match=message):
        read_prompts(_write(tmp_path, name, text))


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(DiffalignError, match="not UTF-8"):
        read_prompts(tmp_path / "p.txt")


def test_too_few_prompts_say_what_to_do(tmp_path: Path) -> None:
    path = _write(tmp_path, "p.txt", "a\nb\nb")
    with pytest.raises(
        DiffalignError, match=r"holds 2 different prompts, 3 were asked for.*seeds per prompt"
    ):
        read_prompts(path, 3)
    with pytest.raises(DiffalignError, match="expected at least 1"):
        read_prompts(path, 0)


def test_missing_source_names_the_nearest() -> None:
    with pytest.raises(DiffalignError, match="Did you mean 'scenes:held-out'"):
        read_prompts("scenes:heldout")


def test_seeds_belong_to_the_prompt_not_to_its_place() -> None:
    a, b = EvalPrompt("a"), EvalPrompt("b", "c")
    seeds = {(p.text, i): p.seed for i, p in enumerate(with_seeds([a, b], 0))}
    assert with_seeds([b], 0)[0].seed == seeds["b", 1]
    assert with_seeds([a], 1)[0].seed != seeds["a", 0]
    assert all(0 <= seed < 2**31 for seed in seeds.values())


def test_several_seeds_per_prompt_are_different() -> None:
    rows = with_seeds([EvalPrompt("a"), EvalPrompt("b")], 0, 3)
    assert [r.text for r in rows] == ["a"] * 3 + ["b"] * 3
    assert len({r.seed for r in rows}) == 6
    with pytest.raises(DiffalignError, match="seeds per prompt is 0"):
        with_seeds([EvalPrompt("a")], 0, 0)


def test_tsv_quotes_are_text_unless_they_quote_a_field(tmp_path: Path) -> None:
    text = (
        'Prompt\tCategory\tChallenge\n"G I G" painted on a wall\tArts\tWriting\n"say ""hi"""\tPeople\tBasic\n'
    )
    assert read_prompts(_write(tmp_path, "parti.tsv", text)) == [
        EvalPrompt('"G I G" painted on a wall', "Arts"),
        EvalPrompt('say "hi"', "People"),
    ]


def test_folder_and_pattern_give_categories(tmp_path: Path) -> None:
    _write(tmp_path, "color_val.txt", "a green bench\r\na blue cake\r\n")
    _write(tmp_path, "t2i_compbench_non_spatial_val.txt", "a person looks at a rainbow\n")
    _write(tmp_path, "notes.md", "no prompts")
    assert [(p.text, p.category) for p in read_prompts(tmp_path)] == [
        ("a green bench", "color"), ("a blue cake", "color"), ("a person looks at a rainbow", "non_spatial"),
    ]  # fmt: skip
    assert [p.category for p in read_prompts(tmp_path / "c*_val.txt")] == ["color", "color"]
    with pytest.raises(DiffalignError, match="holds no prompt file"):
        read_prompts(tmp_path / "*.yaml")


def test_styles_of_hpsv2_are_their_files(tmp_path: Path) -> None:
    for style in ("anime", "photo"):
        _write(tmp_path, f"{style}.json", json.dumps([f"{style} one", f"{style} two"]))
    assert [p.category for p in read_prompts(tmp_path)] == ["anime", "anime", "photo", "photo"]


def test_geneval_metadata(tmp_path: Path) -> None:
    line = {"tag": "counting", "include": [{"class": "bus", "count": 3}], "prompt": "three buses"}
    assert read_prompts(_write(tmp_path, "m.jsonl", json.dumps(line))) == [
        EvalPrompt("three buses", "counting")
    ]


def test_parquet_reads_captions_and_not_pictures(tmp_path: Path) -> None:
    table = pa.table({"jpg_0": [b"x", b"y", b"z"], "caption": ["a cat", "a dog", "a cat"]})
    pq.write_table(table, tmp_path / "test.parquet")
    assert [p.text for p in read_prompts(tmp_path / "test.parquet")] == ["a cat", "a dog"]
    pq.write_table(pa.table({"jpg_0": [b"x"]}), tmp_path / "none.parquet")
    with pytest.raises(DiffalignError, match=r"columns are .'jpg_0'."):
        read_prompts(tmp_path / "none.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DiffalignError, match="not a readable parquet file"):
        read_prompts(tmp_path / "broken.parquet")


def test_named_set_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(address: str) -> str:
        asked.append(address)
        return str(_write(tmp_path, f"{len(asked)}.bin", f"prompt {len(asked)}\n"))

    monkeypatch.setattr(prompt_sets, "_download", download)
    found = read_prompts("t2i-compbench")
    assert [p.category for p in found][:3] == ["color", "shape", "texture"]
    assert len(found) == len(asked) == 8
    assert all(address.endswith("_val.txt") for address in asked)


def test_named_and_unnamed_hub_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(hub_id: str, split: str | None) -> datasets.Dataset:
        loaded.append((hub_id, split))
        return datasets.Dataset.from_dict({"Prompts": ["a", "b"], "Category": ["C", "D"], "n": [1, 2]})

    monkeypatch.setattr(prompt_sets, "_load", load)
    assert read_prompts("drawbench") == [EvalPrompt("a", "C"), EvalPrompt("b", "D")]
    assert len(read_prompts("someone/prompts@dev")) == 2
    assert loaded == [("sayakpaul/drawbench", "train"), ("someone/prompts", "dev")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "parti",
            r"prompts of parti cannot be fetched.*OSError: offline.*PartiPrompts.tsv of google-research",
        ),
        ("pickapic-test", r"pickapic_v1_no_images.*parquet file with the column caption"),
        ("nobody/nothing", r"no local file and no hub data set 'nobody/nothing'"),
        ("geneva", r"no prompt file 'geneva'.*Did you mean 'geneval'"),
    ],
)
def test_offline_errors_say_which_file_may_be_given(
    source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(prompt_sets, "_download", offline)
    monkeypatch.setattr(prompt_sets, "_load", offline)
    with pytest.raises(DiffalignError, match=message):
        read_prompts(source)


def test_web_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def answer(address: str, timeout: float) -> io.BytesIO:
        calls.append(address)
        return io.BytesIO(b'{"tag": "colors", "prompt": "a red bus"}')

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(prompt_sets.urllib.request, "urlopen", answer)
    assert read_prompts("geneval") == read_prompts("geneval") == [EvalPrompt("a red bus", "colors")]
    assert len(calls) == 1
