"""Listwise trainers on ranked groups: equal to DPO for two, shared noise, learning, and the run's numbers."""

from __future__ import annotations

from pathlib import Path

import picture_world as world
import preference_world
import pytest
import torch
from pair_world import counted_forwards, move_weights, whole_draw

from diffalign.conditioning import Conditioning
from diffalign.data.batch import GroupBatch
from diffalign.trainers.listwise import group_metrics

LOSSES = ("lipo_lambda", "plackett_luce", "softmax_matching")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("groups")


@pytest.mark.parametrize("times", [1, 2])
def test_plackett_luce_on_two_pictures_is_dpo(tiny_sdxl, folder, times):
    dpo = preference_world.make("dpo", tiny_sdxl, folder, beta=800.0, times_per_pair=times)
    listwise = world.make(
        "listwise", tiny_sdxl, folder, world.scene_pairs(), loss="plackett_luce", beta=800.0, times_per_picture=times
    )  # fmt: skip
    pairs = dpo.fetch(whole_draw())
    told = [pairs.conditioning_chosen, pairs.conditioning_rejected]
    rows = Conditioning.concat(told).select([0, 4, 1, 5, 2, 6, 3, 7])
    values = torch.tensor([[1.0, 0.0]] * 4)
    groups = GroupBatch(
        torch.stack([pairs.chosen, pairs.rejected], 1), rows, values, pairs.weight, pairs.draw
    )
    for trainer in (dpo, listwise):
        move_weights(trainer.backbone)
    expected, metrics = dpo.loss(pairs)
    losses, found = listwise.loss(groups)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["margin"], metrics["margin"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["best_delta"], metrics["chosen_delta"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_untrained_groups_know_no_order_and_training_finds_it(tiny_sdxl, folder, loss):
    trainer = world.make("listwise", tiny_sdxl, folder, loss=loss, beta=2000.0, temperature=0.5)
    _, before = trainer.loss(trainer.fetch(whole_draw()))
    assert torch.equal(before["margin"], torch.zeros(4))
    assert torch.equal(before["implicit_accuracy"], torch.full((4,), 0.5))
    optimizer = torch.optim.AdamW([p for _, p in trainer.backbone.trainable_parameters()], lr=1e-2)
    for _ in range(6):
        losses, metrics = trainer.loss(trainer.fetch(whole_draw()))
        assert all(value.shape == (4,) and not value.requires_grad for value in metrics.values())
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    _, after = trainer.loss(trainer.fetch(whole_draw()))
    assert after["margin"].mean() > 0.3
    assert after["implicit_accuracy"].mean() > 0.9


def test_one_forward_each_with_noise_and_time_shared_by_the_group(tiny_sdxl, folder):
    trainer = world.make("listwise", tiny_sdxl, folder, group_size=3)
    batch = trainer.fetch(whole_draw())
    with counted_forwards(trainer.backbone) as calls:
        trainer.loss(batch)
    assert [call["reference"] for call in calls] == [True, False]
    assert torch.equal(calls[0]["x_t"], calls[1]["x_t"])
    t = calls[0]["t"].reshape(4, 3)
    assert (t == t[:, :1]).all()
    assert len(t[:, 0].unique()) == 4
    alpha, sigma = trainer.backbone.process.alpha_sigma(calls[0]["t"])
    noise = (calls[0]["x_t"] - alpha[:, None, None, None] * batch.latents.flatten(0, 1)) / sigma[
        :, None, None, None
    ]
    shared = noise.reshape(4, 3, *noise.shape[1:])
    torch.testing.assert_close(shared, shared[:, :1].expand_as(shared), atol=1e-3, rtol=1e-3)


def test_captions_are_dropped_for_whole_groups(tiny_sdxl, folder):
    trainer = world.make("listwise", tiny_sdxl, folder, caption_dropout=0.5)
    empty = trainer._cache.unconditional(1).embeddings[0]
    seen = set()
    for step in range(4):
        told = trainer.fetch(whole_draw(step=step)).conditioning.embeddings.reshape(4, 3, *empty.shape)
        dropped = (told == empty).all(-1).all(-1)
        assert (dropped == dropped[:, :1]).all()
        seen |= set(dropped[:, 0].tolist())
    assert seen == {True, False}


def test_held_out_pairs_are_measured_as_for_dpo(tiny_sdxl, folder):
    trainer = world.make("listwise", tiny_sdxl, folder, beta=800.0)
    dpo = preference_world.make("dpo", tiny_sdxl, folder, beta=800.0)
    held_out = world.pairs_of(trainer, folder)
    for one in (trainer, dpo):
        move_weights(one.backbone)
    batch = held_out.fetch(whole_draw())
    expected, found = (one.deltas(batch, batch.draw) for one in (dpo, trainer))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))
    torch.testing.assert_close(trainer.margin(*found), dpo.margin(*expected))


def test_metrics_of_a_group_by_hand():
    scores = torch.tensor([[0.5, 0.2, 0.9], [1.0, 1.0, 1.0]])
    values = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.0]])
    found = group_metrics(scores, values, -scores, scores)
    # Ordered pairs of the first group: 3rd over 2nd and over 1st are right, 2nd over 1st is wrong; the second is tied.
    torch.testing.assert_close(found["implicit_accuracy"], torch.tensor([2 / 3, 0.5]))
    torch.testing.assert_close(found["margin"], torch.tensor([0.4, 0.0]))
    torch.testing.assert_close(found["best_delta"], torch.tensor([-0.9, -1.0]))
    torch.testing.assert_close(found["worst_delta"], torch.tensor([-0.5, -1.0]))
