"""Tokenizers of scorers, from the hub or a folder."""

from __future__ import annotations

from typing import Any

from diffalign.errors import DiffalignError


def load_tokenizer(origin: str, option: str) -> Any:
    """The transformers tokenizer of a hub id or a folder.

    Args:
        option: of the reward, which a user may set to a local folder instead.

    Raises:
        DiffalignError: there is none, or it cannot be downloaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(origin)
    except (OSError, ValueError) as error:
        raise DiffalignError(
            f"cannot load the tokenizer of {origin!r}: {str(error).splitlines()[0]}. Give a folder with its files as "
            f"`{option}`"
        ) from error
