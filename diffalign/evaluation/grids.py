"""Pictures side by side: plain grids, and base against tuned with prompts and marks."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.evaluation.pictures import to_uint8

CELL = 192
GAP = 10
TEXT = (32, 36, 42)
MUTED = (110, 118, 128)
RIGHT = (22, 140, 62)
WRONG = (200, 40, 40)
Mark = Literal["right", "wrong"] | None


@dataclass(frozen=True)
class Row:
    """One prompt with its base and tuned picture `[3, H, W]`, whether each is right, and notes."""

    prompt: str
    base: Tensor
    tuned: Tensor
    marks: tuple[Mark, Mark] = (None, None)
    notes: tuple[str, str] = ("", "")


def image_grid(
    images: Tensor, columns: int, labels: Sequence[str] = (), *, cell: int | None = None
) -> Image.Image:
    """Pictures `[N, 3, H, W]` in [0, 1] in rows of `columns`, with an optional label below each.

    Small pictures are enlarged by a whole factor without smoothing, large ones reduced, to about `cell`
    pixels (192 unless given).

    Raises:
        DiffalignError: no pictures, fewer than one column, or another number of labels than pictures.
    """
    if len(images) == 0 or columns < 1:
        raise DiffalignError(
            f"a grid needs pictures and at least one column; got {len(images)} and {columns}"
        )
    if labels and len(labels) != len(images):
        raise DiffalignError(f"{len(labels)} labels for {len(images)} pictures; expected one each")
    tiles = [fit(Image.fromarray(to_uint8(image)), cell or CELL) for image in images]
    width, height = tiles[0].size
    captions = [_wrap(label, width) for label in labels] or [[]] * len(tiles)
    text_height = _line_height() * max(len(lines) for lines in captions)
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    step_y = height + text_height + GAP
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, rows * step_y + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (tile, lines) in enumerate(zip(tiles, captions, strict=True)):
        x, y = GAP + (i % columns) * (width + GAP), GAP + (i // columns) * step_y
        canvas.paste(tile, (x, y))
        _write(pen, x, y + height, lines, TEXT)
    return canvas


def comparison_grid(
    rows: Sequence[Row], *, names: tuple[str, str] = ("base", "tuned"), pairs_per_line: int = 3
) -> Image.Image:
    """Base and tuned pictures next to each other under their prompts, with green ticks and red crosses.

    Raises:
        DiffalignError: no rows.
    """
    if not rows:
        raise DiffalignError("no pictures to show side by side; expected at least one prompt")
    panels = [_panel(row, names) for row in rows]
    width = max(panel.width for panel in panels)
    columns = min(pairs_per_line, len(panels))
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in line) for line in lines]
    pad = 2 * GAP
    canvas = Image.new("RGB", (columns * (width + pad) + pad, sum(heights) + pad * (len(lines) + 1)), "white")
    y = pad
    for line, height in zip(lines, heights, strict=True):
        for column, panel in enumerate(line):
            canvas.paste(panel, (pad + column * (width + pad), y))
        y += height + pad
    return canvas


def fit(image: Image.Image, size: int) -> Image.Image:
    """Enlarge by the largest whole factor that stays within `size` pixels, or reduce to it."""
    longest = max(image.size)
    if longest > size:
        scale = size / longest
        target = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.resize(target, Image.Resampling.LANCZOS)
    factor = size // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _panel(row: Row, names: tuple[str, str]) -> Image.Image:
    """One prompt: its text, then both pictures with name, mark and note below."""
    tiles = [fit(Image.fromarray(to_uint8(image)), CELL) for image in (row.base, row.tuned)]
    width, height = tiles[0].size
    lines = _wrap(row.prompt, 2 * width + GAP)
    line = _line_height()
    top = line * len(lines) + 4
    has_notes = any(row.notes)
    panel = Image.new("RGB", (2 * width + GAP, top + height + line * (2 if has_notes else 1) + 6), "white")
    pen = ImageDraw.Draw(panel)
    _write(pen, 0, 0, lines, TEXT)
    for i, tile in enumerate(tiles):
        x, y = i * (width + GAP), top + height + 4
        panel.paste(tile, (x, top))
        _mark(pen, x + 8, y + line // 2 - 1, row.marks[i])
        _write(pen, x + (22 if row.marks[i] else 0), y, [names[i]], MUTED)
        _write(pen, x, y + line, [row.notes[i]], MUTED)
    return panel


def _mark(pen: ImageDraw.ImageDraw, x: int, y: int, mark: Mark) -> None:
    """A tick or a cross centred at (x, y): shapes differ, so that colour is not the only sign."""
    if mark == "right":
        pen.line([(x - 6, y), (x - 2, y + 5), (x + 7, y - 6)], fill=RIGHT, width=3, joint="curve")
    elif mark == "wrong":
        pen.line([(x - 5, y - 5), (x + 5, y + 5)], fill=WRONG, width=3)
        pen.line([(x - 5, y + 5), (x + 5, y - 5)], fill=WRONG, width=3)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=14)


def _line_height() -> int:
    return 18


def _wrap(text: str, width: int, most: int = 4) -> list[str]:
    """Lines of at most `width` pixels, the last one shortened when there are more than `most`."""
    per_line = max(8, int(width / (_font().getlength("abcdefghij klmnopqrst") / 21)))
    return textwrap.wrap(text, per_line, max_lines=most, placeholder=" …")


def _write(
    pen: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[str], color: tuple[int, int, int]
) -> None:
    for i, text in enumerate(lines):
        pen.text((x, y + i * _line_height()), text, fill=color, font=_font())
