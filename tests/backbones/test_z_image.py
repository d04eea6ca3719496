"""Z-Image on a tiny random copy: the pipeline's pictures, captions of different lengths, reversed time."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import ZImagePipeline
from flow_checks import (
    PROMPTS,
    SEEDS,
    euler,
    noisy_inputs,
    opened,
    perturb,
    pipeline_output,
    run_pipeline,
)
from pair_world import open_pairs, whole_draw

from diffalign.backbones import ZImage
from diffalign.backbones.loading import quiet
from diffalign.backbones.z_image import padded, unpadded
from diffalign.conditioning import Conditioning
from diffalign.config import load_recipe
from diffalign.errors import DiffalignError
from diffalign.export.runs import save_lora
from diffalign.plan_network import network_size
from diffalign.sampling.generate import generate_images
from diffalign.trainers.dpo import DPOConfig, DPOTrainer


def test_facts_come_from_the_model(tiny_z_image):
    backbone = opened(tiny_z_image)
    assert isinstance(backbone, ZImage)
    assert backbone.latent_shape == (16, 16, 16)  # VAE factor 4
    assert backbone.process.prediction == "flow"
    assert backbone.attention == "sdpa"
    assert opened(tiny_z_image, resolution=None).resolution == (1024, 1024)
    with pytest.raises(DiffalignError, match="resolution is 68; expected a multiple of 8"):
        opened(tiny_z_image, resolution=68)


def test_padding_is_undone():
    captions = [torch.ones(2, 3), torch.full((5, 3), 2.0)]
    cond = padded(captions)
    assert cond.embeddings.shape == (2, 512, 3)
    assert cond.mask.sum(1).tolist() == [2, 5]
    assert cond.embeddings[0, 2:].abs().max() == 0
    assert all(torch.equal(a, b) for a, b in zip(unpadded(cond), captions, strict=True))
    assert [len(row) for row in unpadded(Conditioning(cond.embeddings))] == [512, 512]


def test_text_is_the_pipelines(tiny_z_image):
    backbone = opened(tiny_z_image)
    with quiet():
        pipeline = ZImagePipeline.from_pretrained(tiny_z_image)
        captions, negative = pipeline.encode_prompt(list(PROMPTS))
    cond, uncond = backbone.encode_prompts(PROMPTS), backbone.unconditional(1)
    # One token per byte inside <|im_start|>user\n ... <|im_end|>\n<|im_start|>assistant\n.
    lengths = [len(prompt) + 1 + 5 + 2 + 1 + 10 for prompt in PROMPTS]
    assert cond.mask.sum(1).tolist() == lengths
    for row, caption in zip(unpadded(cond), captions, strict=True):
        torch.testing.assert_close(row, caption, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unpadded(uncond)[0], negative[0], rtol=1e-4, atol=1e-5)


def test_encoding_leaves_the_prompts_alone(tiny_z_image):
    """The pipeline writes its chat template into the list it is given."""
    backbone = opened(tiny_z_image)
    prompts = list(PROMPTS)
    backbone._encode_text(backbone.pipeline(), prompts)
    assert prompts == PROMPTS


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_pictures_are_the_pipelines(tiny_z_image, guidance):
    ours = generate_images(opened(tiny_z_image), PROMPTS, SEEDS, steps=3, guidance=guidance)
    theirs = pipeline_output(ZImagePipeline, tiny_z_image, 3, guidance)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours[0] - ours[1]).abs().mean() > 0.05


@pytest.mark.parametrize(("steps", "guidance"), [(1, 0.0), (3, 4.0)])
def test_euler_steps_in_the_terms_of_the_process_are_the_pipelines(tiny_z_image, steps, guidance):
    """The pipeline's scale counts from 0, `guided` from 1."""
    ours = euler(opened(tiny_z_image, few_steps=steps), 1 + guidance)
    theirs = pipeline_output(ZImagePipeline, tiny_z_image, steps, guidance, output_type="latent")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_few_step_times_are_the_samplers(tiny_z_image):
    """Shift 3 moves t to 3 t / (1 + 2 t)."""
    grid = opened(tiny_z_image, few_steps=4).process.grid
    assert grid.tolist() == pytest.approx([0.75 / 1.5, 1.5 / 2, 2.25 / 2.5, 1.0])


def test_time_is_reversed_and_the_sign_turned(tiny_z_image):
    backbone = opened(tiny_z_image)
    x, t, cond = noisy_inputs(backbone)
    times = []
    backbone.core.t_embedder.register_forward_pre_hook(lambda module, args: times.append(args[0]))
    velocity = backbone.predict(x, t, cond)
    torch.testing.assert_close(times[0], torch.tensor([800.0, 100.0]))  # The network multiplies by 1000.
    outputs = backbone.core(list(x.unsqueeze(2)), 1 - t, unpadded(cond), return_dict=False)[0]
    torch.testing.assert_close(velocity, -torch.cat(outputs, 1).transpose(0, 1), rtol=0, atol=1e-3)


def test_a_caption_does_not_depend_on_its_neighbours(tiny_z_image):
    """Rows of different lengths are padded for attention and masked."""
    backbone = opened(tiny_z_image)
    x, t, cond = noisy_inputs(backbone)
    lengths = cond.mask.sum(1)
    assert lengths[0] // 32 != lengths[1] // 32
    together = backbone.predict(x, t, cond)
    for i in range(2):
        torch.testing.assert_close(
            together[i : i + 1],
            backbone.predict(x[i : i + 1], t[i : i + 1], cond.select([i])),
            rtol=0,
            atol=1e-4,
        )
    garbage = cond.embeddings + 100 * (1 - cond.mask[..., None])
    assert torch.equal(backbone.predict(x, t, Conditioning(garbage, mask=cond.mask)), together)


def test_the_plan_knows_its_size(tiny_z_image):
    backbone = opened(tiny_z_image)
    options = [f"model.path={tiny_z_image}", "data.resolution=64", "model.lora.rank=4"]
    size, whole = (
        network_size(
            load_recipe("z_image/dpo_lora", [*options, f"model.gradient_checkpointing={on}"]), torch.float32
        )
        for on in ("true", "false")
    )
    assert size.total == sum(p.numel() for p in backbone.core.parameters())
    # 4 layers in each of 4 blocks, each 32 x 32 with rank 4.
    assert size.trained == 4 * 4 * 4 * (32 + 32)
    assert 0 < size.activations < whole.activations
    assert size.forward_flops == whole.forward_flops > 0


def test_bf16_is_close_to_fp32_and_makes_pictures(tiny_z_image):
    exact, rounded = opened(tiny_z_image), opened(tiny_z_image, precision="bf16")
    inputs = noisy_inputs(exact)
    scale = exact.predict(*inputs).abs().max()
    difference = (exact.predict(*inputs) - rounded.predict(*inputs)).abs().max() / scale
    assert 1e-5 < difference < 0.1
    assert generate_images(rounded, PROMPTS, SEEDS, steps=2, guidance=4.0).isfinite().all()


def test_lora_works_in_the_plain_pipeline(tiny_z_image, tmp_path):
    """With alpha 8 on rank 4."""
    backbone = opened(tiny_z_image)
    perturb(backbone)
    save_lora(backbone, tmp_path)
    with quiet():
        pipeline = ZImagePipeline.from_pretrained(tiny_z_image)
        pipeline.set_progress_bar_config(disable=True)
        base = run_pipeline(pipeline, 2, 4.0)
        pipeline.load_lora_weights(tmp_path)
    tuned = run_pipeline(pipeline, 2, 4.0)
    ours = generate_images(backbone, PROMPTS, SEEDS, steps=2, guidance=4.0)
    torch.testing.assert_close(ours, tuned, rtol=0, atol=1e-5)
    assert (tuned - base).abs().mean() > 1e-2


def test_dpo_learns_from_cached_pairs_with_their_masks(tiny_z_image, tmp_path):
    backbone = opened(tiny_z_image)
    trainer = DPOTrainer(DPOConfig(caption_dropout=0.4), backbone, seed=0)
    cache = open_pairs(backbone, tmp_path)
    trainer.prepare(cache)
    batch = trainer.fetch(whole_draw())
    lengths = batch.conditioning_chosen.mask.sum(1)
    empty = backbone.unconditional(1)
    assert torch.equal(cache.unconditional(1).mask, empty.mask)
    dropped = lengths == empty.mask.sum()
    assert 0 < dropped.sum() < 4
    kept = cache.fetch(whole_draw()).conditioning_chosen
    assert torch.equal(kept.mask[~dropped], batch.conditioning_chosen.mask[~dropped])
    assert torch.equal(batch.conditioning_chosen.embeddings[dropped][0], empty.embeddings[0])
    losses, metrics = trainer.loss(batch)
    assert torch.equal(metrics["margin"], torch.zeros(4))
    assert torch.equal(losses, torch.full((4,), math.log(2)))
    optimizer = torch.optim.AdamW([p for _, p in backbone.trainable_parameters()], lr=3e-3)
    for _ in range(4):
        optimizer.zero_grad()
        trainer.loss(batch)[0].mean().backward()
        optimizer.step()
    assert trainer.loss(batch)[0].mean() < math.log(2) - 0.01
