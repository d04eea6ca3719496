"""Scenes: pictures of one to three coloured shapes on a plain background, with captions that say what is there.

A caption belongs to one of the GenEval categories (Ghosh et al. 2023). About a fifth of all attribute
combinations is held out: no training picture contains them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from diffalign.randomness import derive_seed

RESOLUTION = 64
SUPERSAMPLING = 4
GAP = 3.0

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (40, 160, 60),
    "blue": (30, 90, 205),
    "yellow": (245, 200, 25),
    "purple": (150, 60, 190),
    "black": (35, 35, 35),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": (6.0, 8.0), "large": (11.5, 14.0)}
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3}
CATEGORIES = (
    "single_object", "two_objects", "counting", "colors", "position", "attribute_binding",
)  # fmt: skip

# Coloured shapes that appear in no training picture at all.
RESERVED = {("purple", "star"), ("green", "triangle"), ("black", "circle")}
HELD_OUT_FRACTION = 0.2


@dataclass(frozen=True)
class Thing:
    """One object of a scene; an attribute the caption leaves open is None."""

    shape: str
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a caption asks for. `relation` places the first thing relative to the second."""

    category: str
    things: tuple[Thing, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Placed:
    """A drawn object: attributes, centre and radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def caption(scene: Scene) -> str:
    """The caption of a scene, for instance `a blue square left of a yellow star`."""
    if scene.category == "counting":
        number = next(word for word, n in NUMBERS.items() if n == len(scene.things))
        return f"{number} {_noun(scene.things[0])}s"
    parts = [f"a {_noun(thing)}" for thing in scene.things]
    return f" {scene.relation or 'and'} ".join(parts)


def _noun(thing: Thing) -> str:
    return " ".join(word for word in (thing.size, thing.color, thing.shape) if word)


_THING = (
    rf"(?:(?P<size{{0}}>{'|'.join(SIZES)}) )?"
    rf"(?:(?P<color{{0}}>{'|'.join(PALETTE)}) )?"
    rf"(?P<shape{{0}}>{'|'.join(SHAPES)})"
)
_PAIR = re.compile(rf"an? {_THING.format(1)} (?P<link>and|{'|'.join(RELATIONS)}) an? {_THING.format(2)}")
_ONE = re.compile(rf"an? {_THING.format(1)}")
_MANY = re.compile(rf"(?P<number>{'|'.join(NUMBERS)}) {_THING.format(1)}s")


def parse_caption(text: str) -> Scene:
    """Read a caption back into the scene it asks for.

    Raises:
        ValueError: the text is not a caption of this world.
    """
    words = re.sub(r"to the (left|right) of", r"\1 of", " ".join(text.lower().strip(" .").split()))
    if match := _MANY.fullmatch(words):
        return Scene("counting", (_thing(match, 1),) * NUMBERS[match["number"]])
    if match := _ONE.fullmatch(words):
        thing = _thing(match, 1)
        return Scene("colors" if thing.color and not thing.size else "single_object", (thing,))
    if match := _PAIR.fullmatch(words):
        things = (_thing(match, 1), _thing(match, 2))
        if match["link"] != "and":
            return Scene("position", things, match["link"])
        binding = all(thing.color for thing in things)
        return Scene("attribute_binding" if binding else "two_objects", things)
    raise ValueError(
        f"{text!r} is not a scene caption; expected for instance 'a red circle', 'two blue stars' or "
        "'a blue square left of a yellow star'"
    )


def _thing(match: re.Match[str], n: int) -> Thing:
    return Thing(match[f"shape{n}"], match[f"color{n}"], match[f"size{n}"])


def is_held_out(scene: Scene) -> bool:
    """Whether the combination of attributes belongs to the held-out fifth (order and relation do not matter)."""
    if any((thing.color, thing.shape) in RESERVED for thing in scene.things):
        return True
    if scene.category in ("colors", "single_object") and not scene.things[0].size:
        return False
    if scene.category == "counting":
        key = [f"{len(scene.things)} {_noun(scene.things[0])}"]
    else:
        key = sorted(_noun(thing) for thing in scene.things)
    return derive_seed("held out", *key) % 1000 < 1000 * HELD_OUT_FRACTION


def random_scene(rng: Generator, category: str | None = None) -> Scene:
    """Draw what a caption asks for; categories are equally likely unless one is given."""
    category = category or str(rng.choice(CATEGORIES))
    shape, other = rng.choice(SHAPES, 2, replace=False)
    color, second = (str(c) for c in rng.choice(list(PALETTE), 2, replace=False))
    first = Thing(str(shape), color)
    if category == "single_object":
        size = str(rng.choice(list(SIZES)))
        return Scene(category, (replace(first, size=size),))
    if category == "colors":
        return Scene(category, (first,))
    if category == "counting":
        return Scene(category, (first,) * int(rng.choice(list(NUMBERS.values()))))
    if category == "two_objects":
        pair = (first, Thing(str(other)))
        return Scene(category, pair if rng.random() < 0.5 else pair[::-1])
    pair = (first, Thing(str(other), second))
    relation = str(rng.choice(RELATIONS)) if category == "position" else None
    return Scene(category, pair, relation)


def training_scenes(seed: int) -> Iterator[tuple[Scene, tuple[Placed, ...]]]:
    """Endless scenes with their layouts; neither caption nor picture shows a held-out combination."""
    rng = np.random.default_rng(derive_seed("training scenes", seed))
    while True:
        scene = random_scene(rng)
        complete = complete_scene(scene, rng)
        if not is_held_out(scene) and not is_held_out(complete):
            yield scene, place(complete, rng)


def held_out_captions(seed: int = 0) -> list[tuple[str, str]]:
    """Held-out captions as (caption, category), at most 100 a category, shuffled, categories interleaved evenly."""
    rng = np.random.default_rng(derive_seed("held-out captions", seed))
    found: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for category in CATEGORIES:
        for _ in range(6000):
            scene = random_scene(rng, category)
            text = caption(scene)
            if is_held_out(scene) and text not in found[category] and len(found[category]) < 100:
                found[category].append(text)
    spread = [
        (i / len(texts), text, category) for category, texts in found.items() for i, text in enumerate(texts)
    ]
    return [(text, category) for _, text, category in sorted(spread)]


def complete_scene(scene: Scene, rng: Generator) -> Scene:
    """Fill in what the caption leaves open: colours (distinct between things; one for a counted group)."""
    taken = {thing.color for thing in scene.things}
    free = [color for color in PALETTE if color not in taken]
    color = str(rng.choice(free))
    return replace(scene, things=tuple(replace(t, color=t.color or color) for t in scene.things))


def place(scene: Scene, rng: Generator) -> tuple[Placed, ...]:
    """Positions and radii for a completed scene, without overlap and inside the picture.

    Raises:
        ValueError: a thing has no colour.
    """
    if any(thing.color is None for thing in scene.things):
        raise ValueError("place() needs a completed scene; call complete_scene first")
    while True:
        low, high = (7.0, 13.0) if len(scene.things) == 1 else (6.5, 10.5)
        common = rng.uniform(low, 9.0)
        placed = []
        for thing in scene.things:
            radius = rng.uniform(*SIZES[thing.size]) if thing.size else rng.uniform(low, high)
            radius = common if scene.category == "counting" else radius
            x, y = rng.uniform(radius + 2, RESOLUTION - radius - 2, 2)
            placed.append(Placed(thing.shape, str(thing.color), float(x), float(y), float(radius)))
        if _apart(placed) and _obeys(placed, scene.relation):
            return tuple(placed)


def _obeys(placed: list[Placed], relation: str | None) -> bool:
    """Clearly in the relation: further from the diagonal than the judge asks for."""
    return relation is None or stands(placed[0], placed[1], relation, margin=12.0, slope=0.75)


def _apart(placed: list[Placed]) -> bool:
    return all(
        np.hypot(a.x - b.x, a.y - b.y) > 1.15 * (a.radius + b.radius) + GAP
        for i, a in enumerate(placed)
        for b in placed[:i]
    )


def stands(a: Placed, b: Placed, relation: str, margin: float, slope: float = 1.0) -> bool:
    """Whether `a` is `margin` pixels or more in `relation` to `b`, and at most `slope` times that off across it."""
    dx, dy = a.x - b.x, a.y - b.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("left of", "above"):
        along = -along
    return bool(along >= margin and slope * along > abs(across))


def draw(placed: tuple[Placed, ...], background: tuple[int, int, int] = (240, 240, 240)) -> np.ndarray:
    """Render objects to an antialiased picture `[64, 64, 3]` uint8."""
    size = RESOLUTION * SUPERSAMPLING
    canvas = Image.new("RGB", (size, size), background)
    pen = ImageDraw.Draw(canvas)
    for thing in placed:
        points = outline(thing.shape, thing.x, thing.y, thing.radius) * SUPERSAMPLING
        pen.polygon([tuple(p) for p in points], fill=PALETTE[thing.color])
    return np.asarray(canvas.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX))


def outline(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """The polygon `[N, 2]` of a shape around a centre, in pixels."""
    if shape == "square":
        unit = 0.86 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    elif shape == "triangle":
        unit = np.array([[0, -1], [0.98, 0.75], [-0.98, 0.75]])
    else:
        count, inner = (48, 1.0) if shape == "circle" else (10, 0.45)
        angles = np.arange(count) * 2 * np.pi / count - np.pi / 2
        lengths = np.where(np.arange(count) % 2 == 0, 1.0, inner)
        unit = np.stack([np.cos(angles), np.sin(angles)], 1) * lengths[:, None]
    return unit * radius + np.array([x, y])


def random_background(rng: Generator) -> tuple[int, int, int]:
    """A light, nearly neutral background."""
    r, g, b = (int(v) for v in rng.integers(226, 252) + rng.integers(-4, 5, 3))
    return r, g, b
