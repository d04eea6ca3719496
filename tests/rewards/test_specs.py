import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.rewards import Facts, Reward, RewardOutput, facts_of, load_reward, place
from diffalign.rewards.specs import build_reward


class Constant:
    """Scores every picture with `value`; `path` shows what came after an @."""

    modality = "image"
    differentiable = False
    kind = "sample"
    facts = Facts(scale="any", backbone="none")

    def __init__(self, path=None, *, value=1.0):
        self.path, self.value, self.name = path, value, f"constant {value:g}"

    def score(self, media, prompts):
        return RewardOutput(torch.full((len(media),), float(self.value)))


class Total:
    """The sum of the rewards it wraps."""

    name, modality, differentiable, kind = "total", "image", False, "sample"

    def __init__(self, of, scale=1.0):
        self.of, self.scale = of, scale

    def score(self, media, prompts):
        return RewardOutput(self.scale * sum(one.score(media, prompts).mean for one in self.of))


def brightness(images, prompts):
    return images.mean((1, 2, 3))


HERE = __name__
CATALOGUE = {"constant": f"{HERE}:Constant", "total": f"{HERE}:Total"}
MEDIA = torch.zeros(2, 3, 4, 4)


def value(spec):
    return build_reward(spec, CATALOGUE).score(MEDIA, ["a", "b"]).mean.tolist()


def test_name_path_and_options():
    assert value("constant") == [1.0, 1.0]
    assert build_reward("constant@models/x@y", CATALOGUE).path == "models/x@y"
    assert value({"reward": "constant", "value": 3}) == [3.0, 3.0]


def test_wrappers_nest():
    inner = {"reward": "total", "of": ["constant", {"reward": "constant", "value": 2}]}
    assert value({"reward": "total", "of": [inner, "constant"], "scale": 10}) == [40.0, 40.0]


def test_own_code_by_path_with_and_without_options():
    assert value(f"{HERE}:Constant") == [1.0, 1.0]
    assert value({"reward": f"{HERE}:Constant", "value": 5}) == [5.0, 5.0]
    assert value(f"{HERE}:brightness") == [0.0, 0.0]
    with pytest.raises(DiffalignError, match="takes no options"):
        build_reward({"reward": f"{HERE}:brightness", "value": 5}, CATALOGUE)


def test_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("reward: total\nof: [constant, constant]\n")
    assert value(str(path)) == [2.0, 2.0]
    with pytest.raises(DiffalignError, match="no reward file"):
        value("absent.yaml")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("constnat", "Did you mean 'constant'"),
        ({"reward": "constnat", "value": 1}, "Did you mean 'constant'"),
        ({"reward": "constant", "valeu": 1}, "Did you mean 'value'"),
        ({"reward": "total"}, "needs of"),
        ({"value": 1}, "needs the key 'reward'"),
        (f"{HERE}:absent", "absent"),
        ("no_such_module_here:Thing", "no module named"),
        (f"{HERE}:MEDIA_COUNT", "MEDIA_COUNT"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(DiffalignError, match=message):
        build_reward(spec, CATALOGUE)


def test_a_thing_that_is_no_reward():
    with pytest.raises(DiffalignError, match="is a Tensor"):
        build_reward(f"{HERE}:MEDIA", CATALOGUE)


def test_facts_and_place_work_for_plain_rewards():
    judge = load_reward("scenes-judge")
    assert isinstance(judge, Reward)
    assert place(judge, "cpu") is judge
    assert facts_of(Constant()).backbone == "none"
    assert facts_of(load_reward(f"{HERE}:brightness")) == Facts()
