"""Fixtures of the rewards' tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def clip_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tiny random CLIP as an `open_clip` and as a `transformers` folder; read only."""
    from tiny_clip import random_state, write_open_clip, write_transformers

    root = tmp_path_factory.mktemp("clips")
    state = random_state()
    return {
        "open_clip": write_open_clip(root / "oc", state),
        "transformers": write_transformers(root / "tf", state),
    }
