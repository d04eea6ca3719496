"""Small files in the schemas of published preference sets."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pair_fakes import encoded

PICTURES = [encoded((20 * i, 0, 0), (8, 8), "PNG") for i in range(12)]
"""Pictures told apart by their red level."""


def save(path: Path, number: int = 0) -> Path:
    """A picture file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PICTURES[number])
    return path


def save_json(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path


def save_table(path: Path, rows: list[dict[str, Any]], row_group_size: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def save_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def ranked_picture(
    name: str, prompt_id: str, prompt: str, rank: int | None, ratings: tuple[int, ...]
) -> dict[str, Any]:
    """A row of ImageRewardDB's metadata; `ratings`: overall, alignment, fidelity."""
    return {
        "image_path": name,
        "prompt_id": prompt_id,
        "prompt": prompt,
        "classification": "People",
        "image_amount_in_total": 3,
        "rank": rank,
        "overall_rating": ratings[0],
        "image_text_alignment_rating": ratings[1],
        "fidelity_rating": ratings[2],
    }
