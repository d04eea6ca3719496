"""Every example of the page on combination can be typed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from combine_fakes import Channel, colours

from diffalign.rewards import REWARDS, Reward
from diffalign.rewards.combine.base_scores import BaseScores
from diffalign.rewards.specs import build_reward
from diffalign.yamls import parse_yaml

PAGE = (Path(__file__).parents[2] / "docs" / "combination.md").read_text(encoding="utf-8")
WRAPPERS = [name for name, path in REWARDS.items() if "rewards.combine." in path or "rewards.guard" in path]
SCORERS = {"pickscore", "hpsv2.1", "aesthetic-v2", "clip", "saturation", "scenes-ensemble"}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def _catalogue(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The wrappers as they are; scorers with weights replaced by small ones of the same names."""
    import combine_fakes

    catalogue = {name: REWARDS[name] for name in WRAPPERS}
    for index, name in enumerate(sorted(SCORERS)):
        stand_in = Channel(index % 3, name=name)
        monkeypatch.setattr(combine_fakes, f"FAKE_{index}", stand_in, raising=False)
        catalogue[name] = f"combine_fakes:FAKE_{index}"
    dropping = combine_fakes.Dropping()
    monkeypatch.setattr(combine_fakes, "DROPPING", dropping, raising=False)
    return catalogue | {"aesthetic-v2": "combine_fakes:DROPPING", "scenes-ensemble": "combine_fakes:Heads"}


@pytest.mark.parametrize("text", _blocks("yaml"))
def test_yaml_examples_build_and_score(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pickscore", "hpsv2.1"):
        BaseScores(name, {"a": [0.1, 0.3]}).save(f"base/{name}.json")
    reward = build_reward(parse_yaml(text, "the page"), _catalogue(monkeypatch))
    assert isinstance(reward, Reward)
    scores = reward.score(colours((0.2, 0.4, 0.6), (0.7, 0.1, 0.3)), ["a", "b"]).mean
    assert scores.shape == (2,)
    assert scores.isfinite().all()


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    media = torch.rand(6, 3, 4, 4)
    rng = np.random.default_rng(0)
    names = {
        "reward": Channel(0),
        "other": Channel(1),
        "media": media,
        "prompts": ["a"] * 6,
        "batches": [(media, ["a"] * 6)],
        "proxy": rng.normal(size=(5, 8)),
        "gold": rng.normal(size=(5, 8)),
    }
    blocks = _blocks("python")
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "base" / "pickscore.json").is_file()


def test_every_wrapper_has_an_example_or_a_row() -> None:
    assert len(WRAPPERS) == 15
    assert [name for name in WRAPPERS if f"`{name}`" not in PAGE] == []
    assert set(REWARDS) >= SCORERS
