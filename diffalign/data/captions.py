"""A caption of its own for the rejected picture, perturbed from the given one.

Dual captions (DCPO, Saeidi et al. 2025, arXiv 2502.06023): with one caption for both pictures the rejected one is told
something that it does not show. Its variants: -c captions both pictures (`captioning`), -p perturbs the rejected
picture's caption (`perturb_rejected`), -h captions both and perturbs the rejected one's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

from diffalign.data.records import PreferenceRecord, Records
from diffalign.errors import DiffalignError, did_you_mean
from diffalign.randomness import derive_seed

# The paper's levels are DIPPER's lexical diversities 40, 60 and 80 %; here the share of attribute words that change.
LEVELS = {"weak": 0.4, "medium": 0.6, "strong": 0.8}

# Words that can stand for each other; a changed caption stays a sentence, but describes another picture.
ATTRIBUTES: tuple[tuple[str, ...], ...] = (
    ("red", "green", "blue", "yellow", "purple", "black"),
    ("white", "orange", "pink", "brown", "gray", "golden", "silver"),
    ("circle", "square", "triangle", "star"),
    ("circles", "squares", "triangles", "stars"),
    ("small", "large"),
    ("tiny", "huge"),
    ("left", "right"),
    ("above", "below"),
    ("under", "over"),
    ("inside", "outside"),
    ("front", "back"),
    ("two", "three"),
    ("four", "five", "six"),
    ("old", "young"),
    ("new", "ancient"),
    ("tall", "short"),
    ("happy", "sad", "angry"),
    ("bright", "dark"),
    ("day", "night"),
    ("morning", "evening"),
    ("summer", "winter"),
    ("wooden", "metal", "glass", "stone", "plastic"),
    ("man", "woman", "boy", "girl"),
    ("cat", "dog", "horse", "bird"),
    ("photo", "painting", "drawing", "sketch"),
)
_FAMILY = {word: family for family in ATTRIBUTES for word in family}
_SHORTEST_DROPPED = 4


def perturb_caption(text: str, level: str = "medium", seed: int = 0) -> str:
    """A caption that says something else: attributes swapped with each other or replaced by another of their kind.

    `LEVELS` gives the share of attribute words (colours, shapes, sizes, numbers, relations, materials, ...) that
    change, at least one. A caption without any loses that share of its longer words, at least one while two or
    more are left. The result depends on the text, the level and the seed only.

    Raises:
        DiffalignError: no such level.
    """
    check_level(level)
    words = re.findall(r"\w+|\W+", text)
    attributes = [i for i, word in enumerate(words) if word.lower() in _FAMILY]
    if not attributes:
        return _dropped(words, level, seed) or text
    changed = list(words)
    for place in _some(attributes, LEVELS[level], seed, "which", text):
        changed[place] = _another(words, place, derive_seed(seed, "other", place, text))
    return "".join(changed)


def perturb_rejected(records: Records, level: str, seed: int = 0) -> Records:
    """The same records with a perturbed caption for the picture their label rejects; ties keep theirs.

    Captions belong to pictures: the control `data.labels=swapped` reverses the preference and nothing else.

    Raises:
        DiffalignError: no such level.
    """
    rows = [perturbed(row, level, seed) for row in records.rows]
    identity = None if records.identity is None else _identity(records.identity, "perturbed", level, seed)
    return replace(records, rows=rows, identity=identity)


def check_level(level: str) -> None:
    """Compare a level with the known ones.

    Raises:
        DiffalignError: no such level.
    """
    if level not in LEVELS:
        raise DiffalignError(
            f"the perturbation level is {level!r}; expected one of: {', '.join(LEVELS)}."
            f"{did_you_mean(level, list(LEVELS))}"
        )


def perturbed(row: PreferenceRecord, level: str, seed: int = 0) -> PreferenceRecord:
    """A record whose rejected picture has a perturbed caption; ties keep theirs.

    Raises:
        DiffalignError: no such level.
    """
    first, second = row.prompts
    if row.is_tie:
        return row
    if row.chosen is row.image_0 and row.label_0 > 0.5:
        return replace(row, prompt_1=perturb_caption(second, level, seed))
    return replace(row, prompt=perturb_caption(first, level, seed), prompt_1=second)


def _another(words: Sequence[str], place: int, key: int) -> str:
    """Another word of the same family; one that the caption uses elsewhere goes first: a swap is the hardest change."""
    word = words[place].lower()
    family = _FAMILY[word]
    used = sorted({other.lower() for other in words} & set(family) - {word})
    options = used or [other for other in family if other != word]
    other = options[key % len(options)]
    return other.capitalize() if words[place][0].isupper() else other


def _dropped(words: Sequence[str], level: str, seed: int) -> str:
    """The caption without some of its longer words."""
    text = "".join(words)
    long = [i for i, word in enumerate(words) if word.isalnum() and len(word) >= _SHORTEST_DROPPED]
    if len(long) < 2:
        return text
    gone = _some(long, LEVELS[level], seed, "dropped", text)
    return " ".join("".join(word for i, word in enumerate(words) if i not in gone).split())


def _some(places: Sequence[int], share: float, seed: int, *keys: str) -> list[int]:
    """A seeded choice of `share` of the places: at least one, and never all of several, which could say the same."""
    count = max(1, min(round(share * len(places)), len(places) - 1))
    return sorted(places, key=lambda place: derive_seed(seed, place, *keys))[:count]


def _identity(base: str, *keys: object) -> str:
    return hashlib.blake2b(f"{base}{keys!r}".encode(), digest_size=16).hexdigest()
