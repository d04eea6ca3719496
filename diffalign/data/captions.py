"""A caption of its own for the rejected picture: perturbed from the given one, or written by a captioner.

Dual captions (DCPO, Saeidi et al. 2025, arXiv 2502.06023): with one caption for both pictures the rejected one is told
something that it does not show. Its variants: -c captions both pictures (`caption_records`), -p perturbs the rejected
picture's caption (`perturb_rejected`), -h captions both and perturbs the rejected one's.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.data.images import BrokenImage, decode
from diffalign.data.records import ImageSource, PreferenceRecord, Records
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

Captioner = Callable[[Image.Image, str], str]
"""A picture (upright RGB) and the prompt it was made from to a caption of what it shows."""


def perturb_caption(text: str, level: str = "medium", seed: int = 0) -> str:
    """A caption that says something else: attributes swapped with each other or replaced by another of their kind.

    `LEVELS` gives the share of attribute words (colours, shapes, sizes, numbers, relations, materials, ...) that
    change, at least one. A caption without any loses that share of its longer words, at least one while two or
    more are left. The result depends on the text, the level and the seed only.

    Raises:
        DiffalignError: no such level.
    """
    if level not in LEVELS:
        raise DiffalignError(
            f"the perturbation level is {level!r}; expected one of: {', '.join(LEVELS)}."
            f"{did_you_mean(level, list(LEVELS))}"
        )
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
    rows = [_perturbed(row, level, seed) for row in records.rows]
    identity = None if records.identity is None else _identity(records.identity, "perturbed", level, seed)
    return replace(records, rows=rows, identity=identity)


def caption_records(
    records: Records, captioner: Captioner | str, folder: Path, perturbation: str | None = None
) -> Path:
    """Caption every picture and write the pairs to `folder/captioned.jsonl`, ready as a `data.source`.

    Pictures held as bytes are written beside it. Records with a picture that cannot be decoded are left out.

    Args:
        captioner: the function, or `module:name` of one. perturbation: level for the rejected picture's caption
            (DCPO-h), None: as written (DCPO-c).

    Raises:
        DiffalignError: no such captioner or level, it returned no text, or no picture could be decoded.
    """
    function = load_captioner(captioner) if isinstance(captioner, str) else captioner
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, record in enumerate(records):
        try:
            prompts = [
                _captioned(function, image, prompt)
                for image, prompt in zip((record.image_0, record.image_1), record.prompts, strict=True)
            ]
        except BrokenImage:
            continue
        row = replace(record, prompt=prompts[0], prompt_1=prompts[1])
        row = row if perturbation is None else _perturbed(row, perturbation, 0)
        lines.append(_line(row, index, folder))
    if not lines:
        raise DiffalignError(
            f"no pair of {records.description} has two readable pictures; nothing to caption. Run `diffalign data "
            "validate` on the source."
        )
    path = folder / "captioned.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def load_captioner(path: str) -> Captioner:
    """The function that `module:name` names; modules of the current folder are found, too.

    Raises:
        DiffalignError: there is no such module or name, or it cannot be called.
    """
    module, _, name = path.partition(":")
    if not name:
        raise DiffalignError(
            f"the captioner is {path!r}; expected `module:name` of a function(image, prompt)"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function: Any = getattr(import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise DiffalignError(
            f"captioner {path!r}: {error}; expected `module:name` of an importable module"
        ) from error
    if not callable(function):
        raise DiffalignError(f"captioner {path!r} is a {type(function).__name__}; expected a function")
    return function  # type: ignore[no-any-return]


def _captioned(captioner: Captioner, image: ImageSource, prompt: str) -> str:
    caption = captioner(decode(image), prompt)
    if not isinstance(caption, str) or not caption.strip():
        raise DiffalignError(f"the captioner returned {caption!r} for {prompt!r}; expected a text")
    return caption


def _perturbed(row: PreferenceRecord, level: str, seed: int) -> PreferenceRecord:
    """A record whose rejected picture has a perturbed caption."""
    first, second = row.prompts
    if row.is_tie:
        return row
    if row.chosen is row.image_0 and row.label_0 > 0.5:
        return replace(row, prompt_1=perturb_caption(second, level, seed))
    return replace(row, prompt=perturb_caption(first, level, seed), prompt_1=second)


def _line(row: PreferenceRecord, index: int, folder: Path) -> dict[str, Any]:
    """The JSONL fields of a record, its pictures written where they are only bytes."""
    names = [
        _picture_name(image, index, slot, folder) for slot, image in enumerate((row.image_0, row.image_1))
    ]
    first, second = row.prompts
    line = {
        "chosen": names[0],
        "rejected": names[1],
        "chosen_prompt": first,
        "rejected_prompt": second,
        "label": row.label_0,
        "weight": row.weight,
        "source": row.source,
        "labels": dict(row.labels),
    }
    return line if row.user is None else {**line, "user": row.user}


def _picture_name(image: ImageSource, index: int, slot: int, folder: Path) -> str:
    if isinstance(image, Path):
        return str(image.absolute())
    name = f"images/{index:06d}-{slot}"
    (folder / "images").mkdir(exist_ok=True)
    (folder / name).write_bytes(image)
    return name


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
