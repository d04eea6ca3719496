"""Sources of uncertainty (dropout, augmentation), weights from it, and transforms against the base model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from combine_fakes import Channel, Dropping, SetReward, colours
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards import RewardOutput
from diffalign.rewards.combine.against_base import LogSigmoid, Par
from diffalign.rewards.combine.augmented import Augmented
from diffalign.rewards.combine.base_scores import BaseScores
from diffalign.rewards.combine.dropout import MCDropout
from diffalign.rewards.combine.ensembles import EnsembleMean
from diffalign.rewards.combine.views import View, apply_view, colour_jitter, crop_and_resize
from diffalign.rewards.combine.weighted_sum import WeightedSum
from diffalign.rewards.combine.weights import InverseUncertainty

MEDIA = colours((0.25, 0.75, 0.5), (1.0, 0.5, 0.0))
PROMPTS = ["a", "b"]


def test_dropout_gives_the_spread_of_its_masks() -> None:
    # sum_i 2 m_i x_i with fair m_i: mean sum x_i, variance sum x_i^2.
    output = MCDropout(Dropping(), passes=2000).score(MEDIA, PROMPTS)
    assert output.mean.tolist() == pytest.approx([1.5, 1.5], abs=0.1)
    expected = [math.sqrt(0.0625 + 0.5625 + 0.25), math.sqrt(1.25)]
    assert output.std.tolist() == pytest.approx(expected, rel=0.06)
    assert output.parts["dropping"].tolist() == pytest.approx([1.5, 1.5], abs=1e-4)


def test_dropout_is_reproducible_and_leaves_no_trace() -> None:
    scorer = Dropping()
    reward = MCDropout(scorer, passes=4, seed=7)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = reward.score(MEDIA, PROMPTS)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(reward.score(MEDIA, PROMPTS).mean, first.mean)
    assert not torch.equal(MCDropout(scorer, passes=4, seed=8).score(MEDIA, PROMPTS).mean, first.mean)
    assert not any(module.training for module in scorer.modules())
    assert scorer.norm.num_batches_tracked == 0


def test_dropout_without_a_seed_draws_anew() -> None:
    reward = MCDropout(Dropping(), passes=4, seed=None)
    assert not torch.equal(reward.score(MEDIA, PROMPTS).mean, reward.score(MEDIA, PROMPTS).mean)


def test_dropout_modes_come_back_after_a_failure() -> None:
    class Failing(Dropping):
        def score(self, media: Tensor, prompts: list[str]) -> RewardOutput:
            if self.drop.training:
                raise RuntimeError("boom")
            return super().score(media, prompts)

    scorer = Failing()
    with pytest.raises(RuntimeError, match="boom"):
        MCDropout(scorer).score(MEDIA, PROMPTS)
    assert not scorer.drop.training


def test_dropout_is_found_inside_wrappers_and_plain_classes() -> None:
    class Plain:
        name, modality, differentiable, kind = "plain", "image", True, "sample"

        def __init__(self) -> None:
            self.model = Dropping()

        def score(self, media: Tensor, prompts: list[str]) -> RewardOutput:
            return self.model.score(media, prompts)

    assert MCDropout(WeightedSum([Dropping(), Channel(0)])).score(MEDIA, PROMPTS).std.min() > 0
    assert MCDropout(Plain()).score(MEDIA, PROMPTS).std.min() > 0


def test_a_scorer_without_dropout_is_refused() -> None:
    for scorer in (Dropping(p=0.0), Channel(0)):
        with pytest.raises(DiffalignError, match="has no dropout layers"):
            MCDropout(scorer)
    with pytest.raises(DiffalignError, match="passes is 1"):
        MCDropout(Dropping(), passes=1)


def test_crop_is_placed_and_resized() -> None:
    ramp = torch.arange(8.0).expand(1, 3, 8, 8) / 8
    right = crop_and_resize(ramp, 0.0, 1.0, 0.5)
    assert right.shape == ramp.shape
    # Columns 4 to 7 stretched: the ends repeat, the middle interpolates.
    assert right[0, 0, 0, [0, 1, 7]].tolist() == pytest.approx([4 / 8, 4.25 / 8, 7 / 8])
    assert crop_and_resize(ramp, 0.3, 0.3, 1.0) is ramp


def test_colour_jitter_by_hand() -> None:
    flat = colours((0.5, 0.25, 0.0))
    assert colour_jitter(flat, 2.0, 1.0, 1.0)[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.5, 0.0])
    grey = 0.299 * 0.5 + 0.587 * 0.25
    assert colour_jitter(flat, 1.0, 1.0, 0.0)[0, :, 0, 0].tolist() == pytest.approx([grey] * 3)
    halves = torch.cat([torch.zeros(1, 3, 8, 4), torch.ones(1, 3, 8, 4)], -1)
    assert colour_jitter(halves, 1.0, 0.5, 1.0)[0, 0, 0, [0, 7]].tolist() == pytest.approx([0.25, 0.75])


def test_flip_and_noise() -> None:
    ramp = torch.arange(8.0).expand(2, 3, 8, 8) / 8
    assert torch.equal(apply_view(ramp, View(flip=True)), ramp.flip(-1))
    noisy = apply_view(torch.full((2, 3, 64, 64), 0.5), View(noise=0.05, seed=3))
    assert noisy.std().item() == pytest.approx(0.05, rel=0.05)
    assert torch.equal(noisy[0], noisy[1])


def test_augmented_std_is_zero_for_a_scorer_that_ignores_the_changes() -> None:
    class Constant(Channel):
        def score(self, media: Tensor, prompts: list[str]) -> RewardOutput:
            return RewardOutput(torch.full((len(media),), 3.0))

    output = Augmented(Constant(0)).score(MEDIA, PROMPTS)
    assert (output.mean.tolist(), output.std.tolist()) == ([3.0, 3.0], [0.0, 0.0])


def test_augmented_measures_how_much_a_score_moves() -> None:
    """Only brightness changes: the mean of a flat channel is multiplied by factors within 1 +- 0.2."""
    reward = Augmented(Channel(0), views=400, crop=0.0, jitter=0.2, noise=0.0)
    flat_grey = colours((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    output = reward.score(flat_grey, PROMPTS)
    # Uniform on 1 +- 0.2: std 0.2 / sqrt 3 = 0.11547 times the brightness; contrast and saturation change nothing.
    assert output.std.tolist() == pytest.approx([0.057735, 0.0288675], rel=0.06)
    assert output.parts["channel-0"].tolist() == [0.5, 0.25]


def test_augmented_does_not_depend_on_neighbours_and_repeats() -> None:
    reward = Augmented(Channel(0), seed=4)
    media = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = reward.score(media, ["x"] * 3)
    alone = reward.score(media[2:], ["x"])
    assert torch.allclose(whole.mean[2:], alone.mean, atol=1e-6)
    assert torch.allclose(whole.std[2:], alone.std, atol=1e-6)
    fresh = Augmented(Channel(0), seed=None)
    assert not torch.equal(fresh.score(media, ["x"] * 3).std, fresh.score(media, ["x"] * 3).std)


def test_augmented_adds_the_scorers_own_uncertainty() -> None:
    reward = Augmented(Channel(0, std=0.3), crop=0.0, jitter=0.0, noise=0.0)
    assert reward.score(MEDIA, PROMPTS).std.tolist() == pytest.approx([0.3, 0.3])


def test_gradients_flow_through_every_source() -> None:
    for reward in (MCDropout(Dropping()), Augmented(Channel(0)), InverseUncertainty(Augmented(Channel(0)))):
        assert reward.differentiable
        media = MEDIA.clone().mul(0.8).requires_grad_()
        output = reward.score(media, PROMPTS)
        (output.mean.sum() + output.std.sum()).backward()
        assert media.grad.isfinite().all()
        assert media.grad.abs().sum() > 0


def test_augmented_refuses_sets_and_bad_options() -> None:
    with pytest.raises(DiffalignError, match="needs a reward on single pictures; got image, set"):
        Augmented(SetReward(0))
    with pytest.raises(DiffalignError, match="views 0"):
        Augmented(Channel(0), views=0)


def test_inverse_uncertainty_adds_a_weight() -> None:
    reward = InverseUncertainty(Channel(0, std=0.5), spread=0.25)
    output = reward.score(MEDIA, PROMPTS)
    assert output.parts["weight"].tolist() == pytest.approx([math.exp(-2)] * 2)
    assert output.mean.tolist() == [0.25, 1.0]
    assert output.std.tolist() == [0.5, 0.5]
    with pytest.raises(DiffalignError, match="'channel-0' states no uncertainty"):
        InverseUncertainty(Channel(0)).score(MEDIA, PROMPTS)


def test_log_sigmoid_against_a_number() -> None:
    output = LogSigmoid(Channel(0, std=0.4), reference=0.25).score(MEDIA, PROMPTS)
    assert output.mean.tolist() == pytest.approx([-math.log(2), math.log(1 / (1 + math.exp(-0.75)))])
    # Delta method: the slope at the reference is 1/2.
    assert output.std[0].item() == pytest.approx(0.2)
    assert output.parts["channel-0"].tolist() == [0.25, 1.0]
    assert output.parts["reference"].tolist() == [0.25, 0.25]


def _table(name: str = "channel-0") -> BaseScores:
    return BaseScores(name, {"a": [0.0, 0.5], "b": [1.0, 1.0]})


def test_log_sigmoid_against_a_table(tmp_path: Path) -> None:
    _table().save(tmp_path / "base.json")
    reward = LogSigmoid(Channel(0), base=tmp_path / "base.json", percentile=0.5, method="empirical")
    output = reward.score(MEDIA, PROMPTS)
    assert output.parts["reference"].tolist() == [0.25, 1.0]
    assert output.mean.tolist() == pytest.approx([-math.log(2)] * 2)


def test_log_sigmoid_default_is_the_normal_percentile_and_base_scale() -> None:
    output = LogSigmoid(Channel(0), base=_table(), scale="base").score(MEDIA[:1], ["a"])
    # Base mean 0.25 and std 0.35355: the score is the mean, z = -1.036433.
    assert output.mean.item() == pytest.approx(-math.log1p(math.exp(1.036433)), abs=1e-5)
    # A prompt whose scores are all equal borrows the std of all: (0, .5, 1, 1) has 0.478714.
    equal = LogSigmoid(Channel(0), base=_table(), scale="base").score(MEDIA[:1], ["b"])
    assert equal.mean.item() == pytest.approx(-math.log1p(math.exp(0.75 / 0.478714)), abs=1e-5)


def test_par_against_a_table_and_a_number() -> None:
    output = Par(Channel(0, std=1.0), base=_table(), k=4.0).score(MEDIA, PROMPTS)
    first = (1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(1))) / 2
    assert output.mean.tolist() == pytest.approx([first, 0.5])
    assert output.std[1].item() == pytest.approx(1.0)  # k / 4 times 1.
    assert Par(Channel(0), reference=1.0).score(MEDIA, PROMPTS).mean[1].item() == 0.5


def test_transforms_pass_gradients_and_use_each_prompts_own_base() -> None:
    for reward in (LogSigmoid(Channel(0), base=_table()), Par(Channel(0), base=_table())):
        media = MEDIA.clone().requires_grad_()
        reward.score(media, ["a", "unknown"]).mean.sum().backward()
        assert media.grad.isfinite().all()
        assert media.grad[:, 0].abs().min() > 0
        assert media.grad[:, 1:].abs().max() == 0
        same = reward.score(MEDIA[:1].expand(2, -1, -1, -1), PROMPTS).mean
        assert same[0] > same[1]


def test_transforms_refuse_a_table_of_another_reward() -> None:
    with pytest.raises(DiffalignError, match="are those of 'other', but it wraps 'channel-0'"):
        Par(Channel(0), base=_table("other"))
    with pytest.raises(DiffalignError, match="needs either"):
        Par(Channel(0), base=_table(), reference=1.0)
    with pytest.raises(DiffalignError, match="scale is 'base'"):
        LogSigmoid(Channel(0), reference=1.0, scale="base")
    with pytest.raises(DiffalignError, match="percentile 85"):
        LogSigmoid(Channel(0), reference=1.0, percentile=85)


def test_names_say_what_is_wrapped() -> None:
    assert Augmented(Channel(0)).name == "augmented(channel-0)"
    assert LogSigmoid(Augmented(Channel(0)), reference=0.0).name == "log-sigmoid(augmented(channel-0))"
    assert EnsembleMean([Channel(0), Channel(1)]).name == "ensemble-mean"
