import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from diffalign.backbones import open_backbone
from diffalign.config import LoRAConfig, ModelConfig
from diffalign.errors import DiffalignError
from diffalign.sampling.generate import generate_images

PROMPTS = ["a red circle", "two blue squares", "", "a star"]
SEEDS = [7, 8, 9, 7]


def opened(folder, resolution=64, **options):
    lora = LoRAConfig(rank=4, dropout=options.pop("dropout", 0.0))
    return open_backbone(
        ModelConfig(path=str(folder), lora=lora, **options), device="cpu", resolution=resolution
    )


def generate(model, prompts=PROMPTS, seeds=SEEDS, steps=3, guidance=4.0, **options):
    return generate_images(model, prompts, seeds, steps=steps, guidance=guidance, **options)


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_pictures_are_those_of_the_pipeline(request, family):
    folder = request.getfixturevalue(f"tiny_{family}")
    cls = {"sdxl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline}[family]
    pipeline = cls.from_pretrained(folder)
    images = generate(opened(folder), batch_size=3)
    assert images.shape == (4, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    for prompt, seed, image in zip(PROMPTS, SEEDS, images, strict=True):
        expected = pipeline(
            prompt,
            num_inference_steps=3,
            guidance_scale=4.0,
            height=64,
            width=64,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="pt",
        ).images[0]
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)


def test_a_picture_does_not_depend_on_its_batch(tiny_sdxl):
    backbone = opened(tiny_sdxl)
    together = generate(backbone, batch_size=4)
    apart = generate(backbone, batch_size=1)
    reversed_order = generate(backbone, PROMPTS[::-1], SEEDS[::-1], batch_size=3).flip(0)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)
    torch.testing.assert_close(together, reversed_order, rtol=0, atol=1e-4)


def test_seed_prompt_and_guidance_each_matter(tiny_sdxl):
    backbone = opened(tiny_sdxl)
    base = generate(backbone, ["a"], [1])
    assert torch.equal(generate(backbone, ["a"], [1]), base)
    others = [
        generate(backbone, ["a"], [2]),
        generate(backbone, ["b"], [1]),
        generate(backbone, ["a"], [1], guidance=1.0),
        generate(backbone, ["a"], [1], steps=4),
    ]
    assert all(not torch.equal(other, base) for other in others)


def test_global_seed_does_not_matter_and_is_not_touched(tiny_sd):
    backbone = opened(tiny_sd)
    torch.manual_seed(1)
    first = generate(backbone)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(generate(backbone), first)
    torch.manual_seed(1)
    generate(backbone)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_resolutions(tiny_sd):
    assert generate(opened(tiny_sd, 128), ["a"], [1], steps=1).shape == (1, 3, 128, 128)
    assert generate(opened(tiny_sd), ["a"], [1], steps=1, resolution=(64, 96)).shape == (1, 3, 64, 96)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    assert generate(pipeline, ["a"], [1], steps=1).shape == (1, 3, 64, 64)


def test_policy_and_reference_of_a_tuned_backbone(tiny_sd):
    backbone = opened(tiny_sd, dropout=0.3)
    base = generate(backbone)
    with torch.no_grad():
        for _, parameter in backbone.trainable_parameters():
            parameter.add_(0.1)
    tuned = generate(backbone)
    assert (tuned - base).abs().max() > 1e-2
    assert torch.equal(generate(backbone), tuned)  # dropout is off
    assert backbone.core.training
    with backbone.reference():
        assert torch.equal(generate(backbone), base)


def test_bf16_network_generates(tiny_sdxl):
    exact, rounded = generate(opened(tiny_sdxl)), generate(opened(tiny_sdxl, precision="bf16"))
    assert 0 < (exact - rounded).abs().max() < 0.1


def test_progress_counts_pictures(tiny_sd):
    done = []
    generate(opened(tiny_sd), steps=1, batch_size=3, progress=done.append)
    assert done == [3, 4]


def test_prompts_and_seeds_must_match(tiny_sd):
    with pytest.raises(DiffalignError, match="2 prompts and 1 seeds"):
        generate(opened(tiny_sd), ["a", "b"], [1])
    with pytest.raises(DiffalignError, match="0 prompts"):
        generate(opened(tiny_sd), [], [])
