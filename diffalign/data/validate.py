"""A look at preference data before anything is trained on it: counts, damage, duplicates, leakage."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from diffalign.data.images import MAX_PIXELS, BrokenImage, MissingImage, decode
from diffalign.data.keys import Progress, image_hash
from diffalign.data.records import PreferenceRecord, as_records

if TYPE_CHECKING:
    from rich.table import Table

LISTED = 20
WORKERS = min(8, os.cpu_count() or 1)


@dataclass
class ValidationReport:
    """What was found. Counts are of records unless said otherwise.

    Fields:
        source: the data in words.
        records, unlabelled: labelled ones, and ones left out because nobody judged them.
        ties: undecided ones.
        prompts, empty_prompts: distinct captions, and records with an empty one.
        missing_images, broken_images: images (not records); `faults` lists the first of them.
        unusable: records with a missing or broken image.
        size_mismatches: pairs whose images differ in size.
        duplicates: records that repeat an earlier one (same prompt and images, in either order).
        contradictions: duplicates whose label disagrees with the earlier one.
        held_out, overlap: held-out records, and how many of them have a prompt that is trained on; None
            when no held-out data were given. `overlapping` lists some of these prompts.
        usable_pairs: decided records with two good images: what `data.ties=drop` trains on.
        sizes: images per `WIDTHxHEIGHT`, most frequent first.
        notes: what the reader left out, in words.
    """

    source: str = ""
    records: int = 0
    unlabelled: int = 0
    ties: int = 0
    prompts: int = 0
    empty_prompts: int = 0
    missing_images: int = 0
    broken_images: int = 0
    unusable: int = 0
    size_mismatches: int = 0
    duplicates: int = 0
    contradictions: int = 0
    held_out: int | None = None
    overlap: int | None = None
    usable_pairs: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    overlapping: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether anything is left to train on."""
        return self.usable_pairs > 0

    @property
    def clean(self) -> bool:
        """Whether there is nothing to look at: no damage, contradictions, empty prompts or leakage."""
        return not (self.unusable or self.contradictions or self.empty_prompts or self.overlap)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self) | {"usable": self.usable, "clean": self.clean}

    def table(self) -> Table:
        """The report as a rich table, with the most frequent sizes and the first faults."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(self.source), show_header=False)
        for name, value in self._lines():
            table.add_row(name, escape(value))
        return table

    def _lines(self) -> list[tuple[str, str]]:
        def share(count: int) -> str:
            return f"{count:,} ({count / max(self.records, 1):.1%})"

        sizes = ", ".join(f"{size}: {count:,}" for size, count in islice(self.sizes.items(), 5))
        lines = [
            ("usable pairs", f"{share(self.usable_pairs)}{'' if self.usable else ' - nothing to train on'}"),
            ("labelled records", f"{self.records:,}"),
            ("unlabelled, skipped", f"{self.unlabelled:,}"),
            ("ties", share(self.ties)),
            ("distinct prompts", f"{self.prompts:,}"),
            ("empty prompts", share(self.empty_prompts)),
            ("missing images", f"{self.missing_images:,}"),
            ("broken images", f"{self.broken_images:,}"),
            ("pairs of unequal size", share(self.size_mismatches)),
            ("sizes (width x height)", f"{sizes}{', ...' if len(self.sizes) > 5 else ''}"),
            ("duplicate pairs", share(self.duplicates)),
            ("contradicting duplicates", f"{self.contradictions:,}"),
        ]
        if self.held_out is not None:
            lines.append(
                ("prompts shared with held-out", f"{self.overlap:,} of {self.held_out:,} held-out records")
            )
            lines += [("  shared prompt", prompt) for prompt in self.overlapping[:5]]
        lines += [("left out", note) for note in self.notes]
        for f in self.faults:
            lines.append((f"  record {f['record']}, image {f['image']}", f"{f['source']} {f['reason']}"))
        hidden = self.missing_images + self.broken_images - len(self.faults)
        return lines + ([("  and more", f"{hidden:,} images")] if hidden else [])


@dataclass(frozen=True)
class _Examined:
    """What one image turned out to be: its hash, and its size or its fault."""

    digest: bytes
    size: tuple[int, int] | None
    fault: BrokenImage | None


def validate(
    records: Sequence[PreferenceRecord],
    held_out: Sequence[PreferenceRecord] | None = None,
    max_pixels: int = MAX_PIXELS,
    listed: int = LISTED,
    progress: Progress | None = None,
) -> ValidationReport:
    """Examine preference records: every image is decoded once.

    Args:
        records: the training records.
        held_out: records that must not share prompts with them.
        max_pixels: larger images count as broken.
        listed: how many faults and shared prompts are listed; all are counted.
        progress: called with what is being done, how much is done, and how much there is.
    """
    records = as_records(records)
    report = ValidationReport(records.description, len(records), records.unlabelled)
    report.notes = list(records.notes)
    sizes: Counter[str] = Counter()
    seen: dict[tuple[bytes, ...], float] = {}
    for index, (record, images) in enumerate(_examined(records, max_pixels)):
        _count_images(report, sizes, index, record, images, listed)
        _count_duplicate(report, seen, record, images)
        report.ties += record.is_tie
        report.empty_prompts += not all(prompt.strip() for prompt in record.prompts)
        report.usable_pairs += not record.is_tie and not any(image.fault for image in images)
        if progress is not None:
            progress("examining images", index + 1, len(records))
    report.sizes = dict(sizes.most_common())
    prompts = {prompt for row in records.rows for prompt in row.prompts}
    report.prompts = len(prompts)
    if held_out is not None:
        _compare_prompts(report, prompts, held_out, listed)
    return report


def _examined(
    records: Sequence[PreferenceRecord], max_pixels: int
) -> Iterator[tuple[PreferenceRecord, list[_Examined]]]:
    """Each record with what its two images are; images are decoded by a few threads."""
    with ThreadPoolExecutor(WORKERS) as pool:
        iterator = iter(records)
        while chunk := list(islice(iterator, 4 * WORKERS)):
            images = [image for record in chunk for image in (record.image_0, record.image_1)]
            found = list(pool.map(lambda image: _examine(image, max_pixels), images))
            yield from ((record, found[2 * i : 2 * i + 2]) for i, record in enumerate(chunk))


def _examine(image: Any, max_pixels: int) -> _Examined:
    try:
        return _Examined(image_hash(image), decode(image, max_pixels).size, None)
    except BrokenImage as error:
        return _Examined(image_hash(image), None, error)


def _count_images(
    report: ValidationReport,
    sizes: Counter[str],
    index: int,
    record: PreferenceRecord,
    images: list[_Examined],
    listed: int,
) -> None:
    for number, (image, source) in enumerate(zip(images, (record.image_0, record.image_1), strict=True)):
        if image.size is not None:
            sizes["{}x{}".format(*image.size)] += 1
            continue
        missing = isinstance(image.fault, MissingImage)
        report.missing_images += missing
        report.broken_images += not missing
        if len(report.faults) < listed:
            name = record.source if isinstance(source, bytes) else str(source)
            report.faults.append(
                {"record": index, "image": number, "source": name, "reason": str(image.fault)}
            )
    good = [image.size for image in images if image.size is not None]
    report.unusable += len(good) < 2
    report.size_mismatches += len(good) == 2 and good[0] != good[1]


def _count_duplicate(
    report: ValidationReport,
    seen: dict[tuple[bytes, ...], float],
    record: PreferenceRecord,
    images: list[_Examined],
) -> None:
    """Compare with earlier records of the same prompts and images, in either order."""
    if any(image.fault for image in images):
        return
    sides = [(prompt.encode(), image.digest) for prompt, image in zip(record.prompts, images, strict=True)]
    turned = sides[1] < sides[0]
    key = (*sides[1], *sides[0]) if turned else (*sides[0], *sides[1])
    label = 1 - record.label_0 if turned else record.label_0
    if key not in seen:
        seen[key] = label
        return
    report.duplicates += 1
    report.contradictions += (seen[key] - 0.5) * (label - 0.5) < 0


def _compare_prompts(
    report: ValidationReport, prompts: set[str], held_out: Sequence[PreferenceRecord], listed: int
) -> None:
    rows = as_records(held_out).rows
    normal = {_normal(prompt) for prompt in prompts}
    shared = [row.prompt for row in rows if any(_normal(prompt) in normal for prompt in row.prompts)]
    report.held_out, report.overlap = len(rows), len(shared)
    report.overlapping = sorted(set(shared))[:listed]


def _normal(prompt: str) -> str:
    """A prompt without differences in case and white space, which are no difference for a held-out set."""
    return " ".join(prompt.lower().split())
