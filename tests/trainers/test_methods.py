"""Every offline method on cached scenes with a tiny random SDXL: start, forwards, learning, resuming to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import preference_world as world
import pytest
import torch
from pair_world import counted_forwards, move_weights, open_model, open_pairs, whole_draw
from safetensors.torch import load_file

from diffalign.config import RunConfig
from diffalign.engine import train
from diffalign.engine.assembly import Ingredients
from diffalign.evaluation.implicit import DRAWS, draws_seed, implicit_accuracy
from diffalign.objectives.pairwise import squared_error
from diffalign.progress import Reporter
from diffalign.reference import FixedDraws
from diffalign.trainers import TRAINERS, trainer_class

METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "sppo", "safeguard": 0.9, "sft_weight": 0.2, "times_per_pair": 2, "label_smoothing": 0.1},
    "dspo": {},
    "inpo": {"inversion_steps": 2},
    "kto": {},
    "mapo": {},
    "rpo": {},
    "sft": {},
    "simpo": {"gamma": 0.1},
}
REFERENCE_FREE = ("mapo", "sft", "simpo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where encoded scenes are kept for all tests of this file."""
    return tmp_path_factory.mktemp("pairs")


def test_every_method_on_pairs_is_tried_here():
    ours = [name for name, path in TRAINERS.items() if path.startswith("diffalign.")]
    pairs = {name for name in ours if "pairs" in trainer_class(name).data_kinds}
    assert {name for name in pairs if "head" not in trainer_class(name).tunes} == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_with_the_same_weights_to_the_bit(method, tiny_sdxl, folder, tmp_path):
    def run(name: str, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        config = RunConfig.model_validate(
            {
                "name": name,
                "output_dir": str(tmp_path),
                "model": {"path": str(tiny_sdxl), "precision": "fp32"},
                "data": {"source": "unused", "resolution": 64},
                "trainer": {"method": method, **METHODS[method]},
                "optim": {"lr": 1e-3, "steps": steps, "batch_size": 2},
            }
        )

        def assemble(*_: Any) -> Ingredients:
            trainer = world.make(method, tiny_sdxl, folder, **METHODS[method])
            return Ingredients(trainer.backbone, trainer, trainer._cache)

        result = train(config, resume=resume, assemble=assemble, reporter=Reporter(enabled=False))
        assert result.step == steps
        assert result.skipped == 0
        return load_file(tmp_path / name / "final" / "trainable.safetensors")

    whole = run("whole", 2)
    run("parts", 1)
    parts = run("parts", 2, resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    # The second factor of every adapter starts at zero.
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in whole.items())


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_with_a_reference_ask_it(method, tiny_sdxl, folder):
    trainer = world.make(method, tiny_sdxl, folder, **METHODS[method])
    with counted_forwards(trainer.backbone) as calls:
        trainer.loss(trainer.fetch(whole_draw()))
    asked = [call["reference"] for call in calls]
    assert asked.count(True) == (method not in REFERENCE_FREE)
    if method != "inpo":
        assert asked.count(False) == 1
    rows = len(calls[-1]["t"])
    assert rows == {"sft": 4, "dpo": 16}.get(method, 8)


@pytest.mark.parametrize("method", METHODS)
def test_losses_do_not_depend_on_how_the_batch_is_split(method, tiny_sdxl, folder):
    options = {**METHODS[method], **({"baseline": "zero"} if method == "kto" else {})}
    trainer = world.make(method, tiny_sdxl, folder, **options)
    move_weights(trainer.backbone)
    draw = whole_draw()
    whole = trainer.loss(trainer.fetch(draw))[0]
    parts = [trainer.loss(trainer.fetch(draw.slice(i, i + 2)))[0] for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dpo", {"loss": "apo_zero", "beta": 500}),
        ("dspo", {}),
        ("inpo", {"inversion_steps": 2}),
        ("kto", {}),
        ("mapo", {"beta": 10}),
        ("simpo", {}),
    ],
)
def test_repeating_a_step_raises_its_margin_and_swapped_labels_turn_it_round(
    method, options, tiny_sdxl, folder
):
    margins = {}
    for labels, sign in (("given", 1), ("swapped", -1)):
        trainer = world.make(method, tiny_sdxl, folder, labels, **options)
        optimizer = None
        for _ in range(3):
            optimizer = world.train(trainer, 0, 1, optimizer=optimizer)
        margins[labels] = sign * trainer.loss(trainer.fetch(whole_draw()))[1]["margin"].mean().item()
    assert margins["given"] > margins["swapped"]


def test_fine_tuning_lowers_the_error_of_chosen_pictures(tiny_sdxl, folder):
    trainer = world.make("sft", tiny_sdxl, folder)
    batch = trainer.fetch(whole_draw())
    before = trainer.loss(batch)[0].mean().item()
    world.train(trainer, 0, 4)
    assert trainer.loss(batch)[0].mean().item() < before
    trainer._all_certain = False
    both = trainer.loss(batch)
    torch.testing.assert_close(both[0], both[1]["chosen_error"])


def test_starting_values_are_exact(tiny_sdxl, folder):
    batch_of = {}
    for method in ("kto", "dspo"):
        trainer = world.make(method, tiny_sdxl, folder)
        losses, metrics = trainer.loss(trainer.fetch(whole_draw()))
        assert torch.equal(metrics["margin"], torch.zeros(4))
        batch_of[method] = losses
    assert torch.equal(batch_of["kto"], torch.full((4,), 0.5))
    assert torch.equal(batch_of["dspo"], torch.full((4,), 0.25))


def test_kto_gives_every_picture_noise_and_time_of_its_own(tiny_sdxl, folder):
    trainer = world.make("kto", tiny_sdxl, folder, times_per_pair=2)
    batch = trainer.fetch(whole_draw())
    with counted_forwards(trainer.backbone) as calls:
        trainer.loss(batch)
    t, x_t = calls[0]["t"], calls[0]["x_t"]
    assert len(set(t.tolist())) == 16
    alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in trainer.backbone.process.alpha_sigma(t))
    noise = (x_t - alpha * torch.cat([batch.chosen, batch.rejected] * 2)) / sigma
    assert (noise[:4] - noise[4:8]).abs().mean() > 0.5
    assert noise.std().item() == pytest.approx(1.0, abs=0.1)


def test_kto_learns_from_unpaired_pictures(tiny_sdxl, folder):
    from diffalign.trainers.kto import split_pairs

    trainer = world.make("kto", tiny_sdxl, folder, baseline="zero", undesirable_weight=2.0)
    move_weights(trainer.backbone)
    pairs = trainer.fetch(whole_draw())
    apart = split_pairs(pairs)
    losses, metrics = trainer.loss(apart)
    assert apart.label.tolist() == [1.0] * 4 + [0.0] * 4
    assert losses.shape == metrics["gain"].shape == (8,)
    torch.testing.assert_close(losses.reshape(2, 4).mean(0), trainer.loss(pairs)[0])
    gain = metrics["gain"].double()
    expected = torch.cat([torch.sigmoid(-1000 * gain[:4]), 2 * torch.sigmoid(1000 * gain[4:])])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-4)
    assert apart.to("cpu").latents.shape == apart.latents.shape
    assert len(apart) == 8


def test_inverted_pairs_are_consistent_with_their_targets(tiny_sdxl, folder):
    trainer = world.make("inpo", tiny_sdxl, folder, inversion_steps=4)
    batch = trainer.fetch(whole_draw())
    plain, inverted = trainer._noised(batch), trainer._inverted(batch, 1)
    assert torch.equal(plain.t, inverted.t)
    x0 = torch.cat([batch.chosen, batch.rejected])
    rebuilt = trainer.backbone.process.noise(x0, inverted.target, inverted.t)
    torch.testing.assert_close(rebuilt, inverted.x_t, rtol=1e-3, atol=1e-4)
    assert (plain.x_t - inverted.x_t).abs().mean() > 0.1
    assert trainer.backbone.core.training


def test_smpo_scales_the_margin_of_soft_labels(tiny_sdxl, folder):
    from dataclasses import replace

    options = {"inversion_steps": 2, "refinements": 1, "inversion_noise": 0.0, "smooth_margin": 10.0}
    trainer = world.make("inpo", tiny_sdxl, folder, **options)
    move_weights(trainer.backbone)
    batch = replace(trainer.fetch(whole_draw()), preference=torch.tensor([0.5, 0.6, 0.75, 1.0]))
    losses, metrics = trainer.loss(batch)
    scaled = metrics["margin"].double() * torch.tensor([0.0, 2.0, 5.0, 10.0])
    torch.testing.assert_close(losses.double(), -torch.nn.functional.logsigmoid(scaled), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_mapo_takes_errors_of_one_policy_forward(form, tiny_sdxl, folder):
    trainer = world.make("mapo", tiny_sdxl, folder, form=form)
    batch = trainer.fetch(whole_draw())
    losses, metrics = trainer.loss(batch)
    pairs = trainer._noised(batch)
    error = squared_error(trainer.backbone.predict(pairs.x_t, pairs.t, pairs.conditioning), pairs.target)
    w, l = error.detach().double().chunk(2)  # noqa: E741
    if form == "code":
        phi_w, phi_l = (0.5 * x / torch.expm1(0.5 * x) for x in (w, l))
        expected = w - 0.1 * torch.nn.functional.logsigmoid(1000 * (phi_w - phi_l))
    else:
        phi_w, phi_l = ((x / torch.expm1(x)) ** 8 for x in (w, l))
        expected = w - torch.nn.functional.logsigmoid(phi_w - phi_l) / 8
    torch.testing.assert_close(losses.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(metrics["chosen_error"].double(), w, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_without_reference_loads_no_second_network_and_is_still_measured(
    tiny_sdxl, folder, tmp_path
):
    backbone = open_model(tiny_sdxl, tune="full")
    kind = trainer_class("mapo")
    assert not kind.needs_frozen_copy(kind.Config(), "full")
    trainer = kind(kind.Config(), backbone, seed=0)
    cache = open_pairs(backbone, folder)
    trainer.prepare(cache, tmp_path, held_out=FixedDraws(cache, draws_seed(5), DRAWS))
    with counted_forwards(backbone) as calls:
        start = implicit_accuracy(trainer, backbone, cache, seed=5, batch_size=6)
        move_weights(backbone, 0.01)
        moved = implicit_accuracy(trainer, backbone, cache, seed=5, batch_size=6)
    assert not any(call["reference"] for call in calls)
    assert abs(start["margin"]) < 1e-2 < abs(moved["margin"])
