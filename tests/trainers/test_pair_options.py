"""What any loss of a pair can carry: several times, betas, weights over time, captions; and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import preference_world as world
import pytest
import torch
from pair_world import counted_forwards, move_weights, scene_records, whole_draw

from diffalign.config import DataConfig
from diffalign.data.cache import build_cache
from diffalign.errors import DiffalignError
from diffalign.objectives.pairwise import dpo_margin
from diffalign.process import Process
from diffalign.trainers.dpo import DPOConfig, beta_weight
from diffalign.trainers.dspo import DSPOConfig
from diffalign.trainers.kto import KTOConfig
from diffalign.trainers.mapo import MaPOConfig
from diffalign.validation import validate_section


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where encoded scenes are kept for all tests of this file."""
    return tmp_path_factory.mktemp("pairs")


def moved(tiny_sdxl, folder, **options):
    trainer = world.make("dpo", tiny_sdxl, folder, **options)
    move_weights(trainer.backbone)
    return trainer


@pytest.mark.parametrize(
    ("loss", "start"),
    [
        ("sigmoid", 0.6931472),
        ("hinge", 1.0),
        ("ipo", 0.25),
        ("sppo", 0.5),
        ("nca", 2 * 0.6931472),
        ("bce", 2 * 0.6931472),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
    ],
)
def test_losses_start_at_their_known_values(loss, start, tiny_sdxl, folder):
    trainer = world.make("dpo", tiny_sdxl, folder, loss=loss)
    losses, _ = trainer.loss(trainer.fetch(whole_draw()))
    assert losses.tolist() == pytest.approx([start] * 4)


def test_several_times_average_the_margin_and_begin_with_the_single_draw(tiny_sdxl, folder):
    one, two = (moved(tiny_sdxl, folder, times_per_pair=times) for times in (1, 2))
    batch = one.fetch(whole_draw())
    first, both = one._noised(batch), two._noised(batch, 2)
    assert torch.equal(both.x_t[:4], first.x_t[:4])
    assert torch.equal(both.t[8:12], first.t[4:])
    assert not torch.equal(both.t[:4], both.t[4:8])
    with counted_forwards(two.backbone) as calls:
        metrics = two.loss(batch)[1]
    assert [len(call["t"]) for call in calls] == [16, 16]
    single = one.loss(batch)[1]["margin"]
    second = replace(both, x_t=both.x_t[[4, 5, 6, 7, 12, 13, 14, 15]], t=both.t[[4, 5, 6, 7, 12, 13, 14, 15]])
    assert (metrics["margin"] - single).abs().max() > 0
    from diffalign.elbo import pair_errors

    rows = replace(second, target=both.target[[4, 5, 6, 7, 12, 13, 14, 15]], conditioning=first.conditioning)
    errors = pair_errors(two.backbone, rows)
    other = dpo_margin(errors.chosen_delta, errors.rejected_delta, two.beta)
    torch.testing.assert_close(metrics["margin"], (single + other) / 2, rtol=1e-3, atol=1e-3)


def test_a_smaller_rejected_beta_scales_only_the_rejected_side(tiny_sdxl, folder):
    plain, softer = moved(tiny_sdxl, folder), moved(tiny_sdxl, folder, beta_rejected=1250.0)
    batch = plain.fetch(whole_draw())
    m, n = (trainer.loss(batch)[1] for trainer in (plain, softer))
    expected = dpo_margin(m["chosen_delta"], 0.25 * m["rejected_delta"], 5000.0)
    torch.testing.assert_close(n["margin"], expected)
    torch.testing.assert_close(n["rejected_delta"], m["rejected_delta"])


def test_the_safeguard_changes_gradients_but_no_value(tiny_sdxl, folder):
    losses, gradients = [], []
    for safeguard in (None, 0.9):
        trainer = moved(tiny_sdxl, folder, safeguard=safeguard, beta=100)
        values = trainer.loss(trainer.fetch(whole_draw()))[0]
        values.sum().backward()
        losses.append(values.detach())
        gradients.append(torch.cat([p.grad.flatten() for _, p in trainer.backbone.trainable_parameters()]))
    torch.testing.assert_close(*losses)
    assert not torch.allclose(*gradients, rtol=1e-3)


def test_fine_tuning_weight_adds_the_chosen_reward(tiny_sdxl, folder):
    plain, tuned = moved(tiny_sdxl, folder), moved(tiny_sdxl, folder, sft_weight=0.5)
    batch = plain.fetch(whole_draw())
    (before, m), (after, _) = plain.loss(batch), tuned.loss(batch)
    torch.testing.assert_close(after - before, 0.5 * 2500 * m["chosen_delta"], rtol=1e-3, atol=1e-3)


def test_divergences_change_the_margin_and_dynamic_beta_scales_it(tiny_sdxl, folder):
    plain = moved(tiny_sdxl, folder)
    batch = plain.fetch(whole_draw())
    m = plain.loss(batch)[1]
    dynamic = moved(tiny_sdxl, folder, dynamic_beta=0.5).loss(batch)[1]["margin"]
    torch.testing.assert_close(dynamic, 1.5 * m["margin"])
    js = moved(tiny_sdxl, folder, divergence="js").loss(batch)[1]["margin"]
    r_w, r_l = (-2500 * m[name] for name in ("chosen_delta", "rejected_delta"))
    torch.testing.assert_close(js, torch.nn.functional.logsigmoid(r_w) - torch.nn.functional.logsigmoid(r_l))


def test_weights_turn_native_errors_into_those_of_noise_and_velocity():
    abar = torch.linspace(0.99, 0.01, 10, dtype=torch.float64)
    t, flow_t = torch.tensor([2, 7]), torch.tensor([0.25, 0.9])
    generator = torch.Generator().manual_seed(0)
    x0, eps, error = torch.randn(3, 2, 4, 3, 3, generator=generator)
    for prediction, times in (("v_prediction", t), ("sample", t), ("flow", flow_t), ("epsilon", t)):
        process = Process(prediction, None if prediction == "flow" else abar)
        x_t, target = process.noise(x0, eps, times), process.target(x0, eps, times)
        native = error.square().flatten(1).mean(1)
        noise = (process.to_eps(target + error, x_t, times) - eps).square().flatten(1).mean(1)
        weight = beta_weight(process, times, "noise_space")
        torch.testing.assert_close(native * weight, noise, rtol=1e-3, atol=1e-4)
        assert beta_weight(process, times, "constant") == 1.0
        clean = process.to_x0(target + error, x_t, times) - x0
        wrong = process.to_eps(target + error, x_t, times) - eps
        alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in process.alpha_sigma(times))
        # What the network of a velocity would have got wrong: v = alpha eps - sigma x0, or eps - x0.
        velocity = wrong - clean if prediction == "flow" else alpha * wrong - sigma * clean
        weight = beta_weight(process, times, "velocity_space")
        expected = velocity.square().flatten(1).mean(1)
        torch.testing.assert_close(native * weight, expected, rtol=1e-3, atol=1e-4)
    flow = beta_weight(Process("flow"), flow_t, "noise_space")
    torch.testing.assert_close(flow, torch.tensor([0.5625, 0.01]))


def dual_cache(backbone, folder):
    records = [replace(record, prompt_1=f"not {record.prompt}") for record in scene_records(6)]
    data = DataConfig(source="unused", resolution=64, cache_dir=str(folder))
    return build_cache(records, lambda: backbone, data, backbone.config)


def test_each_picture_is_told_its_own_caption_or_the_chosen_ones(tiny_sdxl, folder, tmp_path):
    trainer = world.make("dpo", tiny_sdxl, folder)
    cache = dual_cache(trainer.backbone, tmp_path)
    seen = {}
    for captions in ("own", "dual", "shared"):
        told = world.make("dpo", tiny_sdxl, folder, captions="own" if captions == "dual" else captions)
        told.config = told.config.model_copy(update={"captions": captions})
        told.prepare(cache)
        seen[captions] = told.fetch(whole_draw())
    own, dual, shared = seen["own"], seen["dual"], seen["shared"]
    assert torch.equal(own.conditioning_rejected.embeddings, dual.conditioning_rejected.embeddings)
    assert not torch.equal(own.conditioning_rejected.embeddings, own.conditioning_chosen.embeddings)
    assert torch.equal(shared.conditioning_rejected.embeddings, own.conditioning_chosen.embeddings)
    assert torch.equal(shared.conditioning_rejected.pooled, own.conditioning_chosen.pooled)
    assert torch.equal(shared.conditioning_rejected.time_ids, own.conditioning_rejected.time_ids)


def test_dual_captions_are_refused_where_the_data_has_one(tiny_sdxl, folder):
    with pytest.raises(DiffalignError, match=r"same caption.*trainer\.captions=own"):
        world.make("dpo", tiny_sdxl, folder, captions="dual")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (DPOConfig, {"loss": "exo"}, r"label_smoothing .*above 0"),
        (DPOConfig, {"label_smoothing": 0.1, "label_flip": 0.1}, r"same wrong labels"),
        (DPOConfig, {"loss": "sppo", "label_flip": 0.1}, r"it fits: sigmoid, hinge, ipo, nca, bce"),
        (DPOConfig, {"reference": "cached", "times_per_pair": 2}, r"times_per_pair"),
        (DPOConfig, {"loss": "sigmoyd"}, r"trainer\.loss: is 'sigmoyd'; expected 'sigmoid', 'hinge'"),
        (DPOConfig, {"safeguard": 1.5}, r"trainer\.safeguard"),
        (MaPOConfig, {"reference": "cached"}, r"trainer\.reference: unknown key"),
        (KTOConfig, {"reference": "cached"}, r"adapters_off.*frozen_copy"),
        (DSPOConfig, {"form": "paper"}, r"'squared' or 'score'"),
    ],
)
def test_options_that_do_not_fit_are_refused(model, options, message):
    with pytest.raises(DiffalignError, match=message):
        validate_section(model, options, "trainer")
