"""Prompt sets: the embedded world's held-out captions and the file formats of public benchmarks."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError, did_you_mean
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

    Sources: `scenes:held-out`; text with a prompt per line; JSONL or a JSON list of objects with a prompt and
    perhaps a category (GenEval, PartiPrompts); a JSON object of category to list (HPSv2); CSV or TSV with a
    prompt column (DrawBench, PartiPrompts). A repeated prompt counts once: intervals take prompts for
    independent, and several seeds of each are had with `seeds_per_prompt`.

    Raises:
        DiffalignError: no such source, a broken line (its number is named), no prompts, or fewer than `num`.
    """
    path = _located(str(source))
    entries = _READERS.get(path.suffix.lower(), _read_text)(path)
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


def _located(source: str) -> Path:
    sample = SAMPLES.get(source)
    path = Path(str(files("diffalign.samples"))) / sample if sample else Path(source)
    if not path.is_file():
        hint = did_you_mean(source, list(SAMPLES))
        raise DiffalignError(
            f"no prompt file {source!r}; expected scenes:held-out or a .txt, .jsonl, .json, .csv or .tsv "
            f"file.{hint}"
        )
    return path


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
                yield replace(found, category=found.category or str(category))
    else:
        raise DiffalignError(
            f"{path}: expected a list of prompts or an object of category to list of prompts"
        )


def _read_table(path: Path) -> Iterator[EvalPrompt]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter)
    columns = list(rows.fieldnames or [])
    if not any(column.strip().lower() in PROMPT_KEYS for column in columns):
        raise DiffalignError(f"{path}: columns are {columns}; expected one of {', '.join(PROMPT_KEYS)}")
    for row in rows:
        yield _entry({key: value or "" for key, value in row.items() if key}, f"{path}, line {rows.line_num}")


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_table, ".tsv": _read_table}


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
