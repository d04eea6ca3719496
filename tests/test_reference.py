"""Stored reference errors: equal to a forward, used again, never used for other pairs or another network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pair_world import counted_forwards, move_weights, open_model, open_pairs, whole_draw

from diffalign import reference
from diffalign.data.shards import read_tensors, write_tensors
from diffalign.elbo import pair_errors
from diffalign.errors import DiffalignError
from diffalign.reference import FixedDraws, ReferenceErrors, reference_key
from diffalign.trainers.dpo import DPOConfig, DPOTrainer
from diffalign.trainers.pairs import chosen_first

OPTIONS = {"reference": "cached", "reference_draws": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where encoded scenes are kept for all tests of this file."""
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture
def backbone(tiny_sdxl):
    return open_model(tiny_sdxl)


def prepared(backbone, folder, store, builder=True, labels="given", **options):
    trainer = DPOTrainer(DPOConfig(**(OPTIONS | options)), backbone, seed=0)
    trainer.prepare(open_pairs(backbone, folder, labels=labels), store, builder)
    return trainer


def forwards(backbone, folder, store, **options):
    """Number of forwards that preparing a trainer takes."""
    with counted_forwards(backbone) as calls:
        prepared(backbone, folder, store, **options)
    return len(calls)


def test_trained_adapters_get_the_loss_that_a_reference_forward_gives(backbone, folder, tmp_path):
    trainer = prepared(backbone, folder, tmp_path, caption_dropout=0.3)
    move_weights(backbone)
    for step in range(3):
        batch = trainer.fetch(whole_draw(step=step))
        stored = chosen_first(trainer._stored.lookup(batch.draw))
        stored = pair_errors(backbone, trainer._noised(batch), stored)
        asked = pair_errors(backbone, trainer._noised(batch))
        assert asked.chosen_delta.abs().min() > 1e-5
        for name in ("chosen_delta", "rejected_delta"):
            torch.testing.assert_close(getattr(stored, name), getattr(asked, name), rtol=1e-3, atol=1e-6)


def test_a_loss_with_stored_errors_asks_the_policy_alone(backbone, folder):
    trainer = prepared(backbone, folder, None)
    batch = trainer.fetch(whole_draw())
    with counted_forwards(backbone) as calls:
        trainer.loss(batch)
    assert [call["reference"] for call in calls] == [False]


def test_files_are_used_again_even_after_training(backbone, folder, tmp_path, tiny_sdxl):
    assert forwards(backbone, folder, tmp_path) == 2
    first = prepared(backbone, folder, tmp_path)._stored.errors
    assert first.shape == (2, 6, 2)
    move_weights(backbone)
    assert forwards(backbone, folder, tmp_path) == 0
    reopened = open_model(tiny_sdxl)
    assert forwards(reopened, folder, tmp_path) == 0
    assert torch.equal(prepared(reopened, folder, tmp_path)._stored.errors, first)


def test_more_draws_keep_the_ones_there_are(backbone, folder, tmp_path):
    first = prepared(backbone, folder, tmp_path)._stored.errors
    with counted_forwards(backbone) as calls:
        more = prepared(backbone, folder, tmp_path, reference_draws=5)._stored.errors
    assert len(calls) == 3
    assert torch.equal(more[:2], first)


def test_an_interrupted_computation_continues(backbone, folder, tmp_path):
    prepared(backbone, folder, tmp_path)
    sorted(tmp_path.iterdir())[1].unlink()
    assert forwards(backbone, folder, tmp_path) == 1


def test_files_of_other_pairs_options_or_networks_are_not_used(backbone, folder, tmp_path):
    prepared(backbone, folder, tmp_path)
    assert forwards(backbone, folder, tmp_path, labels="swapped") == 2
    assert forwards(backbone, folder, tmp_path, stratified_times=False) == 2
    assert forwards(backbone, folder, tmp_path, time_weighting="logit_normal") == 2
    assert forwards(backbone, folder, tmp_path, caption_dropout=0.5) == 2
    assert forwards(backbone, folder, tmp_path) == 0
    with torch.no_grad():
        next(p for p in backbone.core.parameters() if not p.requires_grad)[0] += 1e-3
    assert forwards(backbone, folder, tmp_path) == 2


def test_the_key_tells_pairs_seeds_precisions_and_weights_apart(backbone, folder, tiny_sdxl, tmp_path):
    cache = open_pairs(backbone, folder)
    base = reference_key(backbone, FixedDraws(cache, 1, 2))
    assert reference_key(backbone, FixedDraws(cache, 1, 9)) == base
    move_weights(backbone)
    assert reference_key(backbone, FixedDraws(cache, 1, 2)) == base
    others = [
        reference_key(backbone, FixedDraws(cache, 2, 2)),
        reference_key(backbone, FixedDraws(open_pairs(backbone, folder, count=5), 1, 2)),
        reference_key(backbone, FixedDraws(open_pairs(backbone, folder, latents="mode"), 1, 2)),
        reference_key(open_model(tiny_sdxl, precision="bf16"), FixedDraws(cache, 1, 2)),
    ]
    full = open_model(tiny_sdxl, tune="full")
    others.append(reference_key(full, FixedDraws(cache, 1, 2)))
    move_weights(full)
    others.append(reference_key(full, FixedDraws(cache, 1, 2)))
    assert len({base, *others}) == 7


def test_damaged_and_foreign_files_are_computed_again(backbone, folder, tmp_path):
    first = prepared(backbone, folder, tmp_path)._stored.errors
    cut, foreign = sorted(tmp_path.iterdir())
    cut.write_bytes(cut.read_bytes()[:-8])
    write_tensors(foreign, {"errors": torch.zeros(6, 2)}, {"key": "of something else"})
    with counted_forwards(backbone) as calls:
        again = prepared(backbone, folder, tmp_path)._stored.errors
    assert len(calls) == 2
    assert torch.equal(again, first)
    assert torch.equal(read_tensors(foreign)["errors"], first[1])


def test_other_processes_read_the_files_and_complain_when_none_come(backbone, folder, tmp_path, monkeypatch):
    prepared(backbone, folder, tmp_path)
    assert forwards(backbone, folder, tmp_path, builder=False) == 0
    monkeypatch.setattr(reference, "WAIT_SECONDS", 0.0)
    with pytest.raises(DiffalignError, match="first process"):
        prepared(backbone, folder, tmp_path / "empty", builder=False)


def test_a_step_uses_one_stored_draw_whatever_the_batch():
    stored = ReferenceErrors(torch.arange(3 * 6 * 2).reshape(3, 6, 2).float(), seed=77)
    draw = whole_draw(4, step=5)
    whole = stored.remap(draw)
    part = stored.remap(draw.slice(2, 4))
    assert (whole.seed, whole.global_batch) == (77, 6)
    assert part == whole.slice(2, 4)
    assert {stored.remap(whole_draw(step=step)).step for step in range(30)} == {0, 1, 2}
    # Draw k, records 0 to 3: chosen errors are the even numbers from 12 k, rejected ones follow them.
    first = 12 * whole.step
    expected = [[first, first + 1], [first + 2, first + 3], [first + 4, first + 5], [first + 6, first + 7]]
    assert stored.lookup(whole).tolist() == expected
    assert chosen_first(stored.lookup(whole)).tolist() == [row[side] for side in (0, 1) for row in expected]


def test_a_draw_that_is_not_stored_is_refused():
    stored = ReferenceErrors(torch.zeros(3, 6, 2), seed=77)
    for seed, step in ((78, 0), (77, 3)):
        with pytest.raises(ValueError, match="3 draws of seed 77"):
            stored.lookup(whole_draw(seed=seed, step=step))
