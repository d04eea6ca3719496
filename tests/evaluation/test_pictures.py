"""Pictures on disk: exact, made once, and never mixed up between models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import prompts
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.evaluation.pictures import (
    Settings,
    generate_pictures,
    read_picture,
    weights_fingerprint,
    write_picture,
)

SETTINGS = Settings(steps=2, guidance=3.0, batch_size=2)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of all pictures generated so far."""
    seeds_made: list[int] = []

    def generate(model: Any, texts: list[str], seeds: list[int], **options: Any) -> Tensor:
        seeds_made.extend(seeds)
        return torch.stack([torch.full((3, 4, 4), seed / 255) for seed in seeds])

    monkeypatch.setattr("diffalign.evaluation.pictures.generate_images", generate)
    return seeds_made


def test_png_keeps_all_256_levels(tmp_path: Path) -> None:
    image = (torch.arange(256).reshape(1, 16, 16).float() / 255).expand(3, -1, -1)
    write_picture(image, tmp_path / "a.png")
    assert torch.equal(read_picture(tmp_path / "a.png"), image)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_nan_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="NaN"):
        write_picture(torch.full((3, 2, 2), float("nan")), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_pictures_come_in_the_order_of_the_prompts(tmp_path: Path, made: list[int]) -> None:
    pictures = generate_pictures(None, prompts(5), SETTINGS, tmp_path, fingerprint="m")
    assert len(pictures) == 5
    assert pictures[1:4].shape == (3, 3, 4, 4)
    assert torch.equal(pictures[0:5][:, 0, 0, 0] * 255, torch.arange(5.0))


def test_only_missing_pictures_are_made(tmp_path: Path, made: list[int]) -> None:
    first = generate_pictures(None, prompts(3), SETTINGS, tmp_path, fingerprint="m")
    first.paths[1].unlink()
    made.clear()
    again = generate_pictures(None, prompts(5), SETTINGS, tmp_path, fingerprint="m")
    assert made == [1, 3, 4]
    assert again.paths[:3] == first.paths


@pytest.mark.parametrize(
    ("settings", "fingerprint"),
    [(Settings(3, 3.0, 2), "m"), (Settings(2, 4.0, 2), "m"), (SETTINGS, "other")],
)
def test_other_settings_make_new_pictures(
    tmp_path: Path, made: list[int], settings: Settings, fingerprint: str
) -> None:
    generate_pictures(None, prompts(2), SETTINGS, tmp_path, fingerprint="m")
    made.clear()
    generate_pictures(None, prompts(2), settings, tmp_path, fingerprint=fingerprint)
    assert made == [0, 1]


def test_batch_size_does_not_matter_for_reuse(tmp_path: Path, made: list[int]) -> None:
    generate_pictures(None, prompts(2), SETTINGS, tmp_path, fingerprint="m")
    made.clear()
    generate_pictures(None, prompts(2), Settings(2, 3.0, 7), tmp_path, fingerprint="m")
    assert made == []


def test_fingerprint_follows_the_weights() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    before, without = weights_fingerprint(network), weights_fingerprint(network, ["1.weight"])
    with torch.no_grad():
        network[1].weight[0, 0] += 1e-3
    assert weights_fingerprint(network) != before
    assert weights_fingerprint(network, ["1.weight"]) == without
    assert before != without
