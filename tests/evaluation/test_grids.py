"""Grids: sizes, places and marks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import flat
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.evaluation.grids import GAP, RIGHT, WRONG, Row, comparison_grid, fit, image_grid


def _colors(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(c) for c in np.asarray(image).reshape(-1, 3)}


def test_small_pictures_are_enlarged_without_smoothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    large = fit(Image.fromarray(pixels), 18)
    assert large.size == (16, 16)
    assert np.array_equal(np.asarray(large), pixels.repeat(4, 0).repeat(4, 1))


def test_large_pictures_are_reduced_and_keep_their_shape() -> None:
    assert fit(Image.new("RGB", (1000, 500)), 200).size == (200, 100)


def test_grid_puts_pictures_in_reading_order() -> None:
    values = [0.0, 0.2, 0.4, 0.6, 0.8]
    grid = image_grid(flat(values), 3, cell=8)
    assert grid.size == (3 * (8 + GAP) + GAP, 2 * (8 + GAP) + GAP)
    places = [(GAP + 4 + (i % 3) * (8 + GAP), GAP + 4 + (i // 3) * (8 + GAP)) for i in range(5)]
    assert [grid.getpixel(p)[0] for p in places] == [round(v * 255) for v in values]


def test_labels_need_room_below() -> None:
    plain, labelled = image_grid(flat([0.5] * 2), 2), image_grid(flat([0.5] * 2), 2, ["one", "two"])
    assert labelled.height > plain.height
    assert labelled.width == plain.width


@pytest.mark.parametrize(("count", "columns", "labels"), [(0, 2, ()), (2, 0, ()), (2, 2, ("one",))])
def test_impossible_grids_are_refused(count: int, columns: int, labels: tuple[str, ...]) -> None:
    with pytest.raises(DiffalignError):
        image_grid(torch.zeros(count, 3, 4, 4), columns, labels)


def test_marks_show_right_and_wrong() -> None:
    grey = flat([0.5])[0]
    right = comparison_grid([Row("a prompt", grey, grey, ("right", "right"))])
    mixed = comparison_grid([Row("a prompt", grey, grey, ("wrong", "right"))])
    plain = comparison_grid([Row("a prompt", grey, grey)])
    assert RIGHT in _colors(right)
    assert WRONG not in _colors(right)
    assert {RIGHT, WRONG} <= _colors(mixed)
    assert not {RIGHT, WRONG} & _colors(plain)


def test_long_prompts_and_notes_fit() -> None:
    grey = flat([0.5])[0]
    short = comparison_grid([Row("word", grey, grey)])
    long = comparison_grid([Row("a very long prompt " * 30, grey, grey, notes=("1.5", "2.5"))])
    assert long.width == short.width
    assert short.height < long.height < 3 * short.height


def test_empty_comparison_is_refused() -> None:
    with pytest.raises(DiffalignError, match="at least one prompt"):
        comparison_grid([])
