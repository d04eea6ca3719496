"""Reader of the Pick-a-Pic schema (v1 and v2): parquet files here, or a data set of the hub."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
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

IMAGES = ("jpg_0", "jpg_1")
REQUIRED = ("caption", *IMAGES, "label_0")
CHANCE = "chance"
"""Column of `diffalign data relabel`: what rewards think of the first picture; read as an aspect of this name."""
OPTIONAL = ("has_label", "user_id", "weight", "caption_0", "caption_1", "labels", CHANCE)
LIGHT = ("caption", "label_0", *OPTIONAL)


def read_pickapic(table: Table, reading: Reading = Reading()) -> Records:
    """Records of a table in the Pick-a-Pic schema, in its order.

    Captions and labels are read at once; images when a record is asked for.

    Raises:
        DiffalignError: the table lacks columns, or holds a label outside [0, 1].
    """
    rows, places, unlabelled = collect(_found(table), reading.limit)

    def images(index: int) -> tuple[ImageSource, ImageSource]:
        return table.image(places[index], "jpg_0"), table.image(places[index], "jpg_1")

    return Records(rows, images, unlabelled, table.identity("pickapic", len(rows)), table.description)


def _found(table: Table) -> Iterator[tuple[PreferenceRecord | None, int]]:
    """Each row and its number; None for one that nobody judged."""
    check_columns(table.schema.names, REQUIRED, table.description, "Pick-a-Pic")
    check_picture_columns(table.schema, IMAGES, table.description)
    for chunk in table.chunks(LIGHT):
        check_columns([*chunk.rows.column_names, *IMAGES], REQUIRED, chunk.source, "Pick-a-Pic")
        for i, values in enumerate(chunk.rows.to_pylist()):
            yield _row(values, chunk.source, chunk.where(i)), chunk.start + i


def _row(values: Mapping[str, Any], source: str, where: str) -> PreferenceRecord | None:
    """A row; None when nobody judged it. Own captions as in Pick-Double-Caption (arXiv 2502.06023)."""
    label, judged = values["label_0"], values.get("has_label")
    if judged is False or label is None or math.isnan(label):
        return None
    caption = values["caption"] or ""
    first, second = (values.get(name) or caption for name in ("caption_0", "caption_1"))
    user, weight = values.get("user_id"), values.get("weight")
    return PreferenceRecord(
        prompt=sys.intern(first),  # data sets repeat captions many times
        image_0=b"",
        image_1=b"",
        label_0=check_label(label, where),
        source=source,
        weight=1.0 if weight is None else check_weight(weight, where),
        prompt_1=None if first == second else second,
        user=None if user is None else str(user),
        labels=_aspects(values.get("labels"), where) | _chance(values.get(CHANCE), where),
    )


def _chance(value: float | None, where: str) -> dict[str, float]:
    """The rewards' own label of a relabelled pair, whatever became of the given one."""
    return {} if value is None or math.isnan(value) else {CHANCE: check_label(value, f"{where}, {CHANCE}")}


def _aspects(text: str | None, where: str) -> dict[str, float]:
    """Labels of single aspects from a JSON object; none without it."""
    if not text:
        return {}
    try:
        labels = json.loads(text)
    except (TypeError, json.JSONDecodeError):
        labels = None
    if not isinstance(labels, dict):
        raise DiffalignError(
            f'{where}: labels is {text!r}; expected a JSON object such as {{"alignment": 1}}.'
        )
    return {
        name: check_label(value, f"{where}, {name}") for name, value in labels.items() if value is not None
    }
