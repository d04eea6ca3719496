import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from few_steps import PROMPTS, consistency, folder, fresh_turbo, turbo

from diffalign.backbones import open_backbone
from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError
from diffalign.inference.generation import Generation, ready
from diffalign.inference.own_sampler import check_steps, is_few_step, usual_settings
from diffalign.sampling.generate import generate_images
from diffalign.sampling.initial import pipeline_latents
from diffalign.sampling.transition import Kernel

SEEDS = [3, 5]


def pictures(backbone, steps, guidance, **options):
    generation = Generation(backbone, PROMPTS, steps=steps, guidance=guidance, **options)
    with ready(backbone):
        return generation, generation.media(generation.start(SEEDS))


@pytest.mark.parametrize(("steps", "noises"), [(1, 1), (4, 4)])
def test_the_noises_of_seeds_give_the_pictures_of_generate(steps, noises):
    """Noise of the steps included: an LCM draws after all of its steps but the last."""
    for backbone, guidance in ((turbo(), 0.0), (consistency(), 4.0)):
        generation, found = pictures(backbone, steps, guidance)
        expected = generate_images(backbone, PROMPTS, SEEDS, steps=steps, guidance=guidance)
        assert generation.exact
        assert generation.noise_shape == (noises, 4, 16, 16)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd3", "tiny_flux", "tiny_z_image"])
def test_ordinary_models_too(family, request):
    path = request.getfixturevalue(family)
    resolution = 64 if family in ("tiny_flux", "tiny_z_image") else None
    backbone = open_backbone(ModelConfig(path=str(path)), device="cpu", resolution=resolution)
    generation, found = pictures(backbone, 3, 3.0)
    expected = generate_images(backbone, PROMPTS, SEEDS, steps=3, guidance=3.0)
    assert generation.exact
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_times_that_are_not_whole_numbers_are_told(tiny_sdxl):
    """Euler with spacing "linspace" visits 499.5, where there is no level of our table."""
    backbone = open_backbone(ModelConfig(path=str(tiny_sdxl)), device="cpu")
    assert not Generation(backbone, PROMPTS, steps=3, guidance=1.0).exact


def test_plain_diffusers_draws_the_same_picture_of_the_latents():
    backbone = turbo()
    generation, found = pictures(backbone, 1, 0.0)
    latents = pipeline_latents(generation.start(SEEDS)[:, 0], backbone.family)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder("sdxl-turbo"))
    drawn = pipeline(
        PROMPTS, latents=latents, num_inference_steps=1, guidance_scale=0.0, output_type="pt"
    ).images
    torch.testing.assert_close(found, drawn, atol=1e-4, rtol=0)


def test_flux_latents_are_packed_as_its_pipeline_packs_them(tiny_flux):
    from diffusers import FluxPipeline

    noise = torch.randn(2, 16, 4, 6)
    packed = FluxPipeline._pack_latents(noise, 2, 16, 4, 6)
    assert torch.equal(pipeline_latents(noise, "flux"), packed)


@pytest.mark.parametrize("checkpointing", ["none", "steps", "blocks"])
def test_the_gradient_of_the_whole_chain_is_that_of_finite_differences(checkpointing):
    """Network in two steps, VAE and a smooth reward in float64: the two differ by the step size squared alone."""
    backbone = fresh_turbo()
    generation = Generation(backbone, PROMPTS, steps=2, guidance=0.0, checkpointing=checkpointing)
    backbone.core.double()
    backbone.pipeline().vae.double()
    backbone.dtype = torch.float64
    noises = generation.start(SEEDS).double().requires_grad_()
    direction = torch.randn(noises.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def reward(values):
        return (generation(values).square().mean((1, 2, 3)) * torch.tensor([1.0, -2.0])).sum()

    with ready(backbone, checkpointing):
        value = reward(noises)
        value.backward()
        with torch.no_grad():
            ahead, behind = (reward(noises + sign * 1e-5 * direction) for sign in (1, -1))
    assert value.dtype == torch.float64
    expected = (ahead - behind) / 2e-5
    assert abs(float(expected)) > 1e-5
    assert float((noises.grad * direction).sum()) == pytest.approx(float(expected), rel=1e-5)


def test_prompts_do_not_touch_each_other():
    generation, both = pictures(turbo(), 2, 0.0)
    noises = generation.start(SEEDS)
    alone = generation.media(noises[1:], rows=[1])
    torch.testing.assert_close(alone[0], both[1], atol=1e-5, rtol=0)
    swapped = generation.media(noises.flip(0), rows=[1, 0])
    torch.testing.assert_close(swapped, both.flip(0), atol=1e-5, rtol=0)


def test_evaluations_are_counted_by_picture_step_and_branch(tiny_sdxl):
    backbone = open_backbone(ModelConfig(path=str(tiny_sdxl)), device="cpu")
    guided = Generation(backbone, PROMPTS, steps=3, guidance=2.0)
    guided.media(guided.start(SEEDS))
    assert (guided.cost, guided.evaluations) == (6, 12)
    assert Generation(backbone, PROMPTS, steps=3, guidance=1.0).cost == 3
    assert Generation(consistency(), PROMPTS, steps=2, guidance=8.0).cost == 2


def test_another_kernel_draws_noise_at_its_steps(tiny_sdxl):
    backbone = open_backbone(ModelConfig(path=str(tiny_sdxl)), device="cpu")
    generation, found = pictures(backbone, 4, 2.0, kernel=Kernel("ddim", 1.0))
    assert generation.noise_shape[0] == 4  # the last step ends at clean data and draws none
    assert not generation.exact
    changed = generation.start(SEEDS)
    changed[:, 2] = -changed[:, 2]
    assert float((generation.media(changed) - found).abs().max()) > 1e-3


def test_weights_get_no_gradient_inside_and_are_as_before_outside():
    backbone = fresh_turbo()
    trained = [name for name, p in backbone.core.named_parameters() if p.requires_grad]
    backbone.core.train()
    with ready(backbone, "blocks"):
        assert not any(p.requires_grad for p in backbone.core.parameters())
        assert backbone.core.is_gradient_checkpointing
        assert not backbone.core.training
    assert trained == [name for name, p in backbone.core.named_parameters() if p.requires_grad]
    assert trained
    assert not backbone.core.is_gradient_checkpointing
    assert backbone.core.training


def test_wrong_shapes_are_refused():
    generation = Generation(turbo(), PROMPTS, steps=1, guidance=0.0)
    with pytest.raises(DiffalignError, match=r"\(2, 4, 16, 16\); expected \(2, 1, 4, 16, 16\)"):
        generation(torch.zeros(2, 4, 16, 16))


def test_a_one_step_recipe_does_not_fit_an_ordinary_model(tiny_sdxl, tiny_flux_schnell):
    ordinary = open_backbone(ModelConfig(path=str(tiny_sdxl)), device="cpu")
    with pytest.raises(DiffalignError, match=r"generation.steps is 1, .* ordinary .* generation.steps=20"):
        check_steps(ordinary, 1, None)
    check_steps(ordinary, 20, None)
    check_steps(ordinary, 1, True)
    assert usual_settings(ordinary) == (25, 5.0)
    assert usual_settings(turbo()) == (1, 0.0)
    assert usual_settings(consistency()) == (1, 8.0)
    assert is_few_step(open_backbone(ModelConfig(path=str(tiny_flux_schnell)), device="cpu", resolution=64))
