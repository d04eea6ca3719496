"""Forward passes of our steps and of the releases', counted; that both compute the same loss; never their times."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

# Benchmarks are not part of the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from pair_world import move_weights, open_model

from benchmarks import method_costs
from benchmarks.method_costs import Settings, counted_forwards, step_pairs
from benchmarks.reference_methods import ReferenceStyleSteps
from diffalign.trainers.step_preference import StepPreferenceConfig, StepPreferenceTrainer


@pytest.fixture(scope="module")
def written(tiny_sdxl, tmp_path_factory):
    """The results of a run on the tiny random model."""
    app = Typer()
    app.command()(method_costs.main)
    path = tmp_path_factory.mktemp("costs") / "result.json"
    options = ["--pairs", "2", "--repeats", "1", "--warmup", "0", "--device", "cpu", "--no-memory"]
    run = CliRunner().invoke(app, [*options, "--model", str(tiny_sdxl), "--json", str(path)])
    assert run.exit_code == 0, run.output
    return json.loads(path.read_text())


def test_forwards_of_a_pair(written):
    """Each row: samples with gradient and without per pair, and calls of the network."""
    counts = {
        (row["method"], row["step"]): (row["with_gradient"], row["without"], row["calls"])
        for row in written["costs"]
    }
    assert counts == {
        # MaPO asks no reference.
        ("mapo", "release"): (2, 0, 1),
        ("mapo", "ours"): (2, 0, 1),
        ("kto", "release"): (2, 2, 2),
        ("kto", "ours"): (2, 2, 2),
        # Two candidates, each doubled by guidance, through each of the networks; the shared state needs one of the two.
        ("spo", "release"): (4, 4, 4),
        ("spo", "ours"): (2, 2, 2),
    }


def test_result_says_what_was_measured(written):
    assert written["settings"] == {
        "model": written["settings"]["model"],
        "data": "scenes:preferences",
        "pairs": 2,
        "precision": "fp32",
        "device": "cpu",
        "repeats": 1,
        "warmup": 0,
    }
    assert all(row["ratio"] == 1.0 for row in written["costs"] if row["step"] == "release")
    assert written["memory"] == []


@pytest.mark.parametrize(
    ("method", "policy", "reference"), [("dpo", 2, 2), ("mapo", 2, 0), ("simpo", 2, 0), ("sft", 1, 0)]
)
def test_reference_free_methods_ask_no_reference(tiny_sdxl, tmp_path, monkeypatch, method, policy, reference):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = Settings(str(tiny_sdxl), "scenes:preferences", 2, "fp32", "cpu", str(tmp_path))
    row = method_costs.memory_row(method, "lora", settings)
    assert (row["with_gradient"], row["without"]) == (policy, reference)
    assert row["calls"] == 1 + (reference > 0)
    assert row["peak_memory_mb"] >= 0


@pytest.mark.parametrize("clip", [0.1, 0.9])
def test_one_forward_of_a_shared_state_gives_the_releases_loss_and_gradient(tiny_sdxl, clip):
    backbone = open_model(tiny_sdxl)
    batch = step_pairs(backbone, 3)
    config = StepPreferenceConfig(form="spo", reward="scenes-judge", clip=clip)
    trainer, release = StepPreferenceTrainer(config, backbone), ReferenceStyleSteps(backbone, 10.0, clip)
    move_weights(backbone, 0.1)
    results = []
    for loss in (lambda: trainer.loss(batch)[0].mean(), lambda: release.loss(batch)):
        value = loss()
        value.backward()
        grads = [p.grad.clone() for _, p in backbone.trainable_parameters() if p.grad is not None]
        results.append((value.detach(), torch.cat([g.flatten() for g in grads])))
        for _, parameter in backbone.trainable_parameters():
            parameter.grad = None
    (ours, our_gradient), (theirs, their_gradient) = results
    assert abs(ours - torch.tensor(2.0).log()) > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        our_gradient, their_gradient, rtol=1e-2, atol=1e-3 * float(our_gradient.abs().max())
    )


def test_counting_ends_with_the_block(tiny_sdxl):
    backbone = open_model(tiny_sdxl)
    batch = step_pairs(backbone, 2)
    with counted_forwards() as counts:
        backbone.predict(batch.x_t, batch.t, batch.told.conditioning)
        with torch.no_grad():
            backbone.predict(batch.x_t[:1], batch.t[:1], batch.told.conditioning.select([0]))
    assert counts == {"with gradient": 2, "without": 1, "calls": 2}
    backbone.predict(batch.x_t, batch.t, batch.told.conditioning)
    assert counts["calls"] == 2
