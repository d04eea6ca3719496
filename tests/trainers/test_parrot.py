"""Parrot on a tiny random model: the front by hand, prefixes, gradients, what a run writes down."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from online_world import PROMPTS, run, run_config
from pair_world import counted_forwards
from pydantic import ValidationError

from diffalign.backbones import open_backbone
from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError
from diffalign.objectives.policy import clipped_surrogate
from diffalign.randomness import Draw
from diffalign.rewards import RewardOutput
from diffalign.sampling.collection import Collected, Collector
from diffalign.sampling.generate import generate_images
from diffalign.trainers.parrot import (
    ParrotConfig,
    ParrotTrainer,
    components,
    front_mask,
    leads,
    masked_rewards,
    scaled,
)

NAN = math.nan
# Six samples in two groups; a: redness, b: darkness.
POINTS = torch.tensor([[1.0, 5.0], [2.0, 2.0], [3.0, 3.0], [9.0, 1.0], [4.0, 0.0], [NAN, 9.0]])
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


class RedAndDark:
    """Two rewards of a picture, and their sum."""

    name, modality, differentiable, kind = "both", "image", False, "sample"

    def score(self, media: torch.Tensor, prompts: Any) -> RewardOutput:
        red = 1000 * (media[:, 0] - media[:, 1]).flatten(1).mean(1)
        dark = -1000 * media.flatten(1).mean(1)
        return RewardOutput(red + dark, None, {"red": red, "dark": dark})


def options(**changes: Any) -> ParrotConfig:
    values = {"rewards": ["red", "dark"], "prefix": "{} ", "prompts_per_round": 2, "samples": 2}
    sampling = {"steps": 3, "guidance": 3.0, "batch_size": 4}
    return ParrotConfig(**values | {"sampling": sampling} | changes)


@pytest.fixture
def backbone(tiny_sd):
    config = ModelConfig(path=str(tiny_sd), precision="fp32", prompt_prefix="1 2 ")
    return open_backbone(config, device="cpu", resolution=64)


@pytest.fixture
def drawn(backbone) -> Collected:
    trainer = ParrotTrainer(options(), backbone)
    collector = Collector(
        backbone,
        PROMPTS,
        RedAndDark(),
        trainer.sampler(0),
        guidance=3.0,
        groups=2,
        samples=2,
        states=True,
        say=trainer.say,
    )
    return collector.collect(0, lambda number, count: [0, 3])


def with_points(collected: Collected, points: list[list[float]]) -> Collected:
    red, dark = torch.tensor(points).T
    return replace(collected, parts={"red": red, "dark": dark})


def whole_batch(trainer: ParrotTrainer, rows: Any):
    count = len(rows)
    return trainer.batch(range(count), Draw(0, 0, rows.number.tolist(), range(count), count))


# The front


def test_the_front_of_a_batch_by_hand():
    everyone = torch.zeros(6).long()
    # (2, 2) loses to (3, 3), (4, 0) to (9, 1); one without a reward is never on the front.
    assert front_mask(POINTS, everyone).tolist() == [True, False, True, True, False, False]
    # (3, 3) would lose to (9, 4).
    better = torch.cat([POINTS[:3], torch.tensor([[9.0, 4.0]]), POINTS[4:]])
    assert front_mask(better, everyone).tolist() == [True, False, False, True, False, False]
    # In its own group it does not.
    assert front_mask(better, GROUPS).tolist() == [True, False, True, True, False, False]


def test_equal_samples_do_not_dominate_each_other():
    assert front_mask(torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 1.0]]), torch.zeros(3).long()).tolist() == [
        True,
        True,
        False,
    ]


def test_dominated_samples_have_reward_zero_and_the_others_the_one_they_were_told():
    told = torch.tensor([0, 1, 1, 0, 1, 0])
    front = front_mask(POINTS, torch.zeros(6).long())
    raw = masked_rewards(POINTS, told, front, "raw")
    assert raw.tolist() == [1.0, 0.0, 3.0, 9.0, 0.0, 0.0]
    # Told 0: 1 and 9 (and an unknown one); told 1: 2, 3 and 0.
    assert masked_rewards(POINTS, told, front, "range").tolist() == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    found = masked_rewards(POINTS, told, front, "deviation")
    deviation = math.sqrt(14) / 3
    assert found.tolist() == pytest.approx([-1, 0, (3 - 5 / 3) / deviation, 1, 0, 0], abs=1e-6)
    assert (found[~front] == 0).all()


def test_scales_by_hand():
    values = torch.tensor([2.0, 4.0, NAN])
    assert scaled(values, "range")[:2].tolist() == [0.0, 1.0]
    assert scaled(values, "deviation")[:2].tolist() == pytest.approx([-1.0, 1.0])
    assert scaled(torch.ones(2), "range").tolist() == [1.0, 1.0]
    assert scaled(torch.ones(2), "deviation").tolist() == [0.0, 0.0]


def test_the_front_does_not_depend_on_the_scale_of_a_reward():
    points = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(40) // 20
    assert torch.equal(
        front_mask(points, groups), front_mask(points * torch.tensor([1e3, 1e-3, 7.0]), groups)
    )


# Prefixes


def test_every_reward_has_its_turn_and_the_scorer_sees_the_prompt(drawn, backbone):
    assert drawn.prompts == (PROMPTS[0], PROMPTS[0], PROMPTS[3], PROMPTS[3])
    said = backbone.encode_prompts([f"1 {PROMPTS[0]}", f"2 {PROMPTS[0]}"]).embeddings
    torch.testing.assert_close(drawn.told.conditioning.embeddings[:2], said)
    assert not torch.equal(said[0], said[1])


def test_prefixes_are_checked_before_anything_is_drawn(tiny_sd):
    plain = open_backbone(ModelConfig(path=str(tiny_sd), precision="fp32"), device="cpu", resolution=64)
    with pytest.raises(DiffalignError, match=r"Set model\.prompt_prefix='<reward 1>, <reward 2>, '"):
        ParrotTrainer(options(prefix="<reward {}>, "), plain)
    ParrotTrainer(options(prefix=""), plain)


def test_pictures_of_the_policy_have_all_prefixes_and_those_of_the_base_none(backbone):
    def picture(prompt: str) -> torch.Tensor:
        return generate_images(backbone, [prompt], [0], steps=1, guidance=3.0)

    prefixed = picture("a star")
    with backbone.reference():
        base, spelled_out = picture("a star"), picture("1 2 a star")
    # The weights are the base's still: only what they are told differs.
    assert torch.equal(prefixed, spelled_out)
    assert not torch.equal(prefixed, base)
    assert backbone.prompt_prefix == "1 2 "


# The loss


def test_only_the_front_goes_through_the_network(drawn, backbone):
    trainer = ParrotTrainer(options(worst=[0.0, 0.0]), backbone)
    # Sample 1 loses to sample 0; 0, 2 and 3 are the front.
    rows, facts = trainer.learn(with_points(drawn, [[4.0, 3.0], [2.0, 2.0], [1.0, 9.0], [8.0, 1.0]]))
    assert rows.group.tolist() == [0] * 3 + [1] * 6
    assert rows.number.tolist() == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    # 1 x 9 + 3 x 3 + 4 x 1.
    assert facts == {"front": 0.75, "hypervolume": 9 + 9 + 4}
    # Samples 0 and 2 are for red, 4 and 1; sample 3 is for dark, where 1 is worse than 2.
    assert trainer._value.tolist() == [1.0, 0.0, 0.0, 0.0]
    batch = whole_batch(trainer, rows)
    with counted_forwards(backbone) as calls:
        trainer.loss(batch)
    assert [len(call["x_t"]) for call in calls] == [2 * 9]


def test_scaling_by_group_takes_the_lead_over_the_prompts_own_samples(drawn, backbone):
    trainer = ParrotTrainer(options(scaling="group", worst=[0.0, 0.0]), backbone)
    _, facts = trainer.learn(with_points(drawn, [[4.0, 3.0], [2.0, 2.0], [1.0, 9.0], [8.0, 1.0]]))
    # Leads of those for red: 1 and -3.5; of those for dark: -0.5 (not on the front) and -4.
    red, dark = math.sqrt((1 + 3.5**2) / 2), math.sqrt((0.5**2 + 4**2) / 2)
    assert trainer._value.tolist() == pytest.approx([1 / red, 0, -3.5 / red, -4 / dark])
    assert facts["hypervolume"] == 9 + 9 + 4


def test_leads_leave_out_what_has_no_score():
    found = leads(torch.tensor([[4.0], [NAN], [1.0], [7.0]]), torch.tensor([0, 0, 1, 2]))
    assert found[[0, 2, 3], 0].tolist() == [0.0, 0.0, 0.0]
    assert found[1].isnan()


def test_the_loss_is_the_clipped_surrogate_and_starts_at_ratio_one(drawn, backbone):
    trainer = ParrotTrainer(options(scaling="raw"), backbone)
    rows, _ = trainer.learn(with_points(drawn, [[4.0, 3.0], [2.0, 2.0], [1.0, 9.0], [8.0, 1.0]]))
    losses, metrics = trainer.loss(whole_batch(trainer, rows))
    assert metrics["ratio"].tolist() == pytest.approx([1.0] * 9, abs=1e-6)
    rewards = torch.tensor([4.0] * 3 + [1.0] * 3 + [1.0] * 3)
    torch.testing.assert_close(
        losses.detach(), clipped_surrogate(torch.zeros(9), rewards, 1e-4), atol=1e-5, rtol=0
    )
    losses.mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for _, p in backbone.trainable_parameters())


def test_a_failed_reward_is_left_out(drawn, backbone):
    trainer = ParrotTrainer(options(), backbone)
    broken = with_points(drawn, [[NAN, 3.0], [2.0, 2.0], [1.0, 9.0], [8.0, 1.0]])
    rows, _ = trainer.learn(replace(broken, rewards=torch.tensor([NAN, 1.0, 1.0, 1.0])))
    assert rows.group.tolist() == [0] * 3 + [1] * 6
    assert rows.number.min() == 3
    assert torch.isfinite(trainer._value).all()


def test_the_rewards_must_be_parts_of_the_reward(drawn, backbone):
    with pytest.raises(
        DiffalignError, match=r"names 'blue', but the parts of trainer\.reward are: dark, red"
    ):
        components(drawn, ["red", "blue"])
    still = ParrotTrainer(options(sampling={"steps": 3, "noise": 0.0, "kernel": "ddim"}), backbone)
    calm = replace(drawn, trajectory=replace(drawn.trajectory, sampler=still.sampler(0)))
    with pytest.raises(DiffalignError, match="no denoising step draws noise"):
        still.learn(calm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": ["red"]}, "at least 2"),
        ({"rewards": ["red", "red"]}, "name each once"),
        ({"samples": 3}, "a multiple of 2"),
        ({"worst": [0.0]}, "should hold 2"),
    ],
)
def test_impossible_options_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        options(**changes)


def test_a_run_writes_down_every_reward(tiny_sd, tmp_path):
    config = run_config(
        tiny_sd,
        tmp_path,
        "run",
        "parrot",
        model__prompt_prefix="1 2 ",
        trainer__reward="test_parrot:RedAndDark",
        trainer__rewards=["red", "dark"],
        trainer__prefix="{} ",
        trainer__samples=4,
        trainer__scope="prompt",
        trainer__updates=1,
        optim__steps=2,
    )
    run(config)
    lines = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if "round/front" in line]
    assert len(rounds) == 2
    assert all(
        line["round/part/red"] + line["round/part/dark"] == pytest.approx(line["round/reward"], rel=1e-4)
        for line in rounds
    )
    first = next(line for line in lines if "ratio" in line)
    assert first["ratio"] == pytest.approx(1.0, abs=1e-5)
