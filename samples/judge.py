"""The exact judge: looks at a picture, finds its objects, and says what of a caption is right.

Segmentation against the border colour, connected components, colour by projection on the palette and shape by
overlap with templates. It works on pixels alone and knows nothing of how the picture was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from scipy import ndimage

from diffalign.samples.scenes import PALETTE, SHAPES, Placed, Scene, Thing, draw, parse_caption, stands

MIN_AREA = 24
MIN_CONTRAST = 70.0
MIN_OVERLAP = 0.8
MIN_PURITY = 0.8
SIZE_LIMIT = 9.8
RELATION_MARGIN = 5.0
TEMPLATE = 32
# Bounding-box width over radius of each outline in scenes.outline.
WIDTH = {"circle": 2.0, "square": 1.72, "triangle": 1.96, "star": 1.9}


@dataclass(frozen=True)
class Found:
    """An object seen in a picture; `shape` is `unknown` where no template fits, `color` `mixed` where none prevails."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    overlap: float
    purity: float


@dataclass(frozen=True)
class Verdict:
    """What is right. `correct` when every check holds; `score` is the fraction of checks that hold."""

    correct: bool
    score: float
    category: str
    checks: dict[str, bool]
    quality: float


def judge(image: np.ndarray, prompt: str | Scene) -> Verdict:
    """Judge a picture `[H, W, 3]` uint8 (64 x 64) against a caption.

    `quality` in [0, 1] says how well the found objects fit their templates and how pure their colours are.

    Raises:
        ValueError: the prompt is not a scene caption, or the picture has another shape.
    """
    scene = parse_caption(prompt) if isinstance(prompt, str) else prompt
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"judge expects a picture [H, W, 3], got {image.shape}")
    found = find_objects(image)
    checks = _best_assignment(scene, found)
    quality = float(np.mean([f.overlap * f.purity for f in found])) if found else 0.0
    score = sum(checks.values()) / len(checks)
    return Verdict(all(checks.values()), score, scene.category, checks, quality)


def _best_assignment(scene: Scene, found: list[Found]) -> dict[str, bool]:
    """The checks under the matching of objects to things that satisfies most of them."""
    candidates: list[Found | None] = [*found[:6], *[None] * len(scene.things)]
    options = (_checks(scene, chosen, len(found)) for chosen in permutations(candidates, len(scene.things)))
    return max(options, key=lambda checks: sum(checks.values()))


def _checks(scene: Scene, chosen: tuple[Found | None, ...], total: int) -> dict[str, bool]:
    checks = {"count": total == len(scene.things)}
    for i, (thing, seen) in enumerate(zip(scene.things, chosen, strict=True), 1):
        checks |= {f"{name}_{i}": ok for name, ok in _thing_checks(thing, seen).items()}
    if scene.relation:
        a, b = chosen
        checks["relation"] = bool(a and b and stands(_placed(a), _placed(b), scene.relation, RELATION_MARGIN))
    return checks


def _thing_checks(thing: Thing, seen: Found | None) -> dict[str, bool]:
    checks = {"shape": seen is not None and seen.shape == thing.shape}
    if thing.color:
        checks["color"] = seen is not None and seen.color == thing.color
    if thing.size:
        small = seen is not None and seen.radius < SIZE_LIMIT
        checks["size"] = seen is not None and small == (thing.size == "small")
    return checks


def _placed(seen: Found) -> Placed:
    return Placed(seen.shape, seen.color, seen.x, seen.y, seen.radius)


def find_objects(image: np.ndarray) -> list[Found]:
    """Objects of at least 24 pixels, largest first."""
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                             pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    background = np.median(border, 0)
    mask = np.linalg.norm(pixels - background, axis=2) > MIN_CONTRAST
    colors = _nearest_colors(pixels, background)
    parts, count = ndimage.label(mask)
    regions = [region for i in range(1, count + 1) for region in _split(parts == i, colors)]
    found = [_describe(region, colors) for region in regions if region.sum() >= MIN_AREA]
    return sorted(found, key=lambda f: -f.radius)


def _nearest_colors(pixels: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Palette index `[H, W]` of the colour whose line to the background passes closest: edges blend the two."""
    offset = pixels - background
    residuals = []
    for rgb in PALETTE.values():
        axis = np.array(rgb, np.float32) - background
        amount = np.clip(offset @ axis / (axis @ axis), 0, 1.1)
        residuals.append(np.linalg.norm(offset - amount[..., None] * axis, axis=2))
    return np.argmin(residuals, 0)


def _split(region: np.ndarray, colors: np.ndarray) -> list[np.ndarray]:
    """Cut a connected region where two colours each hold a solid part: objects that touch, or a two-coloured object."""
    counts = np.bincount(colors[region], minlength=len(PALETTE))
    solid = [c for c in np.flatnonzero(counts >= MIN_AREA) if counts[c] >= (1 - MIN_PURITY) * region.sum()]
    if len(solid) < 2:
        return [region]
    pieces = []
    for color in solid:
        labels, count = ndimage.label(region & (colors == color))
        pieces += [labels == i for i in range(1, count + 1)]
    return pieces


def _describe(region: np.ndarray, colors: np.ndarray) -> Found:
    rows, columns = np.nonzero(region)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    shape, overlap = _shape(region[top:bottom, left:right])
    counts = np.bincount(colors[region], minlength=len(PALETTE))
    purity = float(counts.max() / counts.sum())
    color = list(PALETTE)[int(counts.argmax())] if purity >= MIN_PURITY else "mixed"
    radius = (right - left) / WIDTH.get(shape, 2.0)
    return Found(shape, color, (left + right) / 2, (top + bottom) / 2, float(radius), overlap, purity)


def _shape(mask: np.ndarray) -> tuple[str, float]:
    """The template of largest intersection over union after scaling to one box, and that overlap."""
    height, width = mask.shape
    if not 0.66 <= width / height <= 1.5:
        return "unknown", 0.0
    scaled = _scale(mask.astype(np.float32))
    names, templates = _templates()
    both = np.minimum(scaled, templates).sum((1, 2))
    overlap = both / np.maximum(scaled, templates).sum((1, 2))
    best = int(overlap.argmax())
    name = names[best] if overlap[best] >= MIN_OVERLAP else "unknown"
    return name, float(overlap[best])


def _scale(mask: np.ndarray) -> np.ndarray:
    zoomed = ndimage.zoom(mask, (TEMPLATE / mask.shape[0], TEMPLATE / mask.shape[1]), order=1)
    return (zoomed > 0.5).astype(np.float32)


@lru_cache(maxsize=1)
def _templates() -> tuple[list[str], np.ndarray]:
    names, masks = [], []
    for shape in SHAPES:
        for radius in (6.0, 6.5, 7.0, 8.0, 9.0, 10.5, 12.0, 14.0):
            for shift in (0.0, 0.5):
                image = draw((Placed(shape, "black", 32 + shift, 32 + shift, radius),))
                mask = image.min(2) < 150
                rows, columns = np.nonzero(mask)
                box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
                names.append(shape)
                masks.append(_scale(box.astype(np.float32)))
    return names, np.stack(masks)
