"""ORW-CFM-W2 and advantage-weighted matching on tiny random models: weights, ratios, learning, refusals."""

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

from diffalign.trainers.awm import AWMConfig, AWMTrainer
from diffalign.trainers.forward_online import ForwardTrainer
from diffalign.trainers.online import WholeRound
from diffalign.trainers.orw_cfm import ORWConfig, ORWTrainer, effective_share, round_weights

SMALL = {"sampling": {"steps": 3}, "noise_levels": 2}


def orw(model: Path, **options: Any) -> ORWTrainer:
    return ORWTrainer(ORWConfig(**SMALL | options), open_model(model))


def awm(model: Path, **options: Any) -> AWMTrainer:
    return AWMTrainer(AWMConfig(**SMALL | options), open_model(model))


def learned(trainer: ForwardTrainer, rewards: list[float], samples: int = 2) -> Any:
    """All rows of a round of random latents with these rewards, `samples` to a prompt."""
    return taken(trainer, trainer.learn(a_round(trainer, rewards, samples))[0])


# ORW-CFM-W2


def whole(rewards: list[float], places: list[int]) -> WholeRound:
    columns = {"rewards": torch.tensor(rewards), "places": torch.tensor(places)}
    return WholeRound(columns, torch.arange(len(rewards)))


def test_weights_by_hand():
    """exp(0.5 r) of 0, 2, 0, 4 is 1, e, 1, e^2; the mean is taken in the group or in the round."""
    rewards, e = whole([0.0, 2.0, 0.0, 4.0], [0, 0, 1, 1]), 2.718281828
    raw = {"scale": "raw", "max_weight": 1000.0}
    group = round_weights(rewards, ORWConfig(**raw)).tolist()
    assert group == pytest.approx([2 / (1 + e), 2 * e / (1 + e), 2 / (1 + e**2), 2 * e**2 / (1 + e**2)])
    total = (2 + e + e**2) / 4
    flat = round_weights(rewards, ORWConfig(**raw, within="round")).tolist()
    assert flat == pytest.approx([1 / total, e / total, 1 / total, e**2 / total])


def test_weights_are_cut_scaled_and_0_where_a_reward_failed():
    cut = round_weights(whole([0.0, 50.0], [0, 0]), ORWConfig(scale="raw", max_weight=1.5))
    assert cut.tolist() == pytest.approx([0.0, 1.5], abs=1e-6)
    # In units of the deviation, here 5, rewards may have any size.
    small, large = ([s * r for r in (0.0, 10.0)] for s in (1.0, 100.0))
    options = ORWConfig(tau=1.0)
    scaled = [round_weights(whole(r, [0, 0]), options).tolist() for r in (small, large)]
    assert scaled[0] == pytest.approx(scaled[1])
    assert scaled[0] == pytest.approx([2 / (1 + 7.389056), 2 * 7.389056 / (1 + 7.389056)])
    failed = round_weights(whole([float("nan"), 1.0], [0, 0]), ORWConfig())
    assert failed.tolist() == [0.0, 1.0]


def test_a_process_gets_the_weights_of_its_own_samples():
    everyone = whole([0.0, 2.0, 0.0, 4.0], [0, 0, 1, 1])
    options = ORWConfig(within="round")
    part = round_weights(replace(everyone, own=torch.tensor([2, 3])), options)
    assert torch.equal(part, round_weights(everyone, options)[2:])


def test_effective_share_by_hand():
    # (1 + 3)^2 / (2 * (1 + 9)).
    assert effective_share(torch.tensor([1.0, 3.0])) == pytest.approx(0.8)
    assert effective_share(torch.ones(5)) == pytest.approx(1.0)


def test_orw_loss_is_the_weighted_error_plus_the_anchor(tiny_sd3):
    trainer = orw(tiny_sd3, alpha=2.0)
    batch = learned(trainer, [0.0, 1.0, float("nan"), 3.0])
    assert batch.sample.tolist() == [0, 0, 1, 1, 3, 3]
    first, metrics = trainer.loss(batch)
    assert torch.equal(metrics["reference_distance"], torch.zeros(6))
    torch.testing.assert_close(first.detach(), metrics["weight"] * metrics["error"])
    move_weights(trainer.backbone)
    losses, metrics = trainer.loss(batch)
    assert (metrics["reference_distance"] > 0).all()
    torch.testing.assert_close(
        losses.detach(), metrics["weight"] * metrics["error"] + 2 * metrics["reference_distance"]
    )


def test_without_the_anchor_no_reference_is_asked(tiny_sd3):
    free, held = orw(tiny_sd3, alpha=0.0), orw(tiny_sd3)
    counts = []
    for trainer in (free, held):
        batch = learned(trainer, [0.0, 1.0])
        with counted_forwards(trainer.backbone) as calls:
            trainer.loss(batch)
        counts.append(len(calls))
    assert counts == [1, 2]
    assert not ORWTrainer.needs_frozen_copy(free.config, "full")
    assert ORWTrainer.needs_frozen_copy(held.config, "full")


def test_the_anchor_keeps_the_output_nearer_to_the_reference(tiny_sd3):
    distances = []
    for alpha in (0.0, 20.0):
        trainer = orw(tiny_sd3, alpha=alpha)
        batch = learned(trainer, [0.0, 1.0])
        optimise(trainer, batch, 6)
        noised = trainer._noised(batch)
        with torch.no_grad():
            change = trainer._predict(noised) - trainer._reference(noised)
        distances.append(float(change.square().mean()))
    assert distances[1] < 0.5 * distances[0]


# AWM


def optimise(trainer: ForwardTrainer, batch: Any, steps: int) -> None:
    parameters = [p for _, p in trainer.backbone.trainable_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        trainer.loss(batch)[0].mean().backward()
        optimizer.step()
        trainer.after_step(step)


@pytest.mark.parametrize("weighting", ["uniform", "ghuber"])
def test_the_ratio_is_1_before_the_first_step_and_not_after_it(tiny_sd, weighting):
    trainer = awm(tiny_sd, weighting=weighting, kl=0.0)
    batch = learned(trainer, [0.0, 1.0, 5.0, 2.0])
    losses, metrics = trainer.loss(batch)
    assert torch.equal(metrics["ratio"], torch.ones(8))
    # Minus the advantage: of the worse sample above 0, of the better one below.
    torch.testing.assert_close(losses.detach(), -trainer._advantage[batch.sample])
    assert trainer._advantage.sign().tolist() == [-1, 1, 1, -1]
    move_weights(trainer.backbone)
    trainer.after_step(0)
    assert (trainer.loss(batch)[1]["ratio"] != 1).all()


def test_shared_noise_is_that_of_the_group(tiny_sd):
    """Two groups of two samples with two draws each: rows of a draw share noise and time within the group alone."""
    batch = learned(awm(tiny_sd, shared_noise=True), [0.0, 1.0, 0.0, 1.0])
    assert batch.sample.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for a, b in ((0, 2), (1, 3), (4, 6), (5, 7)):
        assert torch.equal(batch.noise[a], batch.noise[b])
        assert batch.uniform[a] == batch.uniform[b]
    apart = [0, 1, 4, 5]
    assert len({batch.noise[row].sum().item() for row in apart}) == 4
    # Records 0 to 3, golden sections apart: gaps of 0.146 or 0.236 of the circle.
    gaps = batch.uniform[apart].sort().values.diff()
    assert ((gaps > 0.14) & (gaps < 0.4)).all()


def test_shared_noise_leaves_less_noise_in_the_gradient(tiny_sd):
    """Equal samples of unequal reward: with shared noise nothing is left, with noises of their own their draws are."""
    sizes = []
    for shared in (True, False):
        trainer = awm(tiny_sd, kl=0.0, trust=0.0, shared_noise=shared)
        collected = a_round(trainer, [0.0, 1.0])
        collected.latents[1] = collected.latents[0]
        batch = taken(trainer, trainer.learn(collected)[0])
        sizes.append(gradient(trainer, batch).norm().item())
    assert sizes[0] < 1e-5 * sizes[1]


def test_the_ratio_of_the_old_weights_asked_again_is_1(tiny_sd):
    """The other way to the same ratio: the snapshot's forward, with weights that have not moved."""
    trainer = awm(tiny_sd)
    batch = learned(trainer, [0.0, 1.0])
    assert trainer.old is not None
    trainer.old.differs = True
    assert torch.equal(trainer.loss(batch)[1]["ratio"], torch.ones(4))


def test_advantages_by_hand(tiny_sd):
    # Group mean 2, deviation over the round 2: -1 and 1, over the clip of 5.
    trainer = awm(tiny_sd)
    learned(trainer, [0.0, 4.0])
    assert trainer._advantage.tolist() == pytest.approx([-0.2, 0.2], abs=1e-4)
    cut = awm(tiny_sd, clip=0.5)
    learned(cut, [0.0, 4.0])
    assert cut._advantage.tolist() == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd3"])
def test_awm_matches_good_samples_better_and_bad_ones_worse(request, name):
    trainer = awm(request.getfixturevalue(name), kl=0.0, trust=0.0)
    batch = learned(trainer, [0.0, 1.0])
    before = trainer.loss(batch)[1]["log_prob"]
    optimise(trainer, batch, 6)
    change = trainer.loss(batch)[1]["log_prob"] - before
    good = batch.sample == 1
    assert change[good].mean() > 0 > change[~good].mean()


def test_the_linear_bound_has_the_clip_s_gradient_on_policy_and_no_end_after_it(tiny_sd):
    clip, bound = (awm(tiny_sd, kl=0.0, trust=0.0, clip_range=1e-5, surrogate=s) for s in ("clip", "bound"))
    gradients = [gradient(trainer, learned(trainer, [0.0, 1.0])) for trainer in (clip, bound)]
    torch.testing.assert_close(gradients[0], gradients[1])
    batch = learned(bound, [0.0, 1.0])
    move_weights(bound.backbone)
    bound.after_step(0)
    losses, metrics = bound.loss(batch)
    advantage, difference = bound._advantage[batch.sample], metrics["ratio"].log()
    expected = -advantage * torch.where(advantage > 0, 1 + difference, metrics["ratio"])
    torch.testing.assert_close(losses.detach(), expected)
    assert gradient(bound, batch).norm() > 0


def test_a_narrow_clip_ends_the_gradient(tiny_sd):
    """Both samples have gone where they should: nothing is left to do."""
    trainer = awm(tiny_sd, kl=0.0, trust=0.0, clip_range=1e-5, weighting="uniform")
    batch = learned(trainer, [0.0, 1.0])
    move_weights(trainer.backbone)
    trainer.after_step(0)
    losses, metrics = trainer.loss(batch)
    parameters = [p for _, p in trainer.backbone.trainable_parameters()]
    outside = (metrics["ratio"] - 1) * trainer._advantage[batch.sample] > 0
    assert outside.any()
    gradients = torch.autograd.grad(losses[outside].sum(), parameters)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    assert torch.equal(metrics["clipped_high"] + metrics["clipped_low"], torch.ones(4))


# Both


@pytest.mark.parametrize(
    ("config", "option", "value"),
    [
        (ORWConfig, "alpha", -1.0),
        (ORWConfig, "times", "never"),
        (AWMConfig, "weighting", "t"),
        (AWMConfig, "clip_range", 0),
    ],
)
def test_options_out_of_range_are_refused(config, option, value):
    with pytest.raises(ValidationError, match=option):
        config(**{option: value})


@pytest.mark.parametrize("method", [pytest.param("orw_cfm", marks=pytest.mark.slow), "awm"])
def test_a_run_ends_with_other_weights_and_says_what_happened(tiny_sd, tmp_path, method):
    config = run_config(tiny_sd, tmp_path, method, method, optim__steps=2, trainer__noise_levels=1)
    result = run(config)
    assert result.step == 2
    assert result.metrics["round/used"] == 1.0
    weights = load_file(tmp_path / method / "final" / "trainable.safetensors")
    # The second factor of an adapter starts at 0.
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
