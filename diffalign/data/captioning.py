"""Captions of pictures, written by a captioner: dual captions of the kinds DCPO-c and, perturbed, DCPO-h.

Dual captions: Saeidi et al. 2025 (arXiv 2502.06023). Each caption is kept as soon as it is made, under a hash of
picture and prompt: stopped work goes on, a picture of several pairs is captioned once, and another perturbation or
a larger part of the source costs only what is missing.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.data.captions import check_level, perturbed
from diffalign.data.images import BrokenImage, MissingImage, decode
from diffalign.data.keys import Progress
from diffalign.data.lines import append_lines, open_log
from diffalign.data.records import ImageSource, PreferenceRecord, Records, read_image
from diffalign.data.shards import write_bytes
from diffalign.data.writers import PairRow, write_jsonl
from diffalign.errors import DiffalignError

Captioner = Callable[[Image.Image, str], str]
"""A picture (upright RGB) and the prompt it was made from to a caption of what it shows."""

FORMAT = "diffalign-captions"
LOG = Path("captions") / "captions.jsonl"
# A captioner that fails on as many pictures before its first caption is broken, not unlucky.
FIRST_FAILURES = 16


class CaptionLog:
    """Captions by picture and prompt, in memory and as lines of a file.

    Args:
        path: `captions.jsonl`. captioner: its name; captions of another one are refused.

    Raises:
        DiffalignError: the file holds something else.
    """

    def __init__(self, path: Path, captioner: str) -> None:
        self.path = path
        self._captions: dict[str, str] = {}
        open_log(path, {"format": FORMAT, "version": 1, "captioner": captioner}, "captions", self._take)

    def __len__(self) -> int:
        return len(self._captions)

    def find(self, data: bytes, prompt: str) -> str | None:
        """The caption of an encoded picture made from a prompt, if there is one."""
        return self._captions.get(_key(data, prompt))

    def add(self, data: bytes, prompt: str, caption: str) -> None:
        """Keep a caption.

        Raises:
            DiffalignError: the disk is full or not writable.
        """
        entry = {"key": _key(data, prompt), "prompt": prompt, "caption": caption}
        append_lines(self.path, [entry])
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        self._captions[entry["key"]] = entry["caption"]


@dataclass(frozen=True)
class Captioned:
    """What captioning gave.

    Fields:
        path: the JSONL file of the pairs. pairs: of the source. written: of them, captioned ones.
        broken: pairs left out for a picture that cannot be read. failed: left out since the captioner failed on one.
        changed: pictures whose caption is not their prompt. reason: of the first failure.
    """

    path: Path
    pairs: int
    written: int
    broken: int
    failed: int
    changed: int
    reason: str | None


def caption_records(
    records: Records,
    captioner: Captioner | str,
    folder: Path,
    perturbation: str | None = None,
    split: str = "train",
    progress: Progress | None = None,
) -> Captioned:
    """Caption every picture and write the pairs to `folder/SPLIT.jsonl`, so that the folder is a `data.source`.

    Pictures held as bytes are written to `folder/images`. Captions are kept in `folder/captions`; pairs on which the
    captioner failed are tried again by the next call.

    Args:
        captioner: the function, or the name of one as in `load_captioner`. perturbation: level for the rejected
            picture's caption (DCPO-h), None: as written (DCPO-c).

    Raises:
        DiffalignError: no such captioner or level, captions of another captioner in the folder, or no caption at all.
    """
    if perturbation is not None:
        check_level(perturbation)
    function = load_captioner(captioner) if isinstance(captioner, str) else captioner
    work = _Captioning(function, CaptionLog(folder / LOG, _name(captioner)), folder)
    rows = []
    for index, record in enumerate(records):
        row = work.row(record)
        if row is not None:
            rows.append(row if perturbation is None else perturbed(row, perturbation))
        if progress is not None:
            progress("captioning", index + 1, len(records))
    if not rows:
        raise DiffalignError(
            f"no pair of {records.description} could be captioned ({work.broken} with a picture that cannot be read, "
            f"{work.failed} failed): {work.reason}"
        )
    path = folder / f"{split}.jsonl"
    write_jsonl(path, [PairRow(row) for row in rows])
    return Captioned(path, len(records), len(rows), work.broken, work.failed, work.changed, work.reason)


def load_captioner(name: str) -> Captioner:
    """The function that `module:name` names; modules of the current folder are found, too.

    `module:name@argument` is what that function returns for the argument, such as a model's hub id.

    Raises:
        DiffalignError: there is no such module or name, or it cannot be called.
    """
    path, has_argument, argument = name.partition("@")
    module, _, attribute = path.partition(":")
    if not attribute:
        raise DiffalignError(
            f"the captioner is {name!r}; expected `module:name` of a function(image, prompt), such as "
            "diffalign.samples.captioner:describe"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function: Any = getattr(import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise DiffalignError(
            f"captioner {name!r}: {error}; expected `module:name` of an importable module"
        ) from error
    if callable(function) and has_argument:
        function = function(argument)
    if not callable(function):
        raise DiffalignError(f"captioner {name!r} is a {type(function).__name__}; expected a function")
    return function  # type: ignore[no-any-return]


class _Captioning:
    """Captions one record after the other, and counts what is left out."""

    def __init__(self, captioner: Captioner, log: CaptionLog, folder: Path) -> None:
        self.captioner, self.log, self.folder = captioner, log, folder
        self.broken = self.failed = self.changed = 0
        self.reason: str | None = None

    def row(self, record: PreferenceRecord) -> PreferenceRecord | None:
        """The record with its pictures' captions and with pictures that are files; None when it is left out."""
        try:
            data = [_bytes(image) for image in record.images]
            captions = [self._caption(*each) for each in zip(data, record.prompts, strict=True)]
        except BrokenImage as error:
            self.broken += 1
            self.reason = self.reason or f"a picture {error}"
            return None
        except _Failure as error:
            self.failed += 1
            self.reason = self.reason or str(error)
            if not len(self.log) and self.failed == FIRST_FAILURES:
                raise DiffalignError(
                    f"the captioner failed on the first {FIRST_FAILURES} pictures: {self.reason}. Correct it and "
                    "start again."
                ) from error
            return None
        self.changed += sum(a != b for a, b in zip(captions, record.prompts, strict=True))
        files = [self._file(image, each) for image, each in zip(record.images, data, strict=True)]
        return replace(record.with_images(files), prompt=captions[0], prompt_1=captions[1])

    def _caption(self, data: bytes, prompt: str) -> str:
        known = self.log.find(data, prompt)
        if known is not None:
            return known
        image = decode(data)
        try:
            caption = self.captioner(image, prompt)
        except DiffalignError:
            raise
        except Exception as error:  # captioners are anybody's code; one picture must not end the work
            raise _Failure(f"{type(error).__name__}: {error}") from error
        if not isinstance(caption, str) or not caption.strip():
            raise _Failure(f"the captioner returned {caption!r} for {prompt!r}; expected a text")
        caption = " ".join(caption.split())
        self.log.add(data, prompt, caption)
        return caption

    def _file(self, image: ImageSource, data: bytes) -> Path:
        """The picture's own file, or one that is written under a hash of its contents."""
        if isinstance(image, Path):
            return image
        with Image.open(io.BytesIO(data)) as opened:
            ending = str(opened.format).lower()
        path = self.folder / "images" / f"{hashlib.blake2b(data, digest_size=16).hexdigest()}.{ending}"
        if not path.is_file():
            write_bytes(path, data)
        return path


class _Failure(Exception):
    """The captioner had no caption for a picture."""


def _bytes(image: ImageSource) -> bytes:
    try:
        return read_image(image)
    except OSError as error:
        raise MissingImage(f"cannot be read: {error.strerror or error}") from error


def _key(data: bytes, prompt: str) -> str:
    return hashlib.blake2b(data + b"\0" + prompt.encode(), digest_size=16).hexdigest()


def _name(captioner: Captioner | str) -> str:
    """What the captions of a log come from."""
    if isinstance(captioner, str):
        return captioner
    named = captioner if hasattr(captioner, "__qualname__") else type(captioner)
    return f"{named.__module__}:{named.__qualname__}"
