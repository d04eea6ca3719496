"""Public prompt sets by name: where they are published, and which local file may be given instead."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError

HUB_FILE = "hf://datasets/"
WEB_SECONDS = 30.0
_T2I_CATEGORIES = (
    "color",
    "shape",
    "texture",
    "spatial",
    "non_spatial",
    "complex",
    "3d_spatial",
    "numeracy",
)
_HPS_STYLES = ("anime", "concept-art", "paintings", "photo")


@dataclass(frozen=True)
class PromptSet:
    """A published prompt set: files of the hub or the web, or a table of the hub.

    Fields:
        files: category (empty for none) to address; `hf://` addresses are files of the hub.
        table: hub id and split. local: which local file may be given instead, for messages and docs.
    """

    local: str
    files: dict[str, str] = field(default_factory=dict)
    table: tuple[str, str] | None = None

    @property
    def origin(self) -> str:
        """The addresses or the hub id, for messages."""
        return self.table[0] if self.table else ", ".join(self.files.values())


PROMPT_SETS: dict[str, PromptSet] = {
    "parti": PromptSet(
        "PartiPrompts.tsv of google-research/parti",
        files={"": "hf://datasets/nateraw/parti-prompts/PartiPrompts.tsv"},
    ),
    "drawbench": PromptSet(
        "a CSV with the columns Prompts and Category, or a text file", table=("sayakpaul/drawbench", "train")
    ),
    "hpsv2": PromptSet(
        "a folder with anime.json, concept-art.json, paintings.json and photo.json of zhwang/HPDv2",
        files={style: f"hf://datasets/zhwang/HPDv2/benchmark/{style}.json" for style in _HPS_STYLES},
    ),
    "pickapic-test": PromptSet(
        "a parquet file with the column caption, or a text file",
        table=("yuvalkirstain/pickapic_v1_no_images", "test_unique"),
    ),
    "geneval": PromptSet(
        "prompts/evaluation_metadata.jsonl of djghosh13/geneval",
        files={
            "": "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
        },
    ),
    "t2i-compbench": PromptSet(
        "a folder with color_val.txt, shape_val.txt, ... of Karine-Huang/T2I-CompBench, or '*_val.txt'",
        files={
            category: "https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench/main/examples/dataset/"
            f"{category}_val.txt"
            for category in _T2I_CATEGORIES
        },
    ),
}


def downloaded(name: str) -> Iterator[tuple[str, Path, str]]:
    """Category, local copy and file ending of each file of a named set that consists of files.

    Copies are kept, and found again without a network.

    Raises:
        DiffalignError: a file can neither be downloaded nor found in the local copies.
    """
    chosen = PROMPT_SETS[name]
    for category, address in chosen.files.items():
        try:
            path = Path(_download(address))
        except Exception as error:  # the hub client raises many unrelated types
            raise _unreachable(name, error) from error
        yield category, path, Path(address).suffix


def table_rows(name: str, split: str | None = None) -> Iterator[dict[str, Any]]:
    """Rows of the text columns of a hub data set: of a named set, or of any hub id (first split that is there).

    Raises:
        DiffalignError: the data set cannot be loaded.
    """
    chosen = PROMPT_SETS.get(name)
    hub_id, split = chosen.table if chosen and chosen.table else (name, split)
    try:
        dataset = _load(hub_id, split)
    except Exception as error:  # the hub client raises many unrelated types
        raise _unreachable(name, error) from error
    texts = [column for column, kind in dataset.features.items() if getattr(kind, "dtype", "") == "string"]
    yield from dataset.select_columns(texts)


def _unreachable(name: str, error: Exception) -> DiffalignError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    chosen = PROMPT_SETS.get(name)
    if chosen is None:
        return DiffalignError(
            f"no local file and no hub data set {name!r} ({reason}). Give a prompt file, a folder of them, a hub "
            f"id, or one of: scenes:held-out, {', '.join(PROMPT_SETS)}."
        )
    return DiffalignError(
        f"the prompts of {name} cannot be fetched from {chosen.origin} ({reason}). Without a network give a "
        f"local file instead: --prompts with {chosen.local}."
    )


def _download(address: str) -> str:
    """A local copy of a file of the hub (`hf://datasets/OWNER/NAME/FILE`) or of the web."""
    if address.startswith(HUB_FILE):
        from huggingface_hub import hf_hub_download

        owner, name, file = address.removeprefix(HUB_FILE).split("/", 2)
        return hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")
    kept = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "diffalign" / "prompts"
    path = kept / hashlib.blake2b(address.encode(), digest_size=8).hexdigest() / address.rpartition("/")[2]
    if not path.is_file():
        with urllib.request.urlopen(address, timeout=WEB_SECONDS) as answer:
            data = answer.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_bytes(data)
        part.replace(path)
    return str(path)


def _load(hub_id: str, split: str | None) -> Any:
    from datasets import get_dataset_split_names, load_dataset

    if split is None:
        names = get_dataset_split_names(hub_id)
        split = next((name for name in ("test", "validation") if name in names), names[0])
    return load_dataset(hub_id, split=split)
