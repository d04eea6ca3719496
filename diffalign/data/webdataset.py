"""Reader of webdataset shards: tar files whose members of one key make up a pair.

Members are named `KEY.PART`: two pictures (`KEY.0.jpg` and `KEY.1.jpg`, `KEY.jpg_0` and `KEY.jpg_1`, or
`KEY.chosen.png` and `KEY.rejected.png`), and `KEY.json` or `KEY.txt`. Nothing is unpacked: an index of places is made
in one pass, and pictures are read from there. Other members, such as pickles, are never opened.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from diffalign.data.manifests import text_field
from diffalign.data.records import (
    ImageSource,
    PreferenceRecord,
    Reading,
    Records,
    check_label,
    check_weight,
    collect,
    describe_files,
    files_identity,
)
from diffalign.errors import DiffalignError

PROMPTS = ("prompt", "caption", "text")
LABELS = ("label_0", "label")
KIND = "(?:jpe?g|png|webp|gif|bmp|img|image)"
PICTURE = re.compile(
    rf"(0|1|chosen|rejected)\.{KIND}|{KIND}_(0|1|chosen|rejected)(?:\.{KIND})?", re.IGNORECASE
)
BLOCK = tarfile.BLOCKSIZE
MAX_TEXT = 1 << 20
PROBED = 64
NAMED = 10

Spot = tuple[int, int, int]
"""Number of the shard, offset and size of a member's contents, in bytes."""


@dataclass
class Sample:
    """The members of one key: pictures by part (`0`, `1`, `chosen`, `rejected`), and the contents of texts."""

    where: str
    pictures: dict[str, Spot] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


def read_webdataset(files: Sequence[Path], reading: Reading = Reading()) -> Records:
    """Records of shards, in their order.

    `KEY.json` is an object with `prompt` (or `caption`, `text`); `label_0` (or `label`): probability that the first
    picture is preferred, needed for pictures 0 and 1, 1 when absent for chosen and rejected, null: not judged;
    `weight`. `KEY.txt` is the prompt when there is no JSON.

    Raises:
        DiffalignError: a shard is damaged, cut off or compressed, or a sample lacks a caption or a label.
    """
    single: list[str] = []
    found = (pair for number, file in enumerate(files) for pair in _found(number, file, single))
    rows, places, unlabelled = collect(found, reading.limit)

    def images(index: int) -> tuple[ImageSource, ImageSource]:
        first, second = places[index]
        return _contents(files, first), _contents(files, second)

    identity = files_identity(files, "webdataset", len(rows))
    return Records(rows, images, unlabelled, identity, describe_files(files, "tar"), _note(single))


def holds_pairs(file: Path) -> bool:
    """Whether one of the first members of a tar file is a picture of a pair."""
    try:
        with tarfile.open(file, "r:") as tar:
            return any(PICTURE.fullmatch(_split(member.name)[1]) for member in islice(tar, PROBED))
    except (tarfile.TarError, OSError):
        return False


def _found(
    number: int, file: Path, single: list[str]
) -> Iterator[tuple[PreferenceRecord | None, tuple[Spot, Spot]]]:
    """The pairs of a shard; keys with one picture only are noted in `single`."""
    for key, sample in _samples(number, file).items():
        if len(sample.pictures) == 1:
            single.append(f"{file.name}: {key}")
        elif sample.pictures:
            parts = _parts(sample)
            spots = sample.pictures[parts[0]], sample.pictures[parts[1]]
            yield _row(sample, parts[0] == "chosen", file.name), spots


def _samples(number: int, file: Path) -> Mapping[str, Sample]:
    """The members of a shard by key."""
    samples: dict[str, Sample] = {}
    with _opened(file) as (tar, raw):
        for member in _members(tar, raw, file):
            key, part = _split(member.name)
            picture = PICTURE.fullmatch(part)
            if not picture and part.lower() not in ("json", "txt"):
                continue
            sample = samples.setdefault(key, Sample(f"{file}, {key}"))
            name = (picture[1] or picture[2]).lower() if picture else part.lower()
            if name in sample.pictures or name in sample.texts:
                raise DiffalignError(f"{file} holds {member.name} or the like twice; expected one per key.")
            if picture:
                sample.pictures[name] = (number, member.offset_data, member.size)
            else:
                sample.texts[name] = _text(raw, member, sample.where)
    return samples


class _opened:
    """A shard as tar and as plain file, closed together."""

    def __init__(self, file: Path) -> None:
        self.raw = file.open("rb")
        try:
            self.tar = tarfile.TarFile(fileobj=self.raw)
        except tarfile.TarError as error:
            self.raw.close()
            raise DiffalignError(
                f"{file} is not an uncompressed tar file ({error}). Compressed shards (.tar.gz) must be unpacked "
                "to .tar first, since pictures are read from their places; download damaged ones again."
            ) from error

    def __enter__(self) -> tuple[tarfile.TarFile, IO[bytes]]:
        return self.tar, self.raw

    def __exit__(self, *error: object) -> None:
        self.tar.close()
        self.raw.close()


def _members(tar: tarfile.TarFile, raw: IO[bytes], file: Path) -> Iterator[tarfile.TarInfo]:
    """The plain files of a shard; links, devices and sparse files have no contents at their place."""
    count = 0
    try:
        while (member := tar.next()) is not None:
            count += 1
            # The samples keep what is needed; a shard may have a million members.
            tar.members.clear()  # type: ignore[attr-defined]
            if member.isreg() and not member.issparse():
                yield member
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _cut_off(file, count, str(error)) from error
    # tarfile takes a damaged header for the end; a whole archive ends in a block of zeros.
    raw.seek(tar.offset)
    if raw.read(BLOCK) != bytes(BLOCK):
        raise _cut_off(file, count, "no end mark")


def _cut_off(file: Path, count: int, reason: str) -> DiffalignError:
    return DiffalignError(
        f"{file} is cut off or damaged after {count:,} members ({reason}). Download or write this shard again."
    )


def _split(name: str) -> tuple[str, str]:
    """Key and part of a member's name: what is before and after the first dot of its last component."""
    folder, slash, last = name.rpartition("/")
    stem, _, part = last.partition(".")
    return f"{folder}{slash}{stem}", part


def _text(raw: IO[bytes], member: tarfile.TarInfo, where: str) -> bytes:
    if member.size > MAX_TEXT:
        raise DiffalignError(f"{where}: {member.name} has {member.size:,} bytes; expected a caption.")
    raw.seek(member.offset_data)
    return raw.read(member.size)


def _parts(sample: Sample) -> tuple[str, str]:
    for parts in (("chosen", "rejected"), ("0", "1")):
        if sample.pictures.keys() == set(parts):
            return parts
    raise DiffalignError(
        f"{sample.where} has the pictures {', '.join(sorted(sample.pictures))}; expected 0 and 1, or chosen and "
        "rejected."
    )


def _row(sample: Sample, ordered: bool, source: str) -> PreferenceRecord | None:
    """The row of a sample; None when its label is null."""
    values = _values(sample)
    prompt = text_field(values, PROMPTS, sample.where)
    name = next((name for name in LABELS if name in values), None)
    if name is None and not ordered:
        raise DiffalignError(
            f"{sample.where} does not say which picture is preferred. Put label_0 (1, 0, or 0.5) into its .json, or "
            "name the pictures chosen and rejected."
        )
    label = 1.0 if name is None else values[name]
    weight = values.get("weight")
    if label is None:
        return None
    return PreferenceRecord(
        prompt=prompt,
        image_0=b"",
        image_1=b"",
        label_0=check_label(label, sample.where),
        source=source,
        weight=1.0 if weight is None else check_weight(weight, sample.where),
    )


def _values(sample: Sample) -> dict[str, Any]:
    """What the texts of a sample say."""
    try:
        if "json" in sample.texts:
            values = json.loads(sample.texts["json"])
        else:
            values = {"prompt": sample.texts["txt"].decode().strip()} if "txt" in sample.texts else {}
    except ValueError as error:  # both UnicodeDecodeError and JSONDecodeError
        raise DiffalignError(f"{sample.where}: its text is not UTF-8 or not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise DiffalignError(f"{sample.where}: its JSON is a {type(values).__name__}; expected an object.")
    return values


def _contents(files: Sequence[Path], spot: Spot) -> bytes:
    number, offset, size = spot
    with files[number].open("rb") as raw:
        raw.seek(offset)
        return raw.read(size)


def _note(single: Sequence[str]) -> tuple[str, ...]:
    if not single:
        return ()
    more = ", ..." if len(single) > NAMED else ""
    return (f"keys with one picture only: {len(single):,} ({', '.join(single[:NAMED])}{more})",)
