"""Noise adapters and their trainer: the network stays as it is, the noise moves where the reward rises."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_few_step
from torch import Tensor

from diffalign import plan
from diffalign.backbones import Backbone, open_backbone
from diffalign.backbones.noise_adapters import noise_change
from diffalign.config import ModelConfig, RunConfig
from diffalign.engine import train
from diffalign.engine.assembly import assemble
from diffalign.engine.fit import check_fit
from diffalign.engine.parallel import Parallel
from diffalign.errors import DiffalignError
from diffalign.export import export_run
from diffalign.inference.generation import Generation
from diffalign.progress import Reporter
from diffalign.randomness import Draw
from diffalign.rewards import RewardOutput
from diffalign.sampling.generate import generate_images
from diffalign.trainers.hypernoise import HypernoiseConfig, HypernoiseTrainer

PROMPTS = ["a red circle", "two blue squares", "a green star"]


class Warmth:
    """Ten times red less blue of the mean pixel."""

    name, modality, differentiable, kind = "warmth", "image", True, "sample"

    def score(self, media: Tensor, prompts: Any) -> RewardOutput:
        mean = media.mean((2, 3))
        return RewardOutput(10 * (mean[:, 0] - mean[:, 2]))


def coolness(pictures: Tensor, prompts: Any) -> Tensor:
    """A black box."""
    return pictures[:, 2].mean((1, 2))


@lru_cache
def folder(sampler: str = "sdxl-turbo", width: int | None = None) -> Path:
    return build_few_step(Path(mkdtemp()) / sampler, sampler, width, sdxl=True)


def opened(path: Path | None = None, changes: str = "noise", loud: float = 0.0) -> Backbone:
    """A model with adapters for the noise; `loud` is the size of their second factors."""
    lora = {"rank": 4, "alpha": 8, "changes": changes, "targets": "attention+conv"}
    config = ModelConfig(path=str(path or folder()), precision="fp32", lora=lora)
    backbone = open_backbone(config, device="cpu", resolution=64)
    source = torch.Generator().manual_seed(0)
    for name, value in backbone.trainable_state().items():
        if loud and "lora_B" in name:
            value.copy_(loud * torch.randn(value.shape, generator=source))
    return backbone


def pictures(backbone: Backbone, steps: int = 1, guidance: float = 0.0) -> Tensor:
    return generate_images(backbone, PROMPTS[:2], [3, 4], steps=steps, guidance=guidance)


def trainer(backbone: Backbone | None = None, **options: Any) -> HypernoiseTrainer:
    made = HypernoiseTrainer(HypernoiseConfig(**options), backbone or opened(loud=0.05))
    made.reward, made.prompts = Warmth(), PROMPTS
    return made


class ExactDraw(Draw):
    """Noise in float64."""

    def normal(self, shape: Any, *keys: int | str) -> Tensor:
        return super().normal(shape, *keys).double()


def draw(*records: int, step: int = 0) -> Draw:
    return Draw(0, step, records, range(len(records)), len(records))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("tiny_sd3", "tiny_flux", "tiny_z_image")]


@pytest.mark.parametrize("family", ["sdxl-turbo", *SLOW])
def test_pictures_are_the_models_own_before_training(family, request):
    """The change is exactly 0, and every family's pipeline takes the noise in the form it is given."""
    path = folder() if family == "sdxl-turbo" else request.getfixturevalue(family)
    plain, steps = opened(path, "network"), 1 if family == "sdxl-turbo" else 2
    torch.testing.assert_close(pictures(opened(path), steps), pictures(plain, steps), atol=1e-6, rtol=0)


def test_the_network_stays_as_it_is_and_the_noise_does_not():
    backbone, plain = opened(loud=0.3), opened()
    noise = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    generation = Generation(backbone, PROMPTS[:2], steps=1, guidance=0.0)
    cond, t = generation.told.conditioning, torch.tensor([999, 999])
    assert torch.equal(backbone.predict(noise, t, cond), plain.predict(noise, t, cond))
    change = noise_change(backbone, noise, t, cond)
    assert change.square().mean() > 1e-3
    assert not noise_change(plain, noise, t, cond).any()
    assert torch.equal(backbone.predict(noise, t, cond), plain.predict(noise, t, cond))
    changed, base = pictures(backbone), pictures(plain)
    assert (changed - base).abs().max() > 0.01
    with backbone.reference():
        assert torch.equal(pictures(backbone), base)
    assert torch.equal(pictures(backbone), changed)


@pytest.mark.parametrize(("sampler", "width", "steps"), [("sdxl-turbo", None, 1), ("lcm", 8, 3)])
def test_optimisation_starts_at_the_pictures_of_generate(sampler, width, steps):
    backbone = opened(folder(sampler, width), loud=0.3)
    guidance = 4.0 if width else 0.0
    generation = Generation(backbone, PROMPTS[:2], steps=steps, guidance=guidance)
    found = generation.media(generation.start([3, 4]))
    torch.testing.assert_close(found, pictures(backbone, steps, guidance), atol=1e-4, rtol=0)


def test_the_loss_is_the_change_less_the_reward():
    """Redone by hand: noise, its change, the picture of their sum."""
    made = trainer(regularisation=0.25, weight=3.0)
    losses, metrics = made.loss(made.fetch(draw(2, 0)))
    generation = Generation(made.backbone, [PROMPTS[2], PROMPTS[0]], steps=1, guidance=0.0)
    noise = draw(2, 0).normal(generation.noise_shape, "noise")[:, 0]
    with torch.no_grad():
        change = noise_change(made.backbone, noise, torch.tensor([999, 999]), generation.told.conditioning)
        rewards = Warmth().score(generation((noise + change)[:, None]), PROMPTS).mean
    assert (change.square().mean() > 1e-5).all()
    torch.testing.assert_close(metrics["reward"], rewards)
    torch.testing.assert_close(metrics["change"], change.square().mean((1, 2, 3)))
    torch.testing.assert_close(losses, 0.25 * change.square().mean((1, 2, 3)) - 3 * rewards)


def test_the_gradient_is_that_of_finite_differences_and_reaches_adapters_alone():
    made = trainer(weight=2.0)
    backbone = made.backbone
    backbone.core.double()
    backbone.pipeline().vae.double()
    backbone.dtype = torch.float64
    named = backbone.trainable_parameters()
    batch = made.fetch(ExactDraw(0, 0, (0, 1), (0, 1), 2))
    made.loss(batch)[0].sum().backward()
    assert all("lora_" in name for name, _ in named)
    assert not any(p.grad is not None for p in backbone.pipeline().vae.parameters())
    source = torch.Generator().manual_seed(1)
    towards = [torch.randn(p.shape, generator=source, dtype=torch.float64) for _, p in named]
    slope = sum(float((p.grad * d).sum()) for (_, p), d in zip(named, towards, strict=True))
    values = []
    for sign in (1e-5, -2e-5):
        with torch.no_grad():
            for (_, p), d in zip(named, towards, strict=True):
                p += sign * d
            values.append(float(made.loss(batch)[0].sum()))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


def test_rows_do_not_depend_on_the_batch_and_noises_are_new_at_each_step():
    made = trainer()
    with torch.no_grad():
        both = made.loss(made.fetch(draw(0, 1)))[0]
        parts = [made.loss(made.fetch(draw(0, 1).slice(i, i + 1)))[0] for i in (0, 1)]
        later = made.loss(made.fetch(draw(0, 1, step=1)))[0]
    torch.testing.assert_close(both, torch.cat(parts), atol=1e-5, rtol=0)
    assert (both - later).abs().min() > 1e-4


def run_config(place: Path, name: str, **changes: Any) -> RunConfig:
    """Eight steps of three prompts."""
    prompts = place / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    lora = {"rank": 4, "alpha": 8, "targets": "attention+conv", "changes": "noise"}
    values: dict[str, Any] = {
        "name": name,
        "output_dir": str(place),
        "model": {"path": str(folder()), "precision": "fp32", "lora": lora},
        "data": {"source": "scenes:preferences", "resolution": 64},
        "trainer": {"method": "hypernoise", "reward": f"{__name__}:Warmth", "prompts": str(prompts)},
        "optim": {"steps": 8, "batch_size": 3, "lr": 1e-2, "warmup": 0, "schedule": "constant"},
        "checkpoint": {"every": 100},
    }
    for key, value in changes.items():
        section, _, option = key.partition("__")
        values[section][option] = value
    return RunConfig.model_validate(values)


def run(config: RunConfig, resume: bool = False) -> dict[str, Tensor]:
    """The trained weights."""
    train(config, resume=resume, reporter=Reporter(enabled=False))
    return load_file(config.folder / "final" / "trainable.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run."""
    config = run_config(tmp_path_factory.mktemp("runs"), "whole")
    run(config)
    return config


def test_training_makes_pictures_of_fresh_noises_better(finished):
    backbone, texts, seeds = opened(), PROMPTS * 4, list(range(100, 112))

    def scores() -> Tensor:
        return Warmth().score(generate_images(backbone, texts, seeds, steps=1, guidance=0.0), texts).mean

    before = scores()
    backbone.load_trainable_state(load_file(finished.folder / "final" / "trainable.safetensors"))
    after = scores()
    assert ((after - before) > 0).float().mean() > 0.9


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(finished, tmp_path):
    short = run_config(tmp_path, "whole", optim__steps=5)
    run(short)
    resumed = run(run_config(tmp_path, "whole"), resume=True)
    whole = load_file(finished.folder / "final" / "trainable.safetensors")
    for name, value in resumed.items():
        assert torch.equal(value, whole[name]), name


def test_exports_say_how_the_adapters_are_applied(finished, tmp_path):
    card = (finished.folder / "final" / "README.md").read_text()
    assert "Add the difference of the two answers to the noise" in card
    found = export_run(finished.folder, "peft", tmp_path / "peft")
    assert "they spoil pictures" in found[-1].read_text()
    for format in ("kohya", "merged"):
        with pytest.raises(DiffalignError, match="change the initial noise"):
            export_run(finished.folder, format, tmp_path / format)


def test_adapters_must_be_for_what_the_method_learns(tmp_path):
    wrong = run_config(tmp_path, "x", model__lora={"changes": "network"})
    with pytest.raises(DiffalignError, match=r"Set model\.lora\.changes=noise"):
        check_fit(wrong)
    dpo = run_config(tmp_path, "x", trainer__method="dpo")
    dpo = dpo.model_copy(update={"trainer": {"method": "dpo"}})
    with pytest.raises(DiffalignError, match=r"Set model\.lora\.changes=network"):
        check_fit(dpo)
    with pytest.raises(DiffalignError, match="works with: lora"):
        check_fit(run_config(tmp_path, "x", model__tune="full"))


def test_the_plan_counts_prompts(tmp_path):
    """Eight steps of three of three prompts."""
    config = run_config(tmp_path, "x")
    assert plan._amount(config) == plan.Amount(3, "prompts", 1)
    assert plan.Plan(config, torch.float32, False, None, plan._amount(config)).epochs == 8


def test_a_black_box_is_refused(tmp_path):
    config = run_config(tmp_path, "x", trainer__reward=f"{__name__}:coolness")
    with pytest.raises(DiffalignError, match=r"needs gradients, but trainer\.reward 'coolness' has none"):
        assemble(config, Parallel(), Reporter(enabled=False))
