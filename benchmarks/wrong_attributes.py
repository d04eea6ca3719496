"""Pairs whose rejected picture is another scene: one attribute wrong, and a true caption of its own.

For dual captions against one caption (DCPO): the chosen picture shows what its caption says; the rejected one has the
same layout with a colour or a shape of one thing exchanged, or the colours of two things swapped.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from diffalign.data.records import PreferenceRecord
from diffalign.data.writers import PairRow, write_parquet
from diffalign.randomness import derive_seed
from diffalign.samples import scenes

COUNT = 800


def write_pairs(folder: Path, seed: int = 0, count: int = COUNT) -> Path:
    """Write `count` training pairs into a folder that `data.source` takes; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(folder, "train", (PairRow(record) for record in islice(records(seed), count)))
    return folder


def records(seed: int) -> Iterator[PreferenceRecord]:
    """Endless pairs; neither picture nor caption shows a held-out combination."""
    rng = np.random.default_rng(derive_seed("wrong attributes", seed))
    for scene, placed in scenes.training_scenes(derive_seed("wrong attributes", seed)):
        if any(thing.color is None for thing in scene.things) or scene.category == "counting":
            continue
        wrong, drawn = changed(scene, placed, rng)
        if scenes.is_held_out(wrong):
            continue
        background = scenes.random_background(rng)
        right, other = (encoded(scenes.draw(things, background)) for things in (placed, drawn))
        yield PreferenceRecord(
            scenes.caption(scene), right, other, 1.0, "wrong attributes", prompt_1=scenes.caption(wrong)
        )


def changed(
    scene: scenes.Scene, placed: tuple[scenes.Placed, ...], rng: np.random.Generator
) -> tuple[scenes.Scene, tuple[scenes.Placed, ...]]:
    """A scene with coloured things and its layout, both with one attribute exchanged or two colours swapped."""
    if len(placed) == 2 and rng.random() < 0.5:
        colors = [thing.color for thing in placed[::-1]]
        return with_attributes(scene, placed, "color", colors)
    name, values = ("color", list(scenes.PALETTE)) if rng.random() < 0.5 else ("shape", list(scenes.SHAPES))
    present = [getattr(thing, name) for thing in placed]
    present[int(rng.integers(len(placed)))] = str(rng.choice([v for v in values if v not in present]))
    return with_attributes(scene, placed, name, present)


def with_attributes(
    scene: scenes.Scene, placed: tuple[scenes.Placed, ...], name: str, values: list[str]
) -> tuple[scenes.Scene, tuple[scenes.Placed, ...]]:
    """Scene and layout with new values of one attribute, one for each thing."""
    things = tuple(replace(t, **{name: v}) for t, v in zip(scene.things, values, strict=True))  # type: ignore[arg-type]
    drawn = tuple(replace(p, **{name: v}) for p, v in zip(placed, values, strict=True))  # type: ignore[arg-type]
    return replace(scene, things=things), drawn


def encoded(picture: np.ndarray) -> bytes:
    """A picture `[64, 64, 3]` uint8 as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG")
    return stream.getvalue()
