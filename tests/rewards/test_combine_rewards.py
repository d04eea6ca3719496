"""Wrappers that add and aggregate: parts, std, gradients, state, options."""

from __future__ import annotations

import math

import pytest
import torch
from combine_fakes import Black, Channel, Heads, SetReward, colours

from diffalign.errors import DiffalignError
from diffalign.rewards import REWARDS, Reward, facts_of, load_reward, place
from diffalign.rewards.combine.against_base import LogSigmoid
from diffalign.rewards.combine.constrained import Constrained
from diffalign.rewards.combine.ensembles import (
    EnsembleMean,
    Entropic,
    RewardRobust,
    UncertaintyWeighted,
    WorstCase,
)
from diffalign.rewards.combine.in_group import GroupWinRate, RankAverage
from diffalign.rewards.combine.weighted_sum import WeightedSum

MEDIA = colours((0.25, 0.75, 0.5), (1.0, 0.5, 0.0))
PROMPTS = ["a", "b"]


def _two(**options: float) -> list[Channel]:
    return [Channel(0, **options), Channel(1, **options)]


def test_weighted_sum_by_hand() -> None:
    output = WeightedSum([Channel(0, std=0.3), Channel(1, std=0.2)], [1.0, -2.0]).score(MEDIA, PROMPTS)
    assert output.mean.tolist() == [-1.25, 0.0]
    assert output.std.tolist() == pytest.approx([0.5, 0.5])  # sqrt(0.09 + 4 * 0.04)
    assert output.parts["channel-0"].tolist() == [0.25, 1.0]
    assert output.parts["channel-1/doubled"].tolist() == [1.5, 1.0]


def test_std_of_one_member_survives_and_no_std_stays_none() -> None:
    output = WeightedSum([Channel(0, std=0.3), Channel(1)], [2.0, 1.0]).score(MEDIA, PROMPTS)
    assert output.std.tolist() == pytest.approx([0.6, 0.6])
    assert WeightedSum(_two()).score(MEDIA, PROMPTS).std is None


def test_calibrated_sum_uses_given_statistics() -> None:
    reward = WeightedSum(
        [Channel(0, std=0.5), Channel(1)], normalise="calibrated", statistics=[[0.25, 0.5], [0.5, 0.25]]
    )
    output = reward.score(MEDIA, PROMPTS)
    assert output.mean.tolist() == [1.0, 1.5]  # 0 + 1 and 1.5 + 0.
    assert output.std.tolist() == [1.0, 1.0]
    assert output.parts["channel-0"].tolist() == [0.25, 1.0]


def test_calibration_gives_mean_zero_and_std_one_and_stays() -> None:
    reward = WeightedSum([Channel(0, factor=100.0)], normalise="calibrated")
    with pytest.raises(DiffalignError, match=r"no statistics to normalise with; call calibrate"):
        reward.score(MEDIA, PROMPTS)
    media = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    reward.calibrate(media, ["x"] * 20, batch_size=7)
    scores = reward.score(media, ["x"] * 20).mean
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1, abs=1e-5)
    again = reward.score(media[:1], ["x"]).mean
    assert again[0] == scores[0]


def test_running_statistics_learn_in_training_mode_only() -> None:
    reward = WeightedSum([Channel(0)], normalise="running")
    first = reward.score(MEDIA, PROMPTS).mean
    # Mean 0.625, unbiased std 0.53033.
    assert first.tolist() == pytest.approx([-0.375 / 0.53033, 0.375 / 0.53033], abs=1e-4)
    reward.eval()
    reward.score(colours((0.0, 0, 0)), ["c"])
    assert reward.score(MEDIA, PROMPTS).mean.tolist() == first.tolist()
    reward.train()
    reward.score(colours((0.0, 0, 0)), ["c"])
    assert reward.panel.normaliser.moments.count.tolist() == [3.0]


def test_running_statistics_resume() -> None:
    def build() -> WeightedSum:
        return WeightedSum([WeightedSum(_two(), normalise="running"), Channel(2)], normalise="running")

    whole, first, second = build(), build(), build()
    media = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    for rows in (media[:3], media[3:]):
        expected = whole.score(rows, ["x"] * len(rows)).mean
    first.score(media[:3], ["x"] * 3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.score(media[3:], ["x"] * 5).mean, expected)
    with pytest.raises(DiffalignError, match="this composition expects nothing"):
        WeightedSum(_two()).load_state_dict(first.state_dict())


def test_calibration_reaches_wrapped_rewards_without_counting_twice() -> None:
    inner = WeightedSum([Channel(0)], normalise="running")
    outer = WeightedSum([inner], normalise="calibrated").calibrate(MEDIA, PROMPTS)
    assert inner.panel.normaliser.moments.count.tolist() == [2.0]
    assert inner.training
    assert outer.training
    with pytest.raises(DiffalignError, match="normalises nothing"):
        WeightedSum(_two()).calibrate(MEDIA, PROMPTS)


def test_ensembles_by_hand() -> None:
    # Members (0.25, 1) and (0.75, 0.5): means 0.5 and 0.75, unbiased variances 0.125.
    of = [Channel(0, std=0.1), Channel(1, std=0.1)]
    outputs = {
        "ensemble-mean": EnsembleMean(of),
        "wco": WorstCase(of),
        "uwo": UncertaintyWeighted(of, risk=2.0),
        "reward-robust": RewardRobust(of, weight=0.25),
        "entropic": Entropic(of, beta=0.0),
    }
    expected = {
        "ensemble-mean": [0.5, 0.75],
        "wco": [0.25, 0.5],
        "uwo": [0.25, 0.5],
        "reward-robust": [0.25, 0.625],
        "entropic": [0.25, 0.5],
    }
    for name, reward in outputs.items():
        output = reward.score(MEDIA, PROMPTS)
        assert output.mean.tolist() == pytest.approx(expected[name]), name
        assert output.std.tolist() == pytest.approx([math.sqrt(0.125 + 0.01)] * 2), name
        assert output.parts["disagreement"].tolist() == pytest.approx([math.sqrt(0.125)] * 2), name
        assert output.parts["channel-1"].tolist() == [0.75, 0.5]
        assert reward.name == name
    assert UncertaintyWeighted(of, 2.0, unbiased=False).score(MEDIA, PROMPTS).mean.tolist() == pytest.approx(
        [0.375, 0.625]
    )


def test_normalised_members_are_compared_on_one_scale() -> None:
    of = [Channel(0), Channel(1, factor=1000.0)]
    reward = WorstCase(of, normalise="calibrated", statistics=[[0.25, 1.0], [0.0, 1000.0]])
    assert reward.score(MEDIA, PROMPTS).mean.tolist() == [0.0, 0.5]


def test_heads_of_one_reward_are_members() -> None:
    reward = WorstCase(Heads(), members=["member-0", "member-1"])
    output = reward.score(MEDIA, PROMPTS)
    assert output.mean.tolist() == [0.25, 0.5]
    assert output.parts["channel-0/member-2"].tolist() == [0.5, 0.0]
    with pytest.raises(DiffalignError, match=r"gives no part 'mebmer-0'.*Did you mean 'member-0'"):
        WorstCase(Heads(), members=["mebmer-0", "member-1"]).score(MEDIA, PROMPTS)
    with pytest.raises(DiffalignError, match="names parts of one reward; got 2 rewards"):
        WorstCase([Heads(), Heads()], members=["member-0", "member-1"])


def test_members_of_the_same_name_keep_their_own_parts() -> None:
    of = [Channel(0, name="twin"), Channel(1, name="twin"), Channel(2, name="twin")]
    parts = EnsembleMean(of).score(MEDIA, PROMPTS).parts
    assert {"twin", "twin-2", "twin-3"} < set(parts)
    assert parts["twin-2"].tolist() == [0.75, 0.5]


def test_constrained_by_hand() -> None:
    of = [Channel(0, std=0.3), Channel(1, std=0.8)]
    reward = Constrained(of, [1.0], step=2.0, start=0.5)
    output = reward.score(MEDIA, PROMPTS)
    assert output.mean.tolist() == [0.125, 0.75]  # 0.25 + 0.5 (0.75 - 1); 1 + 0.5 (0.5 - 1).
    assert output.std.tolist() == pytest.approx([0.5, 0.5])  # sqrt(0.09 + 0.25 * 0.64)
    assert output.parts["multiplier/channel-1"].tolist() == [0.5, 0.5]
    # The mean slack was -0.375.
    assert reward.lagrangian.multipliers.tolist() == [1.25]
    frozen = Constrained(of, [1.0], step=2.0, start=0.5).eval()
    frozen.load_state_dict(reward.state_dict())
    frozen.score(MEDIA, PROMPTS)
    assert frozen.lagrangian.multipliers.tolist() == [1.25]


def test_group_rewards_compare_within_the_prompt() -> None:
    media = colours((0.1, 0.9, 0), (0.2, 0.1, 0), (0.9, 0.9, 0))
    output = GroupWinRate(Channel(0)).score(media, ["a", "a", "b"])
    assert output.mean.tolist() == [0.0, 1.0, 0.5]
    assert output.std is None
    assert GroupWinRate(Channel(0), by="batch").score(media, ["a", "a", "b"]).mean.tolist() == [0, 0.5, 1]
    ranks = RankAverage(_two()).score(media, ["a", "a", "b"])
    assert ranks.mean.tolist() == [0.5, 0.5, 0.5]
    assert ranks.parts["channel-1"].tolist() == pytest.approx([0.9, 0.1, 0.9])


def test_group_rewards_keep_an_uncertainty() -> None:
    # Gap 0.1 over sqrt(2) 0.1 sqrt(1/2) = 0.1: Phi(1) again, sqrt(p (1 - p)) = 0.36536.
    media, s = colours((0.3, 0, 0), (0.2, 0, 0)), 0.1 * math.sqrt(0.5)
    assert GroupWinRate(Channel(0, std=s)).score(media, ["a", "a"]).std.tolist() == pytest.approx(
        [0.36536] * 2, abs=1e-4
    )
    ranks = RankAverage([Channel(0, std=s), Channel(0)]).score(media, ["a", "a"])
    assert ranks.std.tolist() == pytest.approx([0.18268] * 2, abs=1e-4)


DIFFERENTIABLE = {
    "weighted-sum": lambda of: WeightedSum(of, [1.0, 0.5], normalise="running"),
    "ensemble-mean": EnsembleMean,
    "wco": WorstCase,
    "uwo": UncertaintyWeighted,
    "entropic": Entropic,
    "reward-robust": RewardRobust,
    "constrained": lambda of: Constrained(of, [0.9]),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    reward = DIFFERENTIABLE[name](_two())
    media = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    reward.score(media, PROMPTS)
    reward.eval()
    assert reward.differentiable
    wanted = media.clone().requires_grad_()
    reward.score(wanted, PROMPTS).mean.sum().backward()
    direction = torch.randn(media.shape, generator=torch.Generator().manual_seed(6))
    up, down = (reward.score(media + e * direction, PROMPTS).mean.sum() for e in (1e-2, -1e-2))
    assert (wanted.grad * direction).sum().item() == pytest.approx((up - down).item() / 2e-2, abs=2e-3)
    assert wanted.grad.abs().sum() > 0


def test_attributes_follow_the_members() -> None:
    mixed = WeightedSum([Channel(0), Black(1)])
    assert isinstance(mixed, Reward)
    assert not mixed.differentiable
    assert (mixed.modality, mixed.kind) == ("image", "sample")
    assert WeightedSum([SetReward(0)]).kind == "set"
    assert facts_of(mixed).backbone == "net-0, net-1"
    assert facts_of(mixed).licence == "MIT"


def test_to_moves_scorers_with_weights() -> None:
    class Net(torch.nn.Linear):
        name, modality, differentiable, kind = "net", "image", True, "sample"

        def score(self, media, prompts):
            raise NotImplementedError

    net = Net(1, 1)
    place(WeightedSum([WeightedSum([net]), Channel(0)]), "meta")
    assert net.weight.device.type == "meta"


def test_mixing_is_refused() -> None:
    with pytest.raises(
        DiffalignError, match=r"cannot mix.*channel-0 \(image, sample\), channel-1 \(image, set\)"
    ):
        EnsembleMean([Channel(0), SetReward(1)])
    audio = Channel(1)
    audio.modality = "audio"
    with pytest.raises(DiffalignError, match="cannot mix modalities"):
        WeightedSum([Channel(0), audio])
    with pytest.raises(DiffalignError, match="gives a whole set one score"):
        GroupWinRate(SetReward(0))


def test_bad_batches_are_refused() -> None:
    for reward in (WeightedSum(_two()), WorstCase(Heads(), members=["member-0", "member-1"])):
        with pytest.raises(DiffalignError, match="got 0 media and 0 prompts"):
            reward.score(MEDIA[:0], [])
        with pytest.raises(DiffalignError, match="got 2 media and 1 prompts"):
            reward.score(MEDIA, ["a"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WeightedSum([]), "an empty list"),
        (lambda: WeightedSum("clip"), "got str.*build them with load_reward"),
        (lambda: WeightedSum(_two(), [1.0]), "1 weights for 2 rewards"),
        (lambda: WeightedSum(_two(), normalise="zscore"), "normalise is 'zscore'; expected one of none"),
        (lambda: WeightedSum(_two(), normalise="calibrated", statistics=[[0, 1]]), "for 2 members"),
        (lambda: WeightedSum(_two(), normalise="calibrated", statistics=[[0, 1], [0, 0]]), "std > 0"),
        (lambda: WeightedSum(_two(), statistics=[[0, 1], [0, 1]]), "they belong to calibrated"),
        (lambda: WorstCase([Channel(0)]), "at least 2 members; got 1"),
        (lambda: UncertaintyWeighted(_two(), risk=-1), "risk is -1"),
        (lambda: Entropic(_two(), beta=math.nan), "beta is nan"),
        (lambda: RewardRobust(_two(), weight=2), "weight is 2"),
        (lambda: GroupWinRate(_two()), "wraps one reward; got a list of 2"),
        (lambda: RankAverage(_two(), by="seed"), "by is 'seed'; expected prompt or batch"),
        (lambda: Constrained(_two(), [1.0, 2.0]), "2 rewards and 2 thresholds"),
        (lambda: Constrained(_two(), [1.0], step=0), "'constrained': step 0"),
        (lambda: Constrained(_two(), ["high"]), "reward 'constrained'"),
        (lambda: LogSigmoid(Channel(0)), "needs either 'base'"),
    ],
)
def test_bad_options_are_refused(build, message: str) -> None:
    with pytest.raises(DiffalignError, match=message):
        build()


WRAPPERS = [name for name, path in REWARDS.items() if "rewards.combine." in path or "rewards.guard" in path]


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_without_rewards_says_what_it_needs(name: str) -> None:
    with pytest.raises(DiffalignError, match=f"'{name}' needs of"):
        load_reward(name)


def test_a_composition_from_a_mapping() -> None:
    reward = load_reward(
        {
            "reward": "weighted-sum",
            "weights": [1, 0.5],
            "of": [
                {"reward": "uwo", "risk": 2, "of": ["combine_fakes:Heads"] * 2},
                {"reward": "combine_fakes:Channel", "channel": 1},
            ],
        }
    )
    assert reward.score(MEDIA, PROMPTS).mean.tolist() == pytest.approx([0.5 + 0.375, 0.5 + 0.25])
