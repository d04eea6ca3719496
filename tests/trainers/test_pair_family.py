"""MODPO, RPO, dual captions, forwards counted on the network itself, and a reference that follows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import preference_world as world
import pytest
import torch
from pair_world import move_weights, open_model, scene_records, whole_draw

from diffalign.config import DataConfig
from diffalign.data.cache import build_cache
from diffalign.data.captions import perturb_rejected
from diffalign.data.records import as_records
from diffalign.engine.curriculum import anchored
from diffalign.errors import DiffalignError
from diffalign.trainers import trainer_class
from diffalign.trainers.dpo import DPOConfig
from diffalign.trainers.pairs import Forwards
from diffalign.validation import validate_section


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where encoded scenes are kept for all tests of this file."""
    return tmp_path_factory.mktemp("pairs")


@contextmanager
def rows_of_network(backbone: Any) -> Iterator[dict[str, int]]:
    """Pictures that really go through the network, by whether it keeps gradients and has its adapters."""
    rows = {"policy": 0, "no_grad": 0, "reference": 0}

    def count(module: Any, args: Any, kwargs: Any) -> None:
        sample = args[0] if args else kwargs["sample"]
        off = backbone._lora_layers[0].disable_adapters
        kind = "reference" if off else "policy" if torch.is_grad_enabled() else "no_grad"
        rows[kind] += len(sample)

    handle = backbone.core.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("dpo", {}, Forwards(1, 0, 1)),
        ("dpo", {"times_per_pair": 2}, Forwards(2, 0, 2)),
        ("dpo", {"reference": "cached", "reference_draws": 1}, Forwards(1, 0, 0)),
        ("dspo", {}, Forwards(1, 0, 1)),
        ("kto", {}, Forwards(1, 0, 1)),
        ("rpo", {}, Forwards(1, 0, 1)),
        ("mapo", {"times_per_pair": 2}, Forwards(2, 0, 0)),
        ("simpo", {}, Forwards(1, 0, 0)),
    ],
)
def test_forwards_are_those_of_the_network(method, options, expected, tiny_sdxl, folder):
    kind = trainer_class(method)
    assert kind.forwards(kind.Config(**options)) == expected
    trainer = world.make(method, tiny_sdxl, folder, **options)
    with rows_of_network(trainer.backbone) as rows:
        trainer.loss(trainer.fetch(whole_draw()))
    assert rows == {"policy": 8 * expected.policy, "no_grad": 0, "reference": 8 * expected.reference}


def test_forwards_of_an_inversion_are_right_on_average(tiny_sdxl, folder):
    options = {"inversion_steps": 4, "refinements": 1, "times_per_pair": 2, "inversion_noise": 0.0}
    trainer = world.make("inpo", tiny_sdxl, folder, **options)
    counted = type(trainer).forwards(trainer.config)
    # Two times a pair, on average 2.5 of 4 steps, each asked twice.
    assert counted == Forwards(2, 10, 2)
    with rows_of_network(trainer.backbone) as rows:
        for step in range(3):
            trainer.loss(trainer.fetch(whole_draw(step=step)))
    assert rows["policy"] == rows["reference"] == 3 * 16
    # The eight times of a batch are stratified: 1 to 4 steps in nearly equal parts.
    assert rows["no_grad"] == pytest.approx(3 * 8 * counted.inversion, rel=0.15)


def labelled_cache(backbone: Any, folder: Path) -> Any:
    """Six pairs whose first picture has style 0.75 (gap log 3); the second pair says nothing."""
    rows = [replace(record, labels={"style": 0.75}) for record in scene_records(6)]
    rows[1] = replace(rows[1], labels={})
    data = DataConfig(source="unused", resolution=64, cache_dir=str(folder))
    return build_cache(rows, lambda: backbone, data, backbone.config)


def test_modpo_takes_the_other_rewards_out_of_the_margin(tiny_sdxl, folder):
    trainer = world.make("dpo", tiny_sdxl, folder)
    move_weights(trainer.backbone)
    trainer.config = DPOConfig(other_rewards={"style": 0.25})
    trainer.prepare(labelled_cache(trainer.backbone, folder))
    losses, metrics = trainer.loss(trainer.fetch(whole_draw()))
    # The chosen picture is the first one, then the second one, in turn.
    gap = torch.tensor([math.log(3), 0.0, math.log(3), -math.log(3)]).double()
    expected = -torch.nn.functional.logsigmoid((metrics["margin"].double() - 0.25 * gap) / 0.75)
    torch.testing.assert_close(losses.detach().double(), expected, rtol=1e-4, atol=1e-4)


def test_modpo_needs_a_column_weights_below_one_and_a_loss_of_the_margin(tiny_sdxl, folder):
    with pytest.raises(
        DiffalignError, match=r"trainer.other_rewards names 'style'.*aspects of the data: none"
    ):
        world.make("dpo", tiny_sdxl, folder, other_rewards={"style": 0.5})
    for options, message in (
        ({"other_rewards": {"a": 0.6, "b": 0.4}}, "sum below 1"),
        ({"other_rewards": {"a": -0.1}}, "at least 0"),
        ({"other_rewards": {"a": 0.1}, "loss": "nca"}, "they fit: sigmoid, hinge, ipo, exo"),
    ):
        with pytest.raises(DiffalignError, match=message):
            validate_section(DPOConfig, options, "trainer")


def test_rpo_imitates_the_first_picture_whatever_the_label_says(tiny_sdxl, folder):
    trainer = world.make("rpo", tiny_sdxl, folder, beta=100.0, imitation=2.0)
    move_weights(trainer.backbone)
    batch = replace(trainer.fetch(whole_draw()), preference=torch.tensor([0.9, 0.8, 0.7, 0.6]))
    losses, metrics = trainer.loss(batch)
    twin = world.make("dpo", tiny_sdxl, folder, beta=200.0)
    move_weights(twin.backbone)
    plain = {name: value.double() for name, value in twin.loss(twin.fetch(whole_draw()))[1].items()}
    # The chosen picture is the first one, then the second one, in turn.
    first = torch.tensor([True, False, True, False])
    error = torch.where(first, plain["chosen_error"], plain["rejected_error"])
    margin = torch.where(first, plain["margin"], -plain["margin"])
    label = torch.tensor([0.9, 0.2, 0.7, 0.4]).double()
    log = torch.nn.functional.logsigmoid
    expected = 2 * error - label * log(margin) - (1 - label) * log(-margin)
    torch.testing.assert_close(losses.detach().double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(metrics["margin"].double(), margin, rtol=1e-3, atol=1e-3)


def test_perturbed_captions_reach_the_network_and_satisfy_dual_captions(tiny_sdxl, folder):
    trainer = world.make("dpo", tiny_sdxl, folder)
    rows = perturb_rejected(as_records(scene_records(6)), "medium")
    data = DataConfig(source="unused", resolution=64, cache_dir=str(folder))
    cache = build_cache(rows, lambda: trainer.backbone, data, trainer.backbone.config)
    trainer.config = trainer.config.model_copy(update={"captions": "dual"})
    plain = trainer.fetch(whole_draw()).conditioning_rejected.embeddings
    trainer.prepare(cache)
    batch = trainer.fetch(whole_draw())
    chosen, rejected = batch.conditioning_chosen.embeddings, batch.conditioning_rejected.embeddings
    assert all(not torch.equal(a, b) for a, b in zip(chosen, rejected, strict=True))
    assert torch.equal(chosen, plain)


@pytest.mark.parametrize("method", ["dpo", "dspo"])
def test_a_reference_that_followed_gives_a_margin_of_exactly_zero(method, tiny_sdxl, folder):
    trainer = world.make(method, tiny_sdxl, folder)
    backbone = trainer.backbone
    move_weights(backbone)
    batch = trainer.fetch(whole_draw())
    against_base = trainer.loss(batch)[1]["margin"]
    parameters = [p for _, p in backbone.trainable_parameters()]
    before = [p.detach().clone() for p in parameters]
    with anchored(backbone, parameters, before):
        losses, metrics = trainer.loss(batch)
        losses.sum().backward()
    assert against_base.abs().max() > 0
    assert torch.equal(metrics["margin"], torch.zeros(4))
    assert all(torch.equal(p, value) for p, value in zip(parameters, before, strict=True))
    assert sum(p.grad.abs().sum() for p in parameters) > 0
    torch.testing.assert_close(trainer.loss(batch)[1]["margin"], against_base)


def test_the_gradient_against_an_anchor_is_that_against_a_frozen_copy_of_it(tiny_sdxl, folder):
    """Half a step away from the anchor, margins are those of stored errors of the anchor's own predictions."""
    trainer = world.make("dpo", tiny_sdxl, folder, beta=100)
    backbone = trainer.backbone
    parameters = [p for _, p in backbone.trainable_parameters()]
    move_weights(backbone)
    anchor = [p.detach().clone() for p in parameters]
    batch = trainer.fetch(whole_draw())
    pairs = trainer._noised(batch)
    with torch.no_grad():
        frozen = backbone.predict(pairs.x_t, pairs.t, pairs.conditioning)
        for p in parameters:
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    with anchored(backbone, parameters, anchor):
        told = backbone.predict(pairs.x_t, pairs.t, pairs.conditioning, reference=True)
    assert torch.equal(told, frozen)
    assert not torch.equal(backbone.predict(pairs.x_t, pairs.t, pairs.conditioning, reference=True), frozen)


def test_an_anchor_is_exchanged_without_copying(tiny_sd):
    backbone = open_model(tiny_sd)
    parameters = [p for _, p in backbone.trainable_parameters()]
    data = [p.data_ptr() for p in parameters]
    with anchored(backbone, parameters, [torch.ones_like(p) for p in parameters]), backbone.reference():
        assert all((p == 1).all() for p in parameters)
    assert [p.data_ptr() for p in parameters] == data


def test_the_page_on_pair_losses_says_which_method_takes_which_option():
    page = (Path(__file__).parents[2] / "docs" / "methods" / "pair_losses.md").read_text(encoding="utf-8")
    lines = page.split("Which method takes which:")[1].strip().split("\n\n")[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    methods = [cell.strip("`") for cell in table[0][1:]]
    listed: set[str] = set()
    for options, *cells in table[2:]:
        names = [word.strip("`") for word in options.split(", ") if word.startswith("`")]
        listed |= set(names)
        for method, cell in zip(methods, cells, strict=True):
            fields = set(trainer_class(method).Config.model_fields)
            assert bool(cell) == (set(names) <= fields) == bool(set(names) & fields), (method, names)
    own = {"method", "beta", "reference_draws", "divergence_alpha"}
    assert set(DPOConfig.model_fields) - own == listed
