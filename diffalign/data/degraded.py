"""Preferences nobody had to state: a picture is better than a degraded copy of itself, and that than a worse one.

Self-supervised auxiliary pairs after Self-supervised Preference Optimization (arXiv 2409.17791), which orders
degraded versions of an answer by degree. A ladder holds the picture and copies of it, each more degraded in one way.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageFilter

from diffalign.data.images import BrokenImage, decode
from diffalign.data.records import ImageSource, PreferenceRecord, Records
from diffalign.randomness import derive_seed
from diffalign.samples.degrade import bend

RUNGS = 3
"""Degraded copies of a ladder; rung 0 is the picture itself."""
SOURCE = "degraded"
"""`source` of the records that `with_degraded` adds begins with this word."""
# Bytes of nothing: readers of pictures count them as a missing image.
NOTHING = b""


@dataclass(frozen=True)
class Step:
    """One comparison on a ladder: rung `better` against rung `worse` of the record's preferred picture."""

    record: int
    kind: str
    better: int
    worse: int
    better_first: bool


def ladder(image: Image.Image, kind: str, seed: int = 0) -> list[Image.Image]:
    """The picture and `RUNGS` copies of it, each more degraded than the one before; `kind` as in `DEGRADATIONS`."""
    return [degraded(image, kind, rung, seed) for rung in range(RUNGS + 1)]


def degraded(image: Image.Image, kind: str, rung: int, seed: int = 0) -> Image.Image:
    """An RGB picture degraded in one way; rung 0 is the picture itself, `RUNGS` the worst.

    The result depends on the picture and the arguments only. Sizes stay.

    Raises:
        ValueError: a kind or rung that is not there.
    """
    if kind not in DEGRADATIONS or not 0 <= rung <= RUNGS:
        raise ValueError(f"degraded({kind!r}, {rung}); expected {', '.join(DEGRADATIONS)} and 0 to {RUNGS}")
    return DEGRADATIONS[kind](image, rung / RUNGS, np.random.default_rng(seed)) if rung else image


def _blur(image: Image.Image, strength: float, draws: np.random.Generator) -> Image.Image:
    """Gaussian blur up to a 32nd of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(strength * min(image.size) / 32))


def _noise(image: Image.Image, strength: float, draws: np.random.Generator) -> Image.Image:
    """Gaussian noise, up to a quarter of the range; the rungs of a ladder show the same noise."""
    pixels = np.asarray(image, np.float32)
    return _picture(pixels + 64 * strength * draws.standard_normal(pixels.shape, np.float32))


def _jpeg(image: Image.Image, strength: float, draws: np.random.Generator) -> Image.Image:
    """JPEG compression, down to quality 4."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=round(4 * 7.5 ** (1 - strength)))
    with Image.open(buffer) as opened:
        return opened.convert("RGB")


def _tint(image: Image.Image, strength: float, draws: np.random.Generator) -> Image.Image:
    """A colour cast in a random direction, up to 80 of 255 levels, that keeps the mean brightness."""
    cast = draws.standard_normal(3).astype(np.float32)
    cast -= cast.mean()
    return _picture(np.asarray(image, np.float32) + 80 * strength * cast / np.abs(cast).max())


def _bend(image: Image.Image, strength: float, draws: np.random.Generator) -> Image.Image:
    """Content moved along a smooth random field, up to a 24th of the shorter side (rms): outlines and limbs bend."""
    pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)[None]
    amount = torch.tensor([strength * min(image.size) / 24])
    field = torch.Generator().manual_seed(int(draws.integers(2**31)))
    return _picture(bend(pixels, amount, field)[0].permute(1, 2, 0).numpy())


DEGRADATIONS: dict[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "tint": _tint,
    "bend": _bend,
}
"""How a picture is degraded: RGB picture, strength in (0, 1], random draws to the worse picture."""


def with_degraded(records: Records, share: float, seed: int = 0) -> Records:
    """The records and, after them, `share` times as many comparisons of rungs of their preferred pictures.

    Both pictures of such a comparison have the caption of the original; the better one comes first in half of them.
    Which pictures, rungs and ways depends on the number of records and the seed only, so that the encoded pictures
    can be cached. A picture that cannot be read gives two empty images, which are counted as missing.
    """
    count = round(share * len(records))
    steps = [_step(index, len(records), seed) for index in range(count)]
    rows = [*records.rows, *(_row(records.rows[step.record], step) for step in steps)]

    def images(index: int) -> tuple[ImageSource, ImageSource]:
        if index < len(records):
            return records.images(index)
        return _pictures(records[steps[index - len(records)].record], steps[index - len(records)], seed)

    digest = hashlib.blake2b(f"{records.identity} {SOURCE} {count} {seed}".encode(), digest_size=16)
    identity = None if records.identity is None else digest.hexdigest()
    description = f"{records.description} and {count} degraded pairs"
    return replace(records, rows=rows, images=images, identity=identity, description=description)


def _step(index: int, records: int, seed: int) -> Step:
    """The comparison with this number: a record, a way, two rungs and which comes first."""
    draws = np.random.default_rng(derive_seed(seed, SOURCE, index))
    better, worse = sorted(draws.choice(RUNGS + 1, 2, replace=False).tolist())
    kind = list(DEGRADATIONS)[int(draws.integers(len(DEGRADATIONS)))]
    return Step(int(draws.integers(records)), kind, better, worse, bool(draws.integers(2)))


def _row(row: PreferenceRecord, step: Step) -> PreferenceRecord:
    """The comparison's record without its pictures."""
    prompt = row.prompts[0 if row.label_0 >= 0.5 else 1]
    return PreferenceRecord(
        prompt=prompt,
        image_0=NOTHING,
        image_1=NOTHING,
        label_0=1.0 if step.better_first else 0.0,
        source=f"{SOURCE} {step.kind} {step.better} {step.worse}: {row.source}",
        weight=row.weight,
        user=row.user,
    )


def _pictures(record: PreferenceRecord, step: Step, seed: int) -> tuple[ImageSource, ImageSource]:
    """The two rungs as PNG files, in the record's order."""
    try:
        image = decode(record.chosen)
    except BrokenImage:
        return NOTHING, NOTHING
    key = derive_seed(seed, SOURCE, step.record, step.kind)
    better, worse = (_png(degraded(image, step.kind, rung, key)) for rung in (step.better, step.worse))
    return (better, worse) if step.better_first else (worse, better)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
