"""Rewards of noisy latents: the loss of a pair, what both sides share, learning, and a run of the engine."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_world import open_pairs, whole_draw
from safetensors.torch import load_file

from diffalign.backbones import open_backbone
from diffalign.backbones.early import read_only
from diffalign.config import ModelConfig, RunConfig, load_recipe
from diffalign.engine import train
from diffalign.engine.latent_assembly import BINS, build_scorer, held_out_accuracy
from diffalign.errors import DiffalignError
from diffalign.inference.latent_reward import LatentReward
from diffalign.plan import plan_run
from diffalign.process import Process
from diffalign.progress import Reporter
from diffalign.randomness import Draw
from diffalign.sampling.latent_scorer import HeadSpec, LatentHead, caption_vector, noise_level, waves
from diffalign.trainers.latent_reward import LatentRewardConfig, LatentRewardTrainer

FAMILIES = ("tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux")


def make(model: Path, folder: Path, count: int = 6, **options: Any) -> LatentRewardTrainer:
    config = read_only(ModelConfig(path=str(model), precision="fp32"))
    generator = open_backbone(config, device="cpu", resolution=64)
    generator.core.eval()
    cache = open_pairs(generator, folder, count)
    chosen = LatentRewardConfig(**{"dropout": 0.0, **options})
    scorer = build_scorer(chosen, generator, cache.fetch(Draw(0, 0, [0], [0], 1)), 0)
    trainer = LatentRewardTrainer(chosen, scorer)
    trainer.prepare(cache)
    return trainer


def taught(trainer: LatentRewardTrainer) -> LatentRewardTrainer:
    """With an output layer that is not 0 any more."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trainer.scorer.core.parameters():
            weight += 0.3 * torch.randn(weight.shape)
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.mark.parametrize("family", FAMILIES)
def test_at_first_every_pair_costs_log_2_and_only_the_head_learns(
    family: str, folder: Path, request: Any
) -> None:
    trainer = make(request.getfixturevalue(family), folder / family)
    losses, metrics = trainer.loss(trainer.fetch(whole_draw()))
    torch.testing.assert_close(losses, torch.full((4,), math.log(2)))
    assert metrics["margin"].tolist() == [0, 0, 0, 0]
    assert metrics["accuracy"].tolist() == [0.5] * 4
    taught(trainer).loss(trainer.fetch(whole_draw()))[0].sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for _, p in trainer.scorer.trainable_parameters())
    assert all(p.grad is None for p in trainer.backbone.core.parameters())


def test_swapping_the_pictures_mirrors_the_margin(tiny_sdxl: Path, folder: Path) -> None:
    trainer = taught(make(tiny_sdxl, folder / "tiny_sdxl", label_smoothing=0.1))
    batch = trainer.fetch(whole_draw())
    swapped = replace(
        batch,
        chosen=batch.rejected,
        rejected=batch.chosen,
        conditioning_chosen=batch.conditioning_rejected,
        conditioning_rejected=batch.conditioning_chosen,
    )
    margin = trainer.loss(batch)[1]["margin"]
    assert float(margin.abs().min()) > 1e-3
    torch.testing.assert_close(trainer.loss(swapped)[1]["margin"], -margin)
    mirrored = replace(swapped, preference=1 - batch.preference)
    torch.testing.assert_close(trainer.loss(mirrored)[0], trainer.loss(batch)[0])


def test_the_loss_is_that_of_bradley_and_terry_with_wrong_labels(tiny_sdxl: Path, folder: Path) -> None:
    """Margin 2, a tenth of the labels wrong: 0.9 log(1 + e^-2) + 0.1 log(1 + e^2) = 0.9 0.126928 + 0.1 2.126928."""
    trainer = make(tiny_sdxl, folder / "tiny_sdxl", label_smoothing=0.1)
    trainer.margins = lambda noised: torch.tensor([2.0, 2.0, -2.0, 0.0])  # type: ignore[method-assign]
    batch = replace(trainer.fetch(whole_draw()), weight=torch.tensor([1.0, 0.5, 1.0, 1.0]))
    losses, metrics = trainer.loss(batch)
    assert losses.tolist() == pytest.approx([0.326928, 0.163464, 1.926928, math.log(2)], abs=1e-5)
    assert metrics["accuracy"].tolist() == [1, 1, 0, 0.5]


def test_both_pictures_of_a_pair_get_the_same_noise_and_time(tiny_sdxl: Path, folder: Path) -> None:
    trainer = taught(make(tiny_sdxl, folder / "tiny_sdxl"))
    seen: list[Any] = []
    scorer, process = trainer.scorer, trainer.backbone.process

    class Watching:
        def __call__(self, x_t: Any, t: Any, cond: Any) -> Any:
            seen.append((x_t, t))
            return scorer(x_t, t, cond)

    trainer.scorer = Watching()  # type: ignore[assignment]
    batch = trainer.fetch(whole_draw())
    trainer.loss(batch)
    x_t, t = seen[0]
    assert torch.equal(t[:4], t[4:])
    assert len(set(t[:4].tolist())) == 4
    alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in process.alpha_sigma(t))
    noises = (x_t - alpha * torch.cat([batch.chosen, batch.rejected])) / sigma
    torch.testing.assert_close(noises[:4], noises[4:], atol=1e-3, rtol=0)
    # The same pictures on both sides are never told apart.
    trainer.scorer = scorer
    same = replace(batch, rejected=batch.chosen, conditioning_rejected=batch.conditioning_chosen)
    assert float(trainer.loss(same)[1]["margin"].abs().max()) < 1e-6


def test_several_draws_of_a_pair_are_averaged(tiny_sdxl: Path, folder: Path) -> None:
    """Draws 0 and 1 alone: the second has the keys of draw number 1."""
    trainer = taught(make(tiny_sdxl, folder / "tiny_sdxl", times_per_pair=2))
    batch = trainer.fetch(whole_draw())
    margins = trainer.margins(trainer._noised(batch, 2)).detach()
    losses, metrics = trainer.loss(batch)
    expected = torch.log1p(torch.exp(-margins)).reshape(2, 4).mean(0)
    torch.testing.assert_close(losses.detach(), expected)
    torch.testing.assert_close(metrics["margin"], margins.reshape(2, 4).mean(0))


def test_guidance_multiplies_what_the_caption_changes(tiny_sdxl: Path, folder: Path) -> None:
    trainer = make(tiny_sdxl, folder / "tiny_sdxl")
    noised, scorer = trainer._noised(trainer.fetch(whole_draw())), trainer.scorer
    arguments = (noised.x_t, noised.t, noised.conditioning)
    found = {}
    for scorer.guidance in (0.0, 1.0, 7.5):
        found[scorer.guidance] = scorer.states(*arguments)
    assert float((found[1.0] - found[0.0]).abs().max()) > 1e-4
    expected = found[0.0] + 7.5 * (found[1.0] - found[0.0])
    torch.testing.assert_close(found[7.5], expected, atol=1e-4, rtol=1e-4)


def test_a_separable_set_is_learned(tiny_sdxl: Path, folder: Path) -> None:
    """Chosen latents are brighter in one channel, which the first layers of any network tell of; held-out draws."""
    trainer = make(tiny_sdxl, folder / "tiny_sdxl")
    shift = torch.zeros(4, 1, 1)
    shift[0] = 3.0

    class Brighter:
        def __len__(self) -> int:
            return 6

        def fetch(self, draw: Draw) -> Any:
            batch = trainer._cache.fetch(draw)  # type: ignore[union-attr]
            base = 0.1 * batch.rejected
            told = batch.conditioning_chosen
            return replace(batch, chosen=base + shift, rejected=base - shift, conditioning_rejected=told)

    data = Brighter()
    before = held_out_accuracy(trainer, data, 0, 4)
    assert before["held_out/accuracy"] == 0.5
    assert before["held_out/log_loss"] == pytest.approx(math.log(2), abs=1e-6)
    optimizer = torch.optim.AdamW([p for _, p in trainer.scorer.trainable_parameters()], lr=1e-2)
    for step in range(30):
        optimizer.zero_grad()
        trainer.loss(data.fetch(whole_draw(6, step)))[0].mean().backward()
        optimizer.step()
    after = held_out_accuracy(trainer, data, 0, 4)
    assert after["held_out/accuracy_clean"] == 1.0
    assert after["held_out/accuracy"] > 0.8
    assert after["held_out/log_loss"] < 0.5
    assert after["held_out/pairs"] == 6


def test_thirds_of_the_schedule_are_measured_apart(tiny_sdxl: Path, folder: Path) -> None:
    """Of 1000 timesteps; ties are left out, and a batch size changes nothing."""
    trainer, times = taught(make(tiny_sdxl, folder / "tiny_sdxl")), []
    plain = trainer.margins

    def watched(noised: Any) -> Any:
        times.append(noised.t)
        return plain(noised)

    trainer.margins = watched  # type: ignore[method-assign]
    found = held_out_accuracy(trainer, trainer._cache, 0, 6)
    spans = [(int(t.min()), int(t.max())) for t in times]
    assert [low // 334 for low, _ in spans] == [0, 0, 1, 1, 2, 2]
    assert [high // 334 for _, high in spans] == [0, 0, 1, 1, 2, 2]
    apart = held_out_accuracy(trainer, trainer._cache, 0, 2)
    assert found == pytest.approx(apart, abs=1e-5)
    three = [found[f"held_out/accuracy_{name}"] for name in BINS]
    assert found["held_out/accuracy"] == pytest.approx(sum(three) / 3)


def test_levels_of_noise_are_angles() -> None:
    """Equal signal and noise are half way; clean (a negative step) is 0."""
    assert noise_level(Process("flow"), torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0, 0.5, 1])
    table = torch.tensor([0.75, 0.5], dtype=torch.float64)
    found = noise_level(Process("epsilon", table), torch.tensor([-1, 0, 1]))
    assert found.tolist() == pytest.approx([0, 1 / 3, 0.5], abs=1e-6)
    # Periods of 2, 1, 1/2 and 1/4 of the range.
    found = waves(torch.tensor([0.5]))[0].tolist()
    assert found == pytest.approx([1, 0, 0, 0, 0, -1, 1, 1], abs=1e-5)


def test_heads_begin_alike_for_a_seed_and_read_captions() -> None:
    def head(seed: int) -> LatentHead:
        return LatentHead(HeadSpec(6, 3, hidden=5, dropout=0.0, seed=seed))

    one, two, other = head(1), head(1), head(2)
    assert torch.equal(one.states.weight, two.states.weight)
    assert not torch.equal(one.states.weight, other.states.weight)
    torch.nn.init.ones_(one.out.weight)
    states, level = torch.randn(2, 6), torch.tensor([0.2, 0.7])
    first, second = one(states, torch.randn(2, 3), level), one(states, torch.randn(2, 3), level)
    assert first.shape == (2,)
    assert float((first - second).detach().abs().min()) > 1e-4


def test_captions_without_a_pooled_embedding_are_means() -> None:
    from diffalign.conditioning import Conditioning

    text = torch.tensor([[[1.0], [3.0], [8.0]]])
    assert caption_vector(Conditioning(text)).item() == 4
    assert caption_vector(Conditioning(text, mask=torch.tensor([[1, 1, 0]]))).item() == 2
    assert caption_vector(Conditioning(text, pooled=torch.tensor([[7.0]]))).item() == 7


def recipe(folder: Path, name: str, *more: str) -> RunConfig:
    small = ["optim.batch_size=2", "optim.warmup=0", "checkpoint.every=2", "evaluation.every=0"]
    data = ["data.limit=12", "data.resolution=64", f"data.cache_dir={folder / 'cache'}"]
    return load_recipe("scenes/latent_reward", [*small, *data, f"output_dir={folder}", f"name={name}", *more])


def test_runs_resume_to_the_bit_and_give_a_reward(tiny_sdxl: Path, tmp_path: Path) -> None:
    quiet, model = Reporter(enabled=False), f"model.path={tiny_sdxl}"
    parts = (model, "optim.schedule=constant", "data.held_out=null")
    train(recipe(tmp_path, "parts", *parts, "optim.steps=2"), reporter=quiet)
    resumed = recipe(tmp_path, "parts", *parts, "optim.steps=4")
    train(resumed, resume=True, reporter=quiet)
    straight = recipe(tmp_path, "straight", model, "optim.steps=4", "optim.schedule=constant")
    metrics = train(straight, reporter=quiet).metrics
    states = [load_file(tmp_path / n / "final" / "trainable.safetensors") for n in ("parts", "straight")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert {f"held_out/accuracy_{name}" for name in BINS} <= set(metrics)
    assert 0 <= metrics["held_out/accuracy"] <= 1
    described = json.loads((tmp_path / "straight" / "final" / "latent_reward.json").read_text())
    assert (described["layer"], described["guidance"]) == ("mid_block", 7.5)
    reward = LatentReward(str(tmp_path / "straight"))
    assert reward.name == "latent:straight"
    state = load_file(tmp_path / "straight" / "final" / "trainable.safetensors")
    assert all(torch.equal(value, reward.head.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model.compile=true", "model.compile is true"),
        ("model.gradient_checkpointing=true", "model.gradient_checkpointing is true"),
        ("trainer.layer=up", "no layer 'up'"),
        ("model.tune=lora", "works with: head"),
        ("trainer.time_weighting=logit_normal", "which is for flow models"),
    ],
)
def test_options_that_cannot_work_are_refused(
    option: str, expected: str, tiny_sdxl: Path, tmp_path: Path
) -> None:
    with pytest.raises(DiffalignError, match=expected):
        train(recipe(tmp_path, "bad", f"model.path={tiny_sdxl}", option), reporter=Reporter(enabled=False))


def test_the_plan_counts_the_head_and_half_of_the_network(tmp_path: Path) -> None:
    """States of 128, captions of 64: (128 + 1 + 64 + 1) 64 + (8 + 1) 128 + 65 x 64 + 64 = 17792 weights."""
    plan = plan_run(recipe(tmp_path, "plan"))
    plain = plan_run(recipe(tmp_path, "plan", "trainer.guidance=1"))
    tuned = plan_run(load_recipe("scenes/dpo"))
    assert plan.network is not None
    assert plain.network is not None
    assert tuned.network is not None
    assert plan.network.trained == 17792
    assert plan.network.forward_flops == 2 * plain.network.forward_flops
    assert 0.2 < plain.network.forward_flops / tuned.network.forward_flops < 0.7
    assert "activations" not in plan.memory()
