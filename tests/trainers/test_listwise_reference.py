"""Stored reference errors of groups: equal to a forward, used again, never used for other groups or networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import picture_world as world
import pytest
import torch
from pair_world import counted_forwards, move_weights, open_model, whole_draw

from diffalign import reference
from diffalign.data.pictures import as_pictures
from diffalign.data.shards import read_tensors, write_tensors
from diffalign.errors import DiffalignError
from diffalign.trainers.listwise import ListwiseConfig, ListwiseTrainer

# Two of the three pictures of a group: another two for each stored draw.
OPTIONS = {"reference": "cached", "reference_draws": 2, "group_size": 2, "beta": 800.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where encoded scenes are kept for all tests of this file."""
    return tmp_path_factory.mktemp("groups")


@pytest.fixture
def backbone(tiny_sdxl):
    return open_model(tiny_sdxl)


def prepared(backbone, folder, store=None, builder=True, records=None, **options):
    trainer = ListwiseTrainer(ListwiseConfig(**(OPTIONS | options)), backbone, seed=0)
    groups = world.open_groups(backbone, folder, records, trainer.config.group_size)
    trainer.prepare(groups, store, builder)
    return trainer


def forwards(backbone, folder, store, **options):
    """Number of forwards that preparing a trainer takes."""
    with counted_forwards(backbone) as calls:
        prepared(backbone, folder, store, **options)
    return len(calls)


@pytest.mark.parametrize("loss", ["plackett_luce", "softmax_matching"])
def test_trained_adapters_get_the_loss_that_a_reference_forward_gives(backbone, folder, tmp_path, loss):
    trainer = prepared(backbone, folder, tmp_path, caption_dropout=0.3, loss=loss)
    asking = prepared(backbone, folder, reference="adapters_off", loss=loss)
    move_weights(backbone)
    seen = set()
    for step in range(3):
        batch = trainer.fetch(whole_draw(step=step))
        seen.add(batch.draw.step)
        (losses, found), (expected, metrics) = trainer.loss(batch), asking.loss(batch)
        assert metrics["best_delta"].abs().min() > 1e-5
        for name in ("best_delta", "worst_delta", "error"):
            torch.testing.assert_close(found[name], metrics[name], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    assert seen == {0, 1}


def test_full_fine_tuning_with_stored_errors_needs_no_second_network(tiny_sdxl, folder):
    trainer = prepared(open_model(tiny_sdxl, tune="full"), folder)
    copied = prepared(open_model(tiny_sdxl, tune="full", frozen_copy=True), folder, reference="frozen_copy")
    assert not ListwiseTrainer.needs_frozen_copy(trainer.config, "full")
    for one in (trainer, copied):
        move_weights(one.backbone, 0.01)
    batch = trainer.fetch(whole_draw())
    (losses, found), (expected, metrics) = trainer.loss(batch), copied.loss(batch)
    assert metrics["best_delta"].abs().min() > 1e-5
    torch.testing.assert_close(found["best_delta"], metrics["best_delta"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)


def test_a_loss_with_stored_errors_asks_the_policy_alone_and_learns(backbone, folder):
    trainer = prepared(backbone, folder)
    batch = trainer.fetch(whole_draw())
    with counted_forwards(backbone) as calls:
        losses, _ = trainer.loss(batch)
    assert [call["reference"] for call in calls] == [False]
    losses.mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for _, p in backbone.trainable_parameters())
    assert ListwiseTrainer.forwards(trainer.config).reference == 0
    assert ListwiseTrainer.forwards(ListwiseConfig()).reference == 1


def test_files_are_used_again_even_after_training_and_more_draws_keep_them(
    backbone, folder, tmp_path, tiny_sdxl
):
    assert forwards(backbone, folder, tmp_path) == 2
    first = prepared(backbone, folder, tmp_path)._stored.errors
    assert first.shape == (2, 4, 2)
    move_weights(backbone)
    assert forwards(backbone, folder, tmp_path) == 0
    reopened = open_model(tiny_sdxl)
    assert forwards(reopened, folder, tmp_path, builder=False) == 0
    assert forwards(reopened, folder, tmp_path, reference_draws=3) == 1
    more = prepared(reopened, folder, tmp_path, reference_draws=3)._stored.errors
    assert torch.equal(more[:2], first)


def test_cut_missing_and_foreign_files_are_computed_again(backbone, folder, tmp_path):
    first = prepared(backbone, folder, tmp_path)._stored.errors
    cut, foreign = sorted(tmp_path.iterdir())
    cut.write_bytes(cut.read_bytes()[:-8])
    write_tensors(foreign, {"errors": torch.zeros(4, 2)}, {"key": "of something else"})
    assert forwards(backbone, folder, tmp_path) == 2
    assert torch.equal(read_tensors(foreign)["errors"], first[1])
    cut.unlink()
    assert forwards(backbone, folder, tmp_path) == 1


def test_files_of_other_groups_options_or_networks_are_not_used(backbone, folder, tmp_path):
    prepared(backbone, folder, tmp_path)
    for options in (
        {"group_size": 3},
        {"stratified_times": False},
        {"time_weighting": "logit_normal"},
        {"caption_dropout": 0.5},
    ):
        assert forwards(backbone, folder, tmp_path, **options) == 2, options
    # Losses, beta and labels use the same errors; pictures that are grouped otherwise do not.
    assert forwards(backbone, folder, tmp_path, loss="plackett_luce", beta=9.0) == 0
    rows = list(world.scored_scenes())
    reversed_scores = [replace(row, score=-row.score) for row in rows]
    assert forwards(backbone, folder, tmp_path, records=as_pictures(reversed_scores)) == 0
    regrouped = [replace(row, group=str(i % 4)) for i, row in enumerate(rows)]
    assert forwards(backbone, folder, tmp_path, records=as_pictures(regrouped)) == 2
    with torch.no_grad():
        next(p for p in backbone.core.parameters() if not p.requires_grad)[0] += 1e-3
    assert forwards(backbone, folder, tmp_path) == 2


def test_large_groups_are_measured_in_parts(backbone, folder, monkeypatch):
    whole = prepared(backbone, folder)._stored.errors
    monkeypatch.setattr(reference, "PICTURES", 3)
    with counted_forwards(backbone) as calls:
        parts = prepared(backbone, folder)._stored.errors
    assert [len(call["t"]) for call in calls] == [2] * 8
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_process_that_waits_complains_when_no_file_comes(backbone, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "WAIT_SECONDS", 0.0)
    with pytest.raises(DiffalignError, match="first process"):
        prepared(backbone, folder, tmp_path, builder=False)


def test_several_times_a_step_do_not_fit_stored_draws():
    with pytest.raises(ValueError, match="times_per_picture should be 1 for reference=cached"):
        ListwiseConfig(reference="cached", times_per_picture=2)
