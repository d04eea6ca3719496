"""Reader of tables with a preferred and a rejected picture per row: parquet files, or a data set of the hub."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from diffalign.data.records import (
    ImageSource,
    PreferenceRecord,
    Reading,
    Records,
    check_columns,
    check_label,
    check_weight,
    collect,
)
from diffalign.data.tables import Table, check_picture_columns
from diffalign.errors import DiffalignError

PICTURES = (
    ("chosen", "rejected"),
    ("chosen_image", "rejected_image"),
    ("image_chosen", "image_rejected"),
    ("img_better", "img_worse"),  # ImageRewardDB's configurations `1k_pair` to `8k_pair`
)
PROMPTS = ("prompt", "caption", "text")
OPTIONAL = ("weight", "label", "chosen_prompt", "rejected_prompt", "user_id")


def picture_columns(names: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of columns that hold preferred and rejected pictures."""
    return [pair for pair in PICTURES if set(pair) <= set(names)]


def read_chosen_rejected(table: Table, reading: Reading = Reading()) -> Records:
    """Records of a table, in its order; the preferred picture comes first.

    Columns: `chosen` and `rejected` (or another pair of `PICTURES`), the first of `PROMPTS` that there is; optional
    `weight`, `label` (probability that `chosen` is preferred, null: not judged), `chosen_prompt`,
    `rejected_prompt`, `user_id`.

    Raises:
        DiffalignError: columns are missing, several pairs of pictures would do, or a value is out of range.
    """
    pictures, prompt = _columns(table)
    rows, places, unlabelled = collect(_found(table, prompt), reading.limit)

    def images(index: int) -> tuple[ImageSource, ImageSource]:
        return table.image(places[index], pictures[0]), table.image(places[index], pictures[1])

    identity = table.identity("chosen_rejected", pictures, prompt, len(rows))
    return Records(rows, images, unlabelled, identity, table.description)


def _columns(table: Table) -> tuple[tuple[str, str], str]:
    """The picture columns and the prompt column."""
    names, where = table.schema.names, table.description
    pairs = picture_columns(names)
    prompts = [name for name in PROMPTS if name in names]
    if not pairs or not prompts:
        wanted = (PICTURES[0] if not pairs else ()) + (PROMPTS[:1] if not prompts else ())
        check_columns(names, wanted, where, "chosen/rejected")
    if len(pairs) > 1:
        raise DiffalignError(
            f"{where} has several columns that would do: {' and '.join('/'.join(pair) for pair in pairs)}. Remove or "
            "rename all but one pair."
        )
    check_picture_columns(table.schema, pairs[0], where)
    return pairs[0], prompts[0]


def _found(table: Table, prompt: str) -> Iterator[tuple[PreferenceRecord | None, int]]:
    for chunk in table.chunks((prompt, *OPTIONAL)):
        check_columns(chunk.rows.column_names, (prompt,), chunk.source, "chosen/rejected")
        for i, values in enumerate(chunk.rows.to_pylist()):
            yield _row(values, prompt, chunk.source, chunk.where(i)), chunk.start + i


def _row(values: dict[str, Any], prompt: str, source: str, where: str) -> PreferenceRecord | None:
    """A row; None when nobody judged it."""
    label = values.get("label", 1.0)
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return None
    shared = values[prompt] or ""
    if not isinstance(shared, str):
        raise DiffalignError(f"{where}: {prompt} is {shared!r}; expected text.")
    first, second = (values.get(name) or shared for name in ("chosen_prompt", "rejected_prompt"))
    user, weight = values.get("user_id"), values.get("weight")
    return PreferenceRecord(
        prompt=sys.intern(first),
        image_0=b"",
        image_1=b"",
        label_0=check_label(label, where),
        source=source,
        weight=1.0 if weight is None else check_weight(weight, where),
        prompt_1=None if first == second else second,
        user=None if user is None else str(user),
    )
