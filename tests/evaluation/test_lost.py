"""What was lost, and warnings about scorers that are not independent."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import Brightness, Lit, flat, prompts

from diffalign.evaluation.compare import compare
from diffalign.evaluation.independence import independence_warnings, shared_backbones
from diffalign.evaluation.lost import discoveries, find_lost
from diffalign.evaluation.prompts import EvalPrompt
from diffalign.rewards import Facts
from diffalign.rewards.combine.ensembles import EnsembleMean


def test_benjamini_hochberg_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.5 against 0.0125, 0.025, 0.0375, 0.05: the first three pass.
    assert discoveries([0.5, 0.02, 0.01, 0.03]) == [False, True, True, True]
    # 0.04 alone passes at 0.05; among four it must be below 0.0125.
    assert discoveries([0.04]) == [True]
    assert discoveries([0.04, 0.9, 0.9, 0.9]) == [False] * 4
    # A later one that passes takes the earlier ones with it: 0.04 > 0.025, but 0.045 <= 0.05.
    assert discoveries([0.04, 0.045]) == [True, True]


def test_losses_of_scorers_categories_and_pictures() -> None:
    base, tuned = flat([0.9, 0.1] * 15), flat([0.1, 0.9] * 10 + [0.9, 0.1] * 5)
    result = compare(base, tuned, prompts(30), [Lit(), Brightness()])
    lost = find_lost(result)
    assert lost.metrics == []
    assert {(f.category, f.metric.name) for f in lost.categories} == {("even", "lit"), ("even", "brightness")}
    assert len(lost.flips["lit"].lost) == len(lost.flips["lit"].gained) == 10
    assert list(lost.flips) == ["lit"]
    data = lost.as_json(result)
    assert data["flips"]["lit"]["pictures"][0] == {"prompt": "prompt 0", "category": "even", "seed": 0}
    assert data["categories"][0]["interval"][1] < 0


def test_prompts_are_judged_by_their_seeds() -> None:
    rows = [EvalPrompt(f"p{i // 10}", seed=i) for i in range(30)]
    base = flat([0.5] * 30)
    # p0 falls in every seed, p1 in half of them by more, p2 rises in every seed.
    tuned = flat([0.4] * 10 + [0.1, 0.6] * 5 + [0.9] * 10)
    lost = find_lost(compare(base, tuned, rows, [Brightness()]))
    assert [(f.prompt, f.worse, f.seeds, f.significant) for f in lost.prompts] == [
        ("p0", 10, 10, True),
        ("p1", 5, 10, False),
    ]
    assert lost.prompts[1].difference == pytest.approx(-0.15)


def test_nothing_is_lost_against_itself() -> None:
    images = flat([0.0, 1.0, 0.3, 0.7])
    lost = find_lost(compare(images, images, prompts(4), [Lit(), Brightness()]))
    assert (lost.metrics, lost.categories, lost.prompts) == ([], [], [])
    assert lost.flips["lit"].lost == []


class OnClip(Lit):
    """A scorer that states its backbone."""

    def __init__(self, name: str, backbone: str) -> None:
        self.name = name
        self.facts = Facts(backbone=backbone)


def test_shared_backbones_are_named_once_per_pair() -> None:
    one, two = OnClip("one", "CLIP ViT-H/14"), OnClip("two", "clip  vit-h/14 unless `path` says otherwise")
    other = OnClip("three", "BLIP")
    [warning] = shared_backbones([one, two, other])
    assert warning.startswith("one and two share the backbone")
    assert shared_backbones([one, other, Lit(), Brightness()]) == []


def test_wrappers_stand_on_the_backbones_of_what_they_wrap() -> None:
    inner, outer = OnClip("inner", "BLIP"), OnClip("outer", "BLIP")
    wrapper = EnsembleMean([inner, OnClip("second", "CLIP ViT-H/14")])
    assert len(shared_backbones([wrapper, outer])) == 1
    assert shared_backbones([wrapper, OnClip("free", "Qwen")]) == []


def test_training_reward_used_for_evaluation_is_warned_of(tmp_path: Path) -> None:
    reward = OnClip("pickscore", "CLIP ViT-H/14 (laion2b)")
    trainer = {"method": "x", "reward": {"reward": "uwo", "of": ["pickscore@models/p", "aesthetic-v2"]}}
    [warning] = independence_warnings([reward], ["pickscore"], trainer)
    assert "pickscore is what this run was trained on" in warning
    # Another scorer on the same network is not independent either; one on another network is.
    [warning] = independence_warnings([OnClip("hpsv2", "CLIP ViT-H/14 (laion2b)")], ["hpsv2"], trainer)
    assert (
        "hpsv2 shares the backbone CLIP ViT-H/14 (laion2b) with a reward this run was trained on" in warning
    )
    assert independence_warnings([OnClip("blip", "BLIP")], ["m:blip"], trainer) == []
    assert independence_warnings([reward], ["pickscore"], {"method": "dpo", "beta": 5.0}) == []
    # The same wrapper around another scorer is no overlap.
    guarded = {"reward": "guarded", "of": "m:blip"}
    assert (
        independence_warnings(
            [OnClip("blip", "BLIP")], [guarded], {"reward": {"reward": "guarded", "of": "x"}}
        )
        == []
    )
    file = tmp_path / "mine.yaml"
    file.write_text("{reward: guarded, of: pickscore}")
    [warning] = independence_warnings([reward], [str(file)], {"rewards": ["pickscore"]})
    assert "trained on" in warning
