"""DiffusionNFT on tiny random models: rows, the old policy, every prediction type, learning, resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from online_world import a_round, gradient, run, run_config, taken
from pair_world import counted_forwards, move_weights, open_model
from pydantic import ValidationError
from safetensors.torch import load_file

from diffalign.randomness import Draw
from diffalign.sampling.collection import Collected
from diffalign.trainers.nft import NFTConfig, NFTTrainer


def made(model: Path, **options: Any) -> NFTTrainer:
    config = NFTConfig(**{"sampling": {"steps": 3}, "noise_levels": 2} | options)
    return NFTTrainer(config, open_model(model))


def test_groups_whose_rewards_are_equal_or_unknown_give_no_rows(tiny_sd):
    trainer = made(tiny_sd)
    rewards = [1.0, 3.0, 5.0, 5.0, float("nan"), 1.0, 0.0, 2.0]
    rows, measured = trainer.learn(a_round(trainer, rewards))
    # Two noise levels of each sample of the groups 0 and 3.
    assert rows.group.tolist() == [0] * 4 + [3] * 4
    assert rows.number.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert measured["used"] == 0.5
    # Means 2 and 1; deviation of 1, 3, 5, 5, 1, 0, 2 is sqrt(65 / 7 - (17 / 7)^2) = 1.8406.
    r = trainer._probability
    assert r[0].item() == pytest.approx(0.5 - 1 / 1.8406 / 10, abs=1e-4)
    assert r[7].item() == pytest.approx(0.5 + 1 / 1.8406 / 10, abs=1e-4)


def test_a_round_without_any_difference_gives_no_rows(tiny_sd):
    trainer = made(tiny_sd)
    rows, measured = trainer.learn(a_round(trainer, [2.0, 2.0, 0.0, 0.0]))
    assert len(rows) == 0
    assert measured["used"] == 0.0


def test_uncertain_rewards_move_probabilities_less(tiny_sd):
    trainer = made(tiny_sd, uncertainty=1.0)
    collected = replace(a_round(trainer, [0.0, 1.0]), std=torch.tensor([0.0, 2.0]))
    trainer.learn(collected)
    low, high = trainer._probability.tolist()
    # Both advantages are 1 in size; exp(-2 / 1) is left of the second.
    assert 0.5 - low == pytest.approx(0.1, abs=1e-4)
    assert high - 0.5 == pytest.approx(0.1 * 0.135335, abs=1e-4)


def test_before_the_first_step_the_old_policy_is_asked_for_nothing(tiny_sd):
    trainer = made(tiny_sd, kl=0.0)
    batch = taken(trainer, trainer.learn(a_round(trainer, [0.0, 1.0]))[0])
    with counted_forwards(trainer.backbone) as calls:
        losses, metrics = trainer.loss(batch)
    assert len(calls) == 1
    assert torch.equal(metrics["old_distance"], torch.zeros(4))
    assert torch.equal(metrics["positive_error"], metrics["negative_error"])
    # The value is imitation's, times clip / beta = 5.
    torch.testing.assert_close(losses.detach(), 5 * metrics["positive_error"])


def test_the_first_gradient_is_imitation_times_the_advantage(tiny_sd):
    """Opposite rewards give opposite gradients; a gradient of plain imitation would not care."""
    trainer = made(tiny_sd, kl=0.0)
    rewards = ([0.0, 1.0], [1.0, 0.0])
    found = []
    for values in rewards:
        batch = taken(trainer, trainer.learn(a_round(trainer, values))[0])
        found.append(gradient(trainer, batch))
    assert found[0].norm() > 0
    torch.testing.assert_close(found[0], -found[1], atol=1e-6, rtol=1e-3)


def test_after_a_step_the_old_policy_answers_with_its_own_weights(tiny_sd):
    trainer = made(tiny_sd)
    batch = taken(trainer, trainer.learn(a_round(trainer, [0.0, 1.0]))[0])
    noised = trainer._noised(batch)
    with torch.no_grad():
        before = trainer._predict(noised)
        move_weights(trainer.backbone)
        trainer.after_step(0)
        after = trainer._predict(noised)
        assert torch.equal(trainer._old(noised, after), before)
        assert torch.equal(trainer._reference(noised), before)
    metrics = trainer.loss(batch)[1]
    assert (metrics["old_distance"] > 0).all()
    assert metrics["old_distance"].tolist() == pytest.approx(metrics["reference_distance"].tolist())


def test_a_round_is_drawn_with_the_old_policy(tiny_sd):
    """One optimiser step a round and a constant share of 0.5: half of the way, then three quarters."""
    trainer = made(tiny_sd, retention=0.5)
    _, weight = trainer.backbone.trainable_parameters()[0]
    with trainer.drawing(0):
        start = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    trainer.after_step(0)
    for number, share in ((1, 0.5), (2, 0.75)):
        with trainer.drawing(number):
            torch.testing.assert_close(weight.detach(), start + share)
        torch.testing.assert_close(weight.detach(), start + 1)


def test_with_the_ramp_the_share_grows_with_optimiser_steps(tiny_sd):
    """Two updates and two passes: four steps a round. Round 50 begins after 200 steps: 0.2 of the old is kept."""
    trainer = made(tiny_sd, updates=2, passes=2)
    _, weight = trainer.backbone.trainable_parameters()[0]
    with trainer.drawing(0):
        start = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    with trainer.drawing(50):
        torch.testing.assert_close(weight.detach(), start + 0.8)


@pytest.mark.parametrize(
    ("name", "form"),
    [("tiny_sd", "x0"), ("tiny_sd", "output"), ("tiny_sd_v", "velocity"), ("tiny_sd3", "x0")],
)
def test_every_prediction_type_learns_to_prefer_the_better_sample(request, name, form):
    """After some steps on one round the error of the good sample has fallen against that of the bad one."""
    trainer = made(request.getfixturevalue(name), form=form, kl=0.0, noise_levels=3)
    batch = taken(trainer, trainer.learn(a_round(trainer, [0.0, 1.0]))[0])
    bad, good = batch.sample == 0, batch.sample == 1

    def gap() -> float:
        noised = trainer._noised(batch)
        with torch.no_grad():
            error = (trainer._predict(noised) - noised.target).square().flatten(1).mean(1)
        return float(error[good].mean() - error[bad].mean())

    parameters = [p for _, p in trainer.backbone.trainable_parameters()]
    optimizer, before = torch.optim.AdamW(parameters, lr=3e-3), gap()
    for step in range(6):
        optimizer.zero_grad()
        losses, _ = trainer.loss(batch)
        losses.mean().backward()
        optimizer.step()
        trainer.after_step(step)
    assert gap() < before - 1e-3


def test_losses_do_not_depend_on_the_batch_split(tiny_sd):
    trainer = made(tiny_sd)
    rows, _ = trainer.learn(a_round(trainer, [0.0, 1.0, 3.0, 2.0]))
    whole = trainer.loss(taken(trainer, rows))[0].detach()
    parts = []
    for part in (range(3), range(3, 8)):
        numbers = rows.number[list(part)].tolist()
        parts.append(trainer.loss(trainer.batch(list(part), Draw(0, 0, numbers, list(part), 8)))[0].detach())
    torch.testing.assert_close(torch.cat(parts), whole)


def test_training_times_are_those_of_the_sampler(tiny_sd):
    trainer = made(tiny_sd, sampling={"steps": 4}, noise_levels=16)
    batch = taken(trainer, trainer.learn(a_round(trainer, [0.0, 1.0]))[0])
    assert set(trainer._noised(batch).t.tolist()) == {751, 501, 251, 1}
    other = made(tiny_sd, times="uniform", noise_levels=16)
    batch = taken(other, other.learn(a_round(other, [0.0, 1.0]))[0])
    assert len(set(other._noised(batch).t.tolist())) > 16


def test_guided_rounds_train_the_prediction_that_was_asked_for(tiny_sd):
    plain, guided = (made(tiny_sd, guided=g, sampling={"steps": 3, "guidance": 4.0}) for g in (False, True))
    sizes = []
    for trainer in (plain, guided):
        batch = taken(trainer, trainer.learn(a_round(trainer, [0.0, 1.0]))[0])
        with counted_forwards(trainer.backbone) as calls:
            trainer.loss(batch)
        sizes.append([len(call["x_t"]) for call in calls])
    # The policy and the reference, each once; guided in one forward of twice the batch.
    assert sizes == [[4, 4], [8, 8]]


def test_the_state_holds_the_old_weights(tiny_sd):
    trainer = made(tiny_sd, retention=0.9)
    batch = taken(trainer, trainer.learn(a_round(trainer, [0.0, 1.0]))[0])
    move_weights(trainer.backbone)
    trainer.after_step(0)
    tensors, values = trainer.state()
    other = made(tiny_sd, retention=0.9)
    other.backbone.load_trainable_state(trainer.backbone.trainable_state())
    other.restore({name: value.clone() for name, value in tensors.items()}, values)
    other.learn(a_round_again(trainer))
    ours, theirs = trainer.loss(batch)[1], other.loss(batch)[1]
    assert torch.equal(ours["old_distance"], theirs["old_distance"])
    assert (ours["old_distance"] > 0).all()
    with trainer.drawing(1), other.drawing(1):
        for (_, a), (_, b) in zip(
            *(x.backbone.trainable_parameters() for x in (trainer, other)), strict=True
        ):
            assert torch.equal(a, b)


def a_round_again(trainer: NFTTrainer) -> Collected:
    assert trainer.collected is not None
    return trainer.collected


def test_a_kl_term_needs_a_reference_and_none_needs_none():
    with_kl, without = NFTConfig(), NFTConfig(kl=0.0)
    assert NFTTrainer.needs_frozen_copy(with_kl, "full")
    assert not NFTTrainer.needs_frozen_copy(with_kl, "lora")
    assert not NFTTrainer.needs_frozen_copy(without, "full")


@pytest.mark.parametrize(
    ("option", "value"), [("beta", 0.0), ("retention", 1.0), ("retention", "never"), ("form", "eps")]
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValidationError, match=option):
        NFTConfig(**{option: value})


def test_a_resumed_run_ends_with_the_same_weights(tiny_sd, tmp_path):
    """Killed in the middle of a round (after 1 step) or between rounds (after 2), with an old policy that lags."""
    options = {"trainer__retention": 0.5, "trainer__noise_levels": 1, "optim__steps": 4}
    run(run_config(tiny_sd, tmp_path, "whole", "nft", **options))
    weights = {}
    for stop in (1, 2):
        part = run_config(tiny_sd, tmp_path, f"part-{stop}", "nft", **options, checkpoint__every=stop)
        killed_in_step(part, stop)
        run(part, resume=True)
        weights[stop] = load_file(tmp_path / f"part-{stop}" / "final" / "trainable.safetensors")
    whole = load_file(tmp_path / "whole" / "final" / "trainable.safetensors")
    assert all(torch.equal(whole[name], part[name]) for part in weights.values() for name in whole)


def killed_in_step(config: Any, step: int) -> None:
    """Run until the checkpoint after `step` steps is written and the next step is done, then fail."""
    after_step = NFTTrainer.after_step

    def failing(self: NFTTrainer, done: int) -> None:
        after_step(self, done)
        if done == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NFTTrainer, "after_step", failing)
        with pytest.raises(KeyboardInterrupt):
            run(config)
