"""Stages of pairs from clear to close, the reference that follows, and resuming in the middle of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_fakes as fakes
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from diffalign.config import CurriculumConfig, RunConfig
from diffalign.data.pairs import Pairs
from diffalign.engine import train
from diffalign.engine.curriculum import Curriculum, anchored, check_curriculum, open_curriculum
from diffalign.errors import DiffalignError
from diffalign.progress import Reporter


def config(**options: Any) -> RunConfig:
    values = {
        "name": "x",
        "model": {"path": "m", **options.pop("model", {})},
        "data": {"source": "s", "resolution": 64},
        "trainer": options.pop("trainer", {"method": "dpo"}),
        "optim": {"lr": 1e-4, "steps": 9, "batch_size": 2},
        "curriculum": {"stages": 2, "steps": 3, **options},
    }
    return RunConfig.model_validate(values)


def cached(preference: list[float], **gaps: list[float]) -> Any:
    count = len(preference)
    columns = (
        np.arange(count),
        np.zeros(count, np.int64),
        np.asarray(preference, np.float32),
        np.ones(count),
    )
    return SimpleNamespace(pairs=Pairs(*columns, gaps={name: np.asarray(gap) for name, gap in gaps.items()}))


def test_clear_pairs_come_first_by_label_or_by_aspect():
    cache = cached([0.6, 1.0, 0.7, 0.9], style=[-3.0, 1.0, np.nan, 2.0])
    assert open_curriculum(config(), cache).order.tolist() == [1, 3, 2, 0]
    # The size of a gap counts, whatever the label says about it; unknown ones come last.
    assert open_curriculum(config(gap="style"), cache).order.tolist() == [0, 3, 1, 2]
    assert open_curriculum(config(stages=1, steps=None), cache) is None


def test_stages_draw_their_own_pairs_and_every_pair_once_an_epoch():
    plan = Curriculum(np.arange(10)[::-1].copy(), stages=3, steps=2)
    assert [plan.stage(step) for step in range(8)] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [sorted(plan.pool(stage).tolist()) for stage in range(3)] == [[6, 7, 8, 9], [3, 4, 5], [0, 1, 2]]
    assert sorted(plan.records(0, 0, 2) + plan.records(0, 1, 2)) == [6, 7, 8, 9]
    assert sorted(plan.records(0, 4, 3)) == [0, 1, 2]
    assert plan.records(0, 3, 2) == plan.records(0, 3, 2)
    orders = {tuple(plan.records(seed, 0, 4)) for seed in range(8)}
    assert len(orders) > 1


def test_earlier_pairs_can_stay():
    plan = Curriculum(np.arange(6), stages=3, steps=1, keep=True)
    assert [plan.pool(stage).tolist() for stage in range(3)] == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


def test_the_reference_follows_at_the_first_step_of_each_later_stage():
    plan = Curriculum(np.arange(9), stages=3, steps=2, refresh=True)
    assert [step for step in range(9) if plan.refreshes(step)] == [2, 4]
    fixed = Curriculum(np.arange(9), stages=3, steps=2)
    assert not any(fixed.refreshes(step) for step in range(9))


def test_inside_the_block_and_only_there_the_backbone_has_an_anchor():
    backbone, parameter = SimpleNamespace(anchor=()), torch.nn.Parameter(torch.zeros(2))
    with anchored(backbone, [parameter], None):
        assert backbone.anchor == ()
    seen = []
    with suppress(KeyError), anchored(backbone, [parameter], [torch.ones(2)]):
        seen = list(backbone.anchor)
        raise KeyError
    assert seen[0][0] is parameter
    assert backbone.anchor == ()


def test_pairs_that_cannot_be_ordered_are_refused():
    with pytest.raises(DiffalignError, match=r"all 3 pairs have the same gap \(label\).*curriculum.gap"):
        open_curriculum(config(), cached([1.0, 1.0, 1.0]))
    with pytest.raises(DiffalignError, match=r"curriculum.gap names 'styl'"):
        open_curriculum(config(gap="styl"), cached([1.0, 0.6], style=[1.0, 2.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 2}, "optimiser steps of a stage"),
        ({"reference": "stage"}, "reference should be base when stages is 1"),
    ],
)
def test_incomplete_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        CurriculumConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": {"method": "mapo"}}, "not an option of this method"),
        ({"trainer": {"method": "dpo", "reference": "cached"}}, "'cached'"),
        ({"model": {"tune": "full"}}, "model.tune=lora"),
    ],
)
def test_a_reference_that_cannot_follow_is_refused_before_anything_is_loaded(options, message):
    check_curriculum(config(**options))
    with pytest.raises(DiffalignError, match=message):
        check_curriculum(config(**options, reference="stage"))
    with pytest.raises(DiffalignError, match="FSDP"):
        check_curriculum(config(reference="stage"), sharded=True)


def test_reward_models_have_no_curriculum():
    scorer = {"trainer": {"method": "reward_model"}, "model": {"tune": "head"}}
    with pytest.raises(DiffalignError, match=r"reward_model learns from judgements"):
        check_curriculum(config(**scorer))


class FollowingTrainer(fakes.LinearTrainer):
    """Least squares with a pull to what the reference says, and a list of what was drawn."""

    drawn: dict[int, set[int]]

    def loss(self, batch: Any) -> Any:
        losses, metrics = super().loss(batch)
        self.drawn.setdefault(batch.draw.step, set()).update(batch.draw.records)
        pull = [(p - value).square().sum() for p, value in self.backbone.anchor]
        return losses + sum(pull), metrics


def run(
    folder: Path, steps: int, drawn: dict[int, set[int]], resume: bool = False
) -> dict[str, torch.Tensor]:
    def assemble(configured: Any, parallel: Any, reporter: Any) -> Any:
        parts = fakes.assemble(configured, parallel, reporter)
        parts.backbone.anchor = ()
        parts.trainer = FollowingTrainer(parts.trainer.config, parts.backbone)
        parts.trainer.drawn = drawn
        parts.curriculum = Curriculum(np.arange(37), stages=3, steps=3, refresh=True)
        return parts

    settings = fakes.run_config(
        folder, f"optim.steps={steps}", "checkpoint.every=100", "optim.schedule=constant"
    )
    train(settings, resume=resume, assemble=assemble, reporter=Reporter(enabled=False))
    return load_file(folder / "run" / "final" / "trainable.safetensors")


@pytest.mark.parametrize("interrupted", [2, 3, 5])
def test_resuming_before_at_and_after_a_stage_begins_gives_the_same_weights_to_the_bit(interrupted, tmp_path):
    drawn: dict[int, set[int]] = {}
    whole = run(tmp_path / "whole", 8, drawn)
    assert max(drawn[0] | drawn[1] | drawn[2]) < 13 <= min(drawn[3] | drawn[4] | drawn[5])
    assert min(drawn[6] | drawn[7]) >= 25
    run(tmp_path / "parts", interrupted, {})
    parts = run(tmp_path / "parts", 8, {}, resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_reference_makes_a_difference(tmp_path, monkeypatch):
    followed = run(tmp_path / "a", 6, {})
    monkeypatch.setattr(Curriculum, "refreshes", lambda self, step: False)
    fixed = run(tmp_path / "b", 6, {})
    assert any(not torch.equal(followed[name], fixed[name]) for name in followed)
