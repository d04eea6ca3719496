"""Prompt sets: the embedded world's held-out captions and the file formats of public benchmarks."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError, did_you_mean
from diffalign.evaluation.prompt_sets import PROMPT_SETS, downloaded, table_rows
from diffalign.randomness import derive_seed

SAMPLES: dict[str, str] = {"scenes:held-out": "held_out.jsonl"}
PROMPT_KEYS = ("prompt", "prompts", "caption", "text")
CATEGORY_KEYS = ("category", "tag", "style")


@dataclass(frozen=True)
class EvalPrompt:
    """One picture to make: its prompt, the category it counts for, and the seed of its initial noise."""

    text: str
    category: str = ""
    seed: int = 0


def read_prompts(source: str | Path, num: int | None = None) -> list[EvalPrompt]:
    """The first `num` different prompts of a source (all by default), in file order.

    Sources: `scenes:held-out`; a public set by name (`PROMPT_SETS`) or any hub id; text with a prompt per line;
    JSONL or a JSON list of objects with a prompt and perhaps a category (GenEval, PartiPrompts); a JSON object of
    category to list (HPSv2); CSV, TSV or parquet with a prompt column (DrawBench, PartiPrompts, Pick-a-Pic); a
    folder or a pattern such as `*_val.txt`, each file being a category (HPSv2, T2I-CompBench). A repeated prompt
    counts once: intervals take prompts for independent, and several seeds of each are had with `seeds_per_prompt`.

    Raises:
        DiffalignError: no such source, a broken line (its number is named), no prompts, or fewer than `num`.
    """
    entries = _entries(str(source))
    different: dict[str, EvalPrompt] = {}
    for entry in entries:
        if entry.text:
            different.setdefault(entry.text, entry)
    prompts = list(different.values())
    if not prompts:
        raise DiffalignError(f"{source} holds no prompts; expected at least one")
    if num is not None and num < 1:
        raise DiffalignError(f"number of prompts is {num}; expected at least 1")
    if num is not None and num > len(prompts):
        raise DiffalignError(
            f"{source} holds {len(prompts)} different prompts, {num} were asked for. Ask for at most "
            f"{len(prompts)}, or use several seeds per prompt."
        )
    return prompts[:num]


def with_seeds(prompts: Sequence[EvalPrompt], seed: int, seeds_per_prompt: int = 1) -> list[EvalPrompt]:
    """Each prompt `seeds_per_prompt` times with seeds of its own, below 2^31.

    A seed depends on (`seed`, prompt, copy) only: a prompt keeps its noise when others are added or left out.

    Raises:
        DiffalignError: `seeds_per_prompt` below 1.
    """
    if seeds_per_prompt < 1:
        raise DiffalignError(f"seeds per prompt is {seeds_per_prompt}; expected at least 1")
    return [
        replace(prompt, seed=derive_seed("evaluation", seed, prompt.text, copy) % 2**31)
        for prompt in prompts
        for copy in range(seeds_per_prompt)
    ]


def _entries(source: str) -> Iterable[EvalPrompt]:
    """Every prompt of a source, repeated ones included."""
    if source in SAMPLES:
        return _read_file(Path(str(files("diffalign.samples"))) / SAMPLES[source])
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_categories(sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES), source)
    if "*" in path.name and path.parent.is_dir():
        return _read_categories(sorted(path.parent.glob(path.name)), source)
    if source in PROMPT_SETS:
        return _read_named(source)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", source) and path.suffix.lower() not in SUFFIXES:
        name, _, split = source.partition("@")
        return (_entry(row, f"{name}, row {i}") for i, row in enumerate(table_rows(name, split or None)))
    known = [*SAMPLES, *PROMPT_SETS]
    raise DiffalignError(
        f"no prompt file {source!r}; expected a {', '.join(SUFFIXES)} file, a folder of them, a hub id, or one "
        f"of: {', '.join(known)}.{did_you_mean(source, known)}"
    )


def _read_named(name: str) -> Iterator[EvalPrompt]:
    """A public set: its files, each with its category, or the rows of its table."""
    if PROMPT_SETS[name].table:
        yield from (_entry(row, f"{name}, row {i}") for i, row in enumerate(table_rows(name)))
    for category, path, suffix in downloaded(name):
        yield from _in_category(_read_file(path, suffix), category)


def _read_categories(paths: Sequence[Path], source: str) -> Iterator[EvalPrompt]:
    """Files whose names are the categories of prompts that name none: `color_val.txt` holds `color`."""
    if not paths:
        raise DiffalignError(f"{source} holds no prompt file; expected {', '.join(SUFFIXES)}")
    names = [re.sub(r"_(val|test|train)$", "", path.stem.removeprefix("t2i_compbench_")) for path in paths]
    for path, name in zip(paths, names, strict=True):
        yield from _in_category(_read_file(path), name)


def _in_category(entries: Iterable[EvalPrompt], category: str) -> Iterator[EvalPrompt]:
    return (replace(entry, category=entry.category or category) for entry in entries)


def _read_file(path: Path, suffix: str | None = None) -> Iterator[EvalPrompt]:
    return _READERS.get((suffix or path.suffix).lower(), _read_text)(path)


def _read_text(path: Path) -> Iterator[EvalPrompt]:
    yield from (EvalPrompt(line.strip()) for line in _text(path).split("\n"))


def _read_jsonl(path: Path) -> Iterator[EvalPrompt]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield _entry(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[EvalPrompt]:
    data = _parsed(_text(path), str(path))
    if isinstance(data, list):
        for number, item in enumerate(data, 1):
            yield _entry(item, f"{path}, item {number}")
    elif isinstance(data, dict) and all(isinstance(value, list) for value in data.values()):
        for category, items in data.items():
            for number, item in enumerate(items, 1):
                found = _entry(item, f"{path}, {category!r} item {number}")
                yield from _in_category([found], str(category))
    else:
        raise DiffalignError(
            f"{path}: expected a list of prompts or an object of category to list of prompts"
        )


def _read_csv(path: Path) -> Iterator[EvalPrompt]:
    rows = csv.DictReader(io.StringIO(_text(path), newline=""))
    _prompt_column(list(rows.fieldnames or []), path)
    for row in rows:
        yield _entry({key: value or "" for key, value in row.items() if key}, f"{path}, line {rows.line_num}")


def _read_tsv(path: Path) -> Iterator[EvalPrompt]:
    """A line per row; quotes are text (PartiPrompts has a prompt that begins with one) unless they quote a field."""
    lines = _text(path).split("\n")
    columns = [_unquoted(cell) for cell in lines[0].rstrip("\r").split("\t")]
    _prompt_column(columns, path)
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            cells = [_unquoted(cell) for cell in line.rstrip("\r").split("\t")]
            yield _entry(dict(zip(columns, cells, strict=False)), f"{path}, line {number}")


def _unquoted(cell: str) -> str:
    """The content of a quoted field (quotes around it, those inside doubled); any other text as it is."""
    inner = cell[1:-1]
    quoted = len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _read_parquet(path: Path) -> Iterator[EvalPrompt]:
    """Prompts and categories of a table; other columns, such as pictures, are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        _prompt_column(names, path)
        wanted = [name for name in names if name.strip().lower() in (*PROMPT_KEYS, *CATEGORY_KEYS)]
        rows = pq.read_table(path, columns=wanted).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DiffalignError(f"{path} is not a readable parquet file ({error})") from error
    for number, row in enumerate(rows, 1):
        yield _entry(row, f"{path}, row {number}")


def _prompt_column(columns: list[str], path: Path) -> None:
    if not any(column.strip().lower() in PROMPT_KEYS for column in columns):
        raise DiffalignError(f"{path}: columns are {columns}; expected one of {', '.join(PROMPT_KEYS)}")


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
SUFFIXES = (".txt", *_READERS)


def _entry(item: Any, where: str) -> EvalPrompt:
    """A prompt from a string or an object with a prompt and perhaps a category, keys in any case."""
    if isinstance(item, str):
        return EvalPrompt(item.strip())
    if not isinstance(item, dict):
        raise DiffalignError(
            f"{where}: expected a prompt or an object with a prompt; got {type(item).__name__}"
        )
    lowered = {str(key).strip().lower(): value for key, value in item.items()}
    text = _first(lowered, PROMPT_KEYS)
    if not isinstance(text, str):
        raise DiffalignError(
            f"{where}: no prompt text; keys are {sorted(lowered)}, expected one of {PROMPT_KEYS}"
        )
    category = _first(lowered, CATEGORY_KEYS)
    return EvalPrompt(text.strip(), str(category).strip() if category is not None else "")


def _first(values: dict[str, Any], keys: Iterable[str]) -> Any:
    return next((values[key] for key in keys if key in values), None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DiffalignError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DiffalignError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from error
