"""The embedded world's captioner: says in the language of its captions what the judge sees in a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import permutations

import numpy as np
from PIL import Image

from diffalign.samples.judge import RELATION_MARGIN, SIZE_LIMIT, Found, find_objects
from diffalign.samples.scenes import (
    NUMBERS,
    RELATIONS,
    RESOLUTION,
    SIZES,
    Placed,
    Scene,
    Thing,
    caption,
    stands,
)


def describe(image: Image.Image, prompt: str) -> str:
    """A caption that is true of the picture, in words like the prompt's; sizes and places are told if it names some.

    The language holds two objects, or three that are alike: of more, some are told. Objects of no known shape are not
    told at all; a colour that cannot be made out is left open.

    Raises:
        ValueError: the picture is not 64 x 64, or shows no object of a known shape.
    """
    if image.size != (RESOLUTION, RESOLUTION):
        raise ValueError(
            f"the picture has {image.width}x{image.height} pixels; expected {RESOLUTION}x{RESOLUTION}"
        )
    found = [seen for seen in find_objects(np.asarray(image.convert("RGB"))) if seen.shape != "unknown"]
    if not found:
        raise ValueError("no circle, square, triangle or star is seen")
    words = prompt.lower().split()
    texts = list(dict.fromkeys(caption(scene) for scene in _scenes(found, prompt.lower())))
    return max(texts, key=lambda text: SequenceMatcher(None, text.split(), words, autojunk=False).ratio())


def _scenes(found: Sequence[Found], prompt: str) -> Iterator[Scene]:
    """What can be said of the objects: all of them if the language can, else two or three."""
    things = [_thing(seen) for seen in found]
    if len(found) == 1:
        size = _size(found[0]) if any(size in prompt for size in SIZES) else None
        yield Scene("single_object", (Thing(things[0].shape, things[0].color, size),))
        return
    alike = Counter(things)
    if len(found) == 3 and len({thing.shape for thing in things}) == 1 < len(alike):
        yield Scene("counting", (Thing(things[0].shape),) * 3)
        return
    for thing, count in alike.items():
        if count > 1:
            yield Scene("counting", (thing,) * min(count, max(NUMBERS.values())))
    placed = any(relation in prompt for relation in RELATIONS)
    for a, b in permutations(found, 2):
        if _thing(a) != _thing(b):
            yield _pair(a, b, placed)


def _pair(a: Found, b: Found, placed: bool) -> Scene:
    """Two different objects, and how they stand to each other when that is to be told and clear."""
    things = (_thing(a), _thing(b))
    first, second = (Placed(seen.shape, seen.color, seen.x, seen.y, seen.radius) for seen in (a, b))
    relations = [name for name in RELATIONS if placed and stands(first, second, name, RELATION_MARGIN)]
    return Scene("position", things, relations[0]) if relations else Scene("attribute_binding", things)


def _thing(seen: Found) -> Thing:
    return Thing(seen.shape, None if seen.color == "mixed" else seen.color)


def _size(seen: Found) -> str:
    return "small" if seen.radius < SIZE_LIMIT else "large"
