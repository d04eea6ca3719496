"""Few-step models: training times that agree with sampling, guidance that is told, pictures equal to the pipelines'."""

from __future__ import annotations

import functools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, LCMScheduler
from pair_world import move_weights, open_pairs, whole_draw
from tiny import NOISE, build_few_step

from diffalign.backbones import LatentConsistency, StableDiffusion, StableDiffusionXL, open_backbone
from diffalign.backbones.guidance import USUAL_SCALE, guidance_embedding, tell_guidance
from diffalign.backbones.loading import Source, open_source
from diffalign.backbones.schedule import scheduler_process
from diffalign.config import LoRAConfig, ModelConfig
from diffalign.errors import DiffalignError
from diffalign.export.runs import save_lora
from diffalign.process import Process
from diffalign.sampling.generate import generate_images
from diffalign.trainers.dpo import DPOConfig, DPOTrainer

# Sampler, width of the embedded guidance scale, SDXL or not; guidance in sampling; steps of `model.few_steps`.
MODELS = {
    "lcm": (("lcm", 8, False), 8.0, None),
    "lcm-sdxl": (("lcm-25", 32, True), 4.5, None),
    "lcm-lora-sdxl": (("lcm", None, True), 1.7, None),
    "sd-turbo": (("sd-turbo", None, False), 0.0, 4),
    "sdxl-turbo": (("sdxl-turbo", None, True), 0.0, 4),
}
PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("few-step")
    return {name: build_few_step(root / name, *facts) for name, (facts, _, _) in MODELS.items()}


@pytest.fixture(scope="module")
def untouched(folders):
    """Backbones whose weights no test changes, by name and options; each is opened once."""
    return functools.cache(lambda name, **options: opened(folders[name], **options))


@pytest.fixture(scope="module")
def plain(folders):
    """The pipelines of diffusers by name; each is loaded once."""
    return functools.cache(lambda name: DiffusionPipeline.from_pretrained(folders[name]))


def opened(folder, frozen_copy=False, **options):
    lora = LoRAConfig(rank=4, alpha=options.pop("alpha", 4))
    config = ModelConfig(path=str(folder), lora=lora, **options)
    return open_backbone(config, device="cpu", resolution=64, frozen_copy=frozen_copy)


def some_inputs(backbone, rows=2):
    torch.manual_seed(0)
    sizes = torch.tensor([[64, 64]]).expand(rows, 2)
    cond = backbone.with_sizes(backbone.encode_prompts(PROMPTS[:rows]), sizes, 0 * sizes, sizes)
    return torch.randn(rows, *backbone.latent_shape), torch.tensor([999, 519])[:rows], cond


def every_time(process: Process) -> list[int]:
    """Every time that training draws, in ascending order."""
    return process.times(torch.linspace(0, 0.9999, 4000)).unique().tolist()


# Times


@pytest.mark.parametrize(("name", "step"), [("lcm", 20), ("lcm-sdxl", 40)])
def test_an_lcm_trains_at_the_times_of_its_distillation_and_samples_at_some_of_them(untouched, name, step):
    backbone = untouched(name)
    drawn = every_time(backbone.process)
    assert drawn == list(range(step - 1, 1000, step))
    scheduler = backbone.pipeline().scheduler
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps
        assert set(scheduler.timesteps.tolist()) <= set(drawn)


def test_each_time_of_the_grid_is_drawn_equally_often():
    process = Process.from_scheduler({"_class_name": "LCMScheduler", "original_inference_steps": 25})
    counts = process.times((torch.arange(25_000) + 0.5) / 25_000).unique(return_counts=True)[1]
    assert counts.tolist() == [1000] * 25


@pytest.mark.parametrize("name", ["sd-turbo", "sdxl-turbo"])
def test_turbo_trains_at_the_times_its_sampler_visits(folders, untouched, name):
    source = open_source(ModelConfig(path=str(folders[name])))
    scheduler = untouched(name).pipeline().scheduler
    visited = {1: [999], 2: [499, 999], 4: [249, 499, 749, 999], 8: list(range(124, 1000, 125))}
    for steps, expected in visited.items():
        assert every_time(scheduler_process(source, steps)) == expected
        scheduler.set_timesteps(steps)
        assert sorted(scheduler.timesteps.tolist()) == expected
    # The four times of Diffusion-DPO's release for SDXL-Turbo, which cover sampling with one and two steps.
    assert visited[4] == sorted({250 * (t % 4) + 249 for t in range(1000)})
    assert {*visited[1], *visited[2]} <= {*visited[4]}
    assert untouched(name).process.grid is None


def test_few_steps_narrow_the_grid_of_an_lcm(untouched):
    assert every_time(untouched("lcm-sdxl", few_steps=4).process) == [279, 519, 759, 999]
    with pytest.raises(DiffalignError, match=r"few_steps is 26: .* smaller than 25"):
        untouched("lcm-sdxl", few_steps=26)


def with_scheduler(folder: Path, target: Path, **changes) -> Source:
    """A model whose scheduler has other options; only its index and scheduler are there."""
    target.mkdir()
    shutil.copy(folder / "model_index.json", target)
    copied = Path(shutil.copytree(folder / "scheduler", target / "scheduler"))
    path = copied / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return open_source(ModelConfig(path=str(target)))


def test_times_that_are_no_few_step_schedule_are_refused(folders, tmp_path):
    turbo = folders["sdxl-turbo"]
    leading = with_scheduler(turbo, tmp_path / "leading", timestep_spacing="leading")
    # Spacing "leading" starts at t = 1 with one step, at 751 with four, and at 1000, which no table has, with 1000.
    with pytest.raises(DiffalignError, match=r"visits \[1.0\]; .* timestep_spacing: trailing"):
        scheduler_process(leading, 1)
    assert every_time(scheduler_process(leading, 4)) == [1, 251, 501, 751]
    with pytest.raises(DiffalignError, match="few_steps is 1000"):
        scheduler_process(leading, 1000)
    twice = with_scheduler(turbo, tmp_path / "twice", _class_name="HeunDiscreteScheduler")
    with pytest.raises(DiffalignError, match="expected different timesteps"):
        scheduler_process(twice, 4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_one_step_of_the_lcm_scheduler_is_the_processs_x0(prediction):
    """c_skip = 0.25 / (9990^2 + 0.25) = 2.5e-9 and c_out = 1 - 1.3e-9 at t = 999: the boundary condition is void."""
    scheduler = LCMScheduler(**NOISE, prediction_type=prediction)
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(999)
    assert 0 < skip < 3e-9
    assert 0 < 1 - out < 2e-9
    scheduler.set_timesteps(1)
    torch.manual_seed(0)
    pred, x_t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    expected = scheduler.step(pred, scheduler.timesteps[0], x_t).prev_sample
    x0 = Process.from_scheduler(dict(scheduler.config)).to_x0(pred, x_t, torch.tensor([999, 999]))
    torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-4)


# Guidance


@pytest.mark.parametrize("width", [8, 9, 32])
def test_guidance_is_embedded_as_the_pipelines_do(width):
    scales = torch.tensor([1.0, 1.5, 8.0, 14.25])
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales - 1, width)
    torch.testing.assert_close(guidance_embedding(scales, width), expected, rtol=0, atol=5e-3)
    # Scale 1 is no guidance: sines of 0 and cosines of 0. Lowest frequency: 1000 / 10000 = 0.1 per unit of scale.
    half = width // 2
    embedded = guidance_embedding(torch.tensor([1.0, 3.0]), width)
    assert embedded[0].tolist() == [0.0] * half + [1.0] * half + [0.0] * (width % 2)
    assert embedded[1, half - 1].item() == pytest.approx(math.sin(0.2), abs=1e-5)
    assert embedded[1, 2 * half - 1].item() == pytest.approx(math.cos(0.2), abs=1e-5)


@pytest.mark.parametrize("name", ["lcm", "lcm-sdxl"])
def test_guidance_is_told_by_the_batch_else_the_configuration_else_the_usual_scale(untouched, name):
    backbone, other = untouched(name), untouched(name, guidance_embedding=3.0)
    x, t, cond = some_inputs(backbone)

    def told(scale):
        return backbone.predict(x, t, tell_guidance(cond, scale))

    assert torch.equal(backbone.predict(x, t, cond), told(USUAL_SCALE))
    assert torch.equal(other.predict(x, t, cond), told(3.0))
    assert torch.equal(other.predict(x, t, tell_guidance(cond, 5.0)), told(5.0))
    assert (told(3.0) - told(5.0)).abs().max() > 1e-3
    each = told(torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(each, torch.stack([told(3.0)[0], told(5.0)[1]]))
    assert torch.equal(backbone.predict(x, t, cond, reference=True), told(USUAL_SCALE))


@pytest.mark.parametrize(
    ("name", "rows"), [("lcm", 2), ("lcm-sdxl", 2), ("lcm-lora-sdxl", 4), ("sd-turbo", 4)]
)
def test_guidance_that_is_told_costs_no_second_forward(untouched, name, rows):
    backbone = untouched(name)
    x, t, cond = some_inputs(backbone)
    seen = []
    handle = backbone.core.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    guided = backbone.guided(x, t, cond, backbone.unconditional(2), 3.0)
    handle.remove()
    assert seen == [rows]
    if rows == 2:
        assert torch.equal(guided, backbone.predict(x, t, tell_guidance(cond, 3.0)))


# Equal to diffusers


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_pictures_are_those_of_the_pipeline(untouched, plain, name, steps):
    guidance = MODELS[name][1]
    pipeline = plain(name)
    images = generate_images(untouched(name), PROMPTS, [5, 6], steps=steps, guidance=guidance)
    for prompt, seed, image in zip(PROMPTS, (5, 6), images, strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        expected = pipeline(
            prompt, num_inference_steps=steps, guidance_scale=guidance, height=64, width=64, generator=generator,
            output_type="pt",
        ).images[0]  # fmt: skip
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["lcm", "lcm-sdxl", "lcm-lora-sdxl"])
def test_multistep_consistency_sampling_in_the_terms_of_the_process(untouched, plain, name):
    """x0 from the guided prediction, noised again to the next time: Luo et al. 2023, algorithm 3."""
    backbone, scale = untouched(name), 1.7
    pipeline = plain(name)
    options = {"num_inference_steps": 4, "guidance_scale": scale, "height": 64, "width": 64}
    generator = torch.Generator("cpu").manual_seed(3)
    expected = pipeline(PROMPTS, generator=generator, output_type="latent", **options).images

    generator.manual_seed(3)
    process, (_, _, cond) = backbone.process, some_inputs(backbone)
    times = pipeline.scheduler.timesteps.tolist()
    x = torch.randn(2, *backbone.latent_shape, generator=generator)
    with backbone.inference():
        for t, following in zip(times, [*times[1:], None], strict=True):
            now = torch.full((2,), t)
            pred = backbone.guided(x, now, cond, backbone.unconditional(2), scale)
            x = process.to_x0(pred, x, now)
            if following is not None:
                noise = torch.randn(x.shape, generator=generator)
                x = process.noise(x, noise, torch.full((2,), following))
    # 3e-5 at most in float32; latents are about 15.
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-3)


def test_more_steps_than_an_lcm_was_distilled_at_are_refused(untouched):
    with pytest.raises(DiffalignError, match=r"steps is 26.* at most 25"):
        generate_images(untouched("lcm-sdxl"), ["a"], [0], steps=26, guidance=4.0)


# Tuning


def test_families(untouched):
    families = {name: type(untouched(name)) for name in MODELS}
    assert families == {
        "lcm": LatentConsistency,
        "lcm-sdxl": StableDiffusionXL,
        "lcm-lora-sdxl": StableDiffusionXL,
        "sd-turbo": StableDiffusion,
        "sdxl-turbo": StableDiffusionXL,
    }


@pytest.mark.parametrize(
    ("name", "tune"), [("lcm", "lora"), ("lcm-sdxl", "lora"), ("lcm-sdxl", "full"), ("sdxl-turbo", "lora")]
)
def test_dpo_starts_at_margin_zero_and_at_times_of_the_grid(folders, name, tune, tmp_path):
    options = {"few_steps": MODELS[name][2], "tune": tune, "frozen_copy": tune == "full"}
    backbone = opened(folders[name], **options)
    trainer = DPOTrainer(DPOConfig(caption_dropout=0.5), backbone)
    trainer.prepare(open_pairs(backbone, tmp_path))
    times = []
    backbone.core.register_forward_pre_hook(lambda module, args: times.extend(args[1].tolist()))
    batch = trainer.fetch(whole_draw())
    losses, metrics = trainer.loss(batch)
    assert metrics["margin"].tolist() == [0.0] * 4
    torch.testing.assert_close(losses, torch.full((4,), math.log(2)))
    assert set(times) <= set(backbone.process.grid.tolist())
    losses.mean().backward()
    assert sum(p.grad.abs().sum() for _, p in backbone.trainable_parameters() if p.grad is not None) > 0
    move_weights(backbone)
    assert trainer.loss(batch)[1]["margin"].abs().max() > 0.01


@pytest.mark.parametrize("name", ["lcm", "lcm-sdxl"])
def test_lora_loads_into_the_plain_pipeline(folders, name, tmp_path):
    backbone = opened(folders[name], alpha=7)
    guidance = MODELS[name][1]
    before = generate_images(backbone, PROMPTS, [5, 6], steps=2, guidance=guidance)
    move_weights(backbone, 0.2)
    tuned = generate_images(backbone, PROMPTS, [5, 6], steps=2, guidance=guidance)
    save_lora(backbone, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(folders[name])
    pipeline.load_lora_weights(tmp_path)
    loaded = generate_images(pipeline, PROMPTS, [5, 6], steps=2, guidance=guidance, resolution=(64, 64))
    torch.testing.assert_close(loaded, tuned, rtol=0, atol=1e-4)
    assert (tuned - before).abs().max() > 1e-2


def test_every_linear_layer_may_be_adapted_that_of_the_guidance_too(folders):
    config = ModelConfig(path=str(folders["lcm-sdxl"]), lora=LoRAConfig(rank=2, targets="all-linear"))
    backbone = open_backbone(config, device="cpu", resolution=64)
    names = [name for name, _ in backbone.trainable_parameters()]
    assert any(name.startswith("time_embedding.cond_proj.lora_A") for name in names)
    inputs = some_inputs(backbone)
    assert torch.equal(backbone.predict(*inputs), backbone.predict(*inputs, reference=True))
