"""Loading rewards by name and by path, and the scenes judge as a reward."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.rewards import REWARDS, FunctionReward, load_reward
from diffalign.rewards.scenes_judge import ScenesJudge
from diffalign.samples.scenes import Placed, draw

RED_CIRCLE = Placed("circle", "red", 32, 32, 12)
BLUE_STAR = Placed("star", "blue", 32, 32, 12)


def _media(*objects: Placed) -> torch.Tensor:
    """One picture `[1, 3, 64, 64]` per object."""
    images = np.stack([draw((thing,)) for thing in objects])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize(("name", "path"), REWARDS.items())
def test_every_listed_reward_exists_under_its_own_name(name: str, path: str) -> None:
    module, _, attribute = path.partition(":")
    thing = getattr(import_module(module), attribute)
    assert callable(getattr(thing, "score", None))
    assert getattr(thing, "name", name) == name  # wrappers are named after what they wrap


def test_judge_scores_right_and_wrong_pictures() -> None:
    output = ScenesJudge().score(_media(RED_CIRCLE, BLUE_STAR), ["a red circle", "a red circle"])
    assert output.mean.tolist() == [1.0, 0.0]
    assert output.std is None
    assert output.parts["score"][0] == 1.0
    assert output.parts["score"][1] < 1.0


def test_the_judge_as_a_share_of_checks():
    """A blue star for "a red circle": the count is right, shape and colour are not."""
    reward = load_reward({"reward": "scenes-judge", "measure": "score"})
    output = reward.score(_media(RED_CIRCLE, BLUE_STAR), ["a red circle", "a red circle"])
    assert reward.name == "scenes-judge-score"
    assert output.mean.tolist() == pytest.approx([1.0, 1 / 3])


def test_an_unknown_measure_of_the_judge_is_refused():
    with pytest.raises(DiffalignError, match="expected correct or score"):
        load_reward({"reward": "scenes-judge", "measure": "quality"})


def test_judge_parts_name_the_category_of_the_prompt() -> None:
    parts = ScenesJudge().score(_media(RED_CIRCLE, RED_CIRCLE), ["a circle", "two red circles"]).parts
    assert parts["counting"][1] == 0.0
    assert torch.isnan(parts["counting"][0])
    assert parts["single_object"][0] == 1.0
    assert torch.isnan(parts["single_object"][1])


def test_judge_ignores_rounding_of_pixels() -> None:
    media = _media(RED_CIRCLE) + 0.4 / 255
    assert ScenesJudge().score(media, ["a red circle"]).mean.tolist() == [1.0]


def test_judge_refuses_foreign_prompts_and_sizes() -> None:
    with pytest.raises(DiffalignError, match="cannot judge 'a photo of a cow'"):
        ScenesJudge().score(_media(RED_CIRCLE), ["a photo of a cow"])
    with pytest.raises(DiffalignError, match=r"got pictures of 32x32 pixels.*64x64"):
        ScenesJudge().score(torch.zeros(1, 3, 32, 32), ["a red circle"])


def test_unknown_reward_names_the_nearest() -> None:
    with pytest.raises(DiffalignError, match="Did you mean 'scenes-judge'"):
        load_reward("scenes_judge")


def _own_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my_rewards.py").write_text(
        "def redness(images, prompts):\n"
        "    return images[:, 0].mean((1, 2)).tolist()\n"
        "def total(images, prompts):\n"
        "    return [float(images.sum())]\n"
        "constant = 3\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(folder)


def test_function_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _own_module(tmp_path, monkeypatch)
    reward = load_reward("my_rewards:redness")
    assert reward.name == "redness"
    pictures = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
    assert reward.score(pictures, ["", ""]).mean.tolist() == [0.0, 1.0]
    with pytest.raises(DiffalignError, match=r"'total' returned shape \(1,\) for 2 pictures"):
        load_reward("my_rewards:total").score(pictures, ["", ""])
    with pytest.raises(DiffalignError, match="is a int; expected a reward"):
        load_reward("my_rewards:constant")
    with pytest.raises(DiffalignError, match="has no attribute 'missing'"):
        load_reward("my_rewards:missing")


def test_class_and_instance_paths() -> None:
    assert isinstance(load_reward("diffalign.rewards.scenes_judge:ScenesJudge"), ScenesJudge)
    with pytest.raises(DiffalignError, match="no module named 'no_such_module'"):
        load_reward("no_such_module:Thing")


def test_function_reward_takes_a_name() -> None:
    assert FunctionReward(lambda images, prompts: [0.0], name="zero").name == "zero"
