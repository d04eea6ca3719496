"""Implicit accuracy on pairs whose margins are known."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffalign.backbones import open_backbone
from diffalign.conditioning import Conditioning
from diffalign.config import ModelConfig
from diffalign.data.batch import PairBatch
from diffalign.evaluation.implicit import implicit_accuracy
from diffalign.evaluation.statistics import wilson
from diffalign.randomness import Draw
from diffalign.trainers.dpo import DPOConfig, DPOTrainer


@dataclass
class _Batch:
    preference: Tensor
    records: list[int]

    def to(self, device: str) -> _Batch:
        return self


class _Cache:
    def __init__(self, preference: list[float]) -> None:
        self.preference = torch.tensor(preference)

    def __len__(self) -> int:
        return len(self.preference)

    def fetch(self, draw: Draw) -> _Batch:
        return _Batch(self.preference[list(draw.records)], list(draw.records))


class _Backbone:
    device = "cpu"
    inside = False

    @contextmanager
    def inference(self):  # type: ignore[no-untyped-def]
        self.inside = True
        with torch.no_grad():
            yield
        self.inside = False


class _Trainer:
    """Chosen error change given per record, rejected one 0, plus noise that depends on the draw."""

    def __init__(self, backbone: _Backbone, chosen: list[float], noise: float = 0.0) -> None:
        self.backbone, self.chosen, self.noise = backbone, torch.tensor(chosen), noise
        self.draws: list[tuple[int, float]] = []

    def deltas(self, batch: _Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        assert self.backbone.inside
        assert not torch.is_grad_enabled()
        uniform = draw.uniform("time", stratified=True)
        self.draws += [(draw.step, float(u)) for u in uniform]
        chosen = self.chosen[batch.records] + self.noise * (uniform - 0.5)
        return chosen, torch.zeros_like(chosen)

    def margin(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -10 * (chosen - rejected)


def _measure(chosen: list[float], preference: list[float], **options) -> tuple[dict[str, float], _Trainer]:  # type: ignore[no-untyped-def]
    backbone = _Backbone()
    trainer = _Trainer(backbone, chosen, options.pop("noise", 0.0))
    options = {"seed": 0, "batch_size": 2} | options
    return implicit_accuracy(trainer, backbone, _Cache(preference), **options), trainer


def test_literal_numbers() -> None:
    result, _ = _measure([-0.1, -0.3, 0.1], [1.0, 1.0, 1.0])
    assert result["implicit_accuracy"] == pytest.approx(2 / 3)
    assert (result["implicit_accuracy_low"], result["implicit_accuracy_high"]) == pytest.approx(wilson(2, 3))
    assert result["margin"] == pytest.approx(1.0)
    assert result["chosen_delta"] == pytest.approx(-0.1)
    assert result["rejected_delta"] == 0.0
    assert (result["pairs"], result["ties"]) == (3.0, 0.0)


def test_ties_are_left_out() -> None:
    result, _ = _measure([-0.1, 0.5, 0.1, -9.0], [1.0, 0.5, 1.0, 0.5])
    assert result["implicit_accuracy"] == 0.5
    assert result["margin"] == pytest.approx(0.0, abs=1e-6)
    assert (result["pairs"], result["ties"]) == (2.0, 2.0)


def test_untrained_policy_is_at_one_half_not_at_zero_or_one() -> None:
    result, _ = _measure([0.0] * 5, [1.0] * 5)
    assert result["implicit_accuracy"] == 0.5
    assert result["margin"] == 0.0


def test_preference_for_the_second_turns_the_sign() -> None:
    assert _measure([0.2, 0.2], [0.0, 0.0])[0]["implicit_accuracy"] == 1.0


def test_draws_are_averaged_before_the_sign_is_taken() -> None:
    """Noise far above the signal: single draws are often wrong, their mean over many draws is right."""
    few, _ = _measure([-0.05] * 64, [1.0] * 64, noise=2.0, draws=1)
    many, _ = _measure([-0.05] * 64, [1.0] * 64, noise=2.0, draws=256)
    assert few["implicit_accuracy"] < 0.65
    assert many["implicit_accuracy"] > 0.85


def test_neither_batch_size_nor_a_second_call_changes_anything() -> None:
    chosen = [0.1 * ((i % 5) - 2) for i in range(7)]
    results = [_measure(chosen, [1.0] * 7, noise=1.0, batch_size=size)[0] for size in (1, 3, 7, 7)]
    assert results[0] == pytest.approx(results[1])
    assert results[0] == pytest.approx(results[2])
    assert results[2] == results[3]
    assert _measure(chosen, [1.0] * 7, noise=1.0, seed=1)[0]["margin"] != results[0]["margin"]


def test_times_of_each_draw_cover_the_range() -> None:
    _, trainer = _measure([0.0] * 10, [1.0] * 10, draws=3, batch_size=4)
    for step in range(3):
        strata = sorted(int(u * 10) for s, u in trainer.draws if s == step)
        assert strata == list(range(10))


def test_no_decided_pair_gives_nan_and_counts() -> None:
    result, _ = _measure([0.1, 0.2], [0.5, 0.5])
    assert math.isnan(result["implicit_accuracy"])
    assert (result["pairs"], result["ties"]) == (0.0, 2.0)
    empty, _ = _measure([], [])
    assert (empty["pairs"], empty["ties"]) == (0.0, 0.0)


class _Pairs:
    """Six pairs of random latents in memory, fetched as the trainer expects them."""

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(2, 6, *latent_shape, generator=generator)
        ids = torch.tensor([64.0, 64, 0, 0, 64, 64]).repeat(6, 1)
        embeddings = torch.randn(6, 16, 40, generator=generator)
        self.conditioning = Conditioning(embeddings, torch.randn(6, 12, generator=generator), ids)

    def __len__(self) -> int:
        return 6

    def fetch(self, draw: Draw) -> PairBatch:
        rows, ones = list(draw.records), torch.ones(len(draw))
        told = self.conditioning.select(rows)
        return PairBatch(self.latents[0, rows], self.latents[1, rows], told, told, ones, ones, draw)


def test_with_the_real_trainer(tiny_sdxl: Path) -> None:
    """New adapters: margin exactly 0 and accuracy one half. Moved adapters: another result, repeatable."""
    config = ModelConfig(path=str(tiny_sdxl), precision="fp32")
    backbone = open_backbone(config, device="cpu", resolution=64)
    trainer, pairs = DPOTrainer(DPOConfig(), backbone, 0), _Pairs(backbone.latent_shape)
    fresh = implicit_accuracy(trainer, backbone, pairs, seed=0, batch_size=4, draws=2)
    assert (fresh["margin"], fresh["implicit_accuracy"]) == (0.0, 0.5)
    with torch.no_grad():
        for _, parameter in backbone.trainable_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    moved = [implicit_accuracy(trainer, backbone, pairs, seed=0, batch_size=4, draws=2) for _ in range(2)]
    assert moved[0] == moved[1]
    assert moved[0]["margin"] != 0.0
    assert moved[0]["margin"] == pytest.approx(
        -2500 * (moved[0]["chosen_delta"] - moved[0]["rejected_delta"]), rel=1e-4
    )
    assert backbone.core.training
