from __future__ import annotations

import pytest

from diffalign import backbones


@pytest.fixture
def fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model fingerprint without model files."""
    monkeypatch.setattr(backbones, "model_fingerprint", lambda config: f"fingerprint of {config.path}")
