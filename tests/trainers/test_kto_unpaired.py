"""KTO on single pictures: the same numbers as on pairs taken apart, which pictures rise and sink, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import picture_world as world
import preference_world
import pytest
import torch
from pair_world import move_weights, whole_draw

from diffalign.config import RunConfig
from diffalign.engine import train
from diffalign.progress import Reporter
from diffalign.trainers.kto import split_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unpaired")


@pytest.mark.parametrize("utility", ["kahneman_tversky", "loss_averse"])
def test_pairs_taken_apart_give_the_same_numbers(tiny_sdxl, folder, utility):
    paired = preference_world.make("kto", tiny_sdxl, folder, utility=utility)
    single = world.make("kto", tiny_sdxl, folder, world.scene_pairs(), utility=utility)
    for trainer in (paired, single):
        move_weights(trainer.backbone)
    pairs = paired.fetch(whole_draw())
    expected, metrics = paired.loss(pairs)
    apart = split_pairs(pairs)
    losses, found = single.loss(apart)
    torch.testing.assert_close(losses.reshape(2, -1).mean(0), expected)
    torch.testing.assert_close(
        -found["gain"], torch.cat([metrics["chosen_delta"], metrics["rejected_delta"]])
    )


def test_liked_pictures_gain_and_others_lose(tiny_sdxl, folder):
    trainer = world.make("kto", tiny_sdxl, folder, beta=2000.0, baseline="zero")
    assert len(trainer._cache) == 12
    batch = trainer.fetch(whole_draw(6))
    assert batch.label.tolist() == [1, 0, 0, 1, 0, 0]
    optimizer = torch.optim.AdamW([p for _, p in trainer.backbone.trainable_parameters()], lr=1e-2)
    for _ in range(6):
        losses, metrics = trainer.loss(batch)
        assert losses.shape == (6,)
        assert set(metrics) == {"gain", "error", "baseline"}
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    gain = trainer.loss(batch)[1]["gain"]
    assert gain[batch.label == 1].mean() > 0 > gain[batch.label == 0].mean()


def test_captions_are_dropped_for_single_pictures(tiny_sdxl, folder):
    trainer = world.make("kto", tiny_sdxl, folder, caption_dropout=0.5)
    empty = trainer._cache.unconditional(1).embeddings[0]
    told = torch.cat([trainer.fetch(whole_draw(12, step)).conditioning.embeddings for step in range(3)])
    assert 6 < (told == empty).all(-1).all(-1).sum() < 30


@pytest.mark.parametrize(
    "method", ["listwise", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kto", "sft", "rwr"))]
)
def test_a_run_on_a_file_of_pictures_is_measured_on_pairs(method, tiny_sdxl, tmp_path):
    from diffalign.data.pictures import write_pictures

    records = []
    for i, record in enumerate(world.scored_scenes(4, 2)):
        path = tmp_path / "data" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(record.image)
        records.append(type(record)(record.prompt, path, record.label, record.score, group=record.group))
    write_pictures(tmp_path / "data", records)
    pair = {"prompt": "p", "chosen": str(records[0].image), "rejected": str(records[1].image)}
    (tmp_path / "held_out.jsonl").write_text(json.dumps(pair))
    config = RunConfig.model_validate(
        {
            "name": "run",
            "output_dir": str(tmp_path / "runs"),
            "model": {"path": str(tiny_sdxl), "precision": "fp32"},
            "data": {
                "source": str(tmp_path / "data"), "resolution": 64, "cache_dir": str(tmp_path / "cache"),
                "held_out": str(tmp_path / "held_out.jsonl"),
            },
            "trainer": {"method": method},
            "optim": {"lr": 1e-3, "steps": 2, "batch_size": 2},
        }
    )  # fmt: skip
    result = train(config, reporter=Reporter(enabled=False))
    assert result.step == 2
    assert result.metrics["held_out/pairs"] == 1
    lines = (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)}
    expected = "implicit_accuracy" if method == "listwise" else "error"
    assert f"train/{expected}" in logged or expected in logged
