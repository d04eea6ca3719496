"""FLUX.1 dev and schnell on tiny random copies: the pipeline's pictures, text, times and guidance."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from diffusers import FluxPipeline
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

from diffalign.backbones import Flux, model_fingerprint
from diffalign.backbones.flux import pack, positions, unpack
from diffalign.backbones.loading import quiet
from diffalign.config import ModelConfig, load_recipe
from diffalign.errors import DiffalignError
from diffalign.export.runs import save_lora
from diffalign.plan_network import network_size
from diffalign.reference import FixedDraws, reference_key
from diffalign.sampling.generate import generate_images
from diffalign.trainers.dpo import DPOConfig, DPOTrainer


@pytest.fixture(params=["dev", "schnell"])
def model(request, tiny_flux, tiny_flux_schnell):
    """Folder of either model."""
    return tiny_flux if request.param == "dev" else tiny_flux_schnell


def test_facts_come_from_the_model(tiny_flux):
    backbone = opened(tiny_flux)
    assert isinstance(backbone, Flux)
    assert backbone.latent_shape == (16, 16, 16)  # 64 channels of 2 x 2 patches; VAE factor 4
    assert backbone.process.prediction == "flow"
    assert backbone.attention == "sdpa"
    assert opened(tiny_flux, resolution=None).latent_shape == (16, 128, 128)
    with pytest.raises(DiffalignError, match="resolution is 68; expected a multiple of 8"):
        opened(tiny_flux, resolution=68)


def test_packing_and_positions_are_the_pipelines():
    latents = torch.randn(2, 3, 4, 6)
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(unpack(packed, 2, 3), latents)
    # One channel, one row of two patches: rows of a patch follow each other.
    numbers = torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7]]).reshape(1, 1, 2, 4)
    assert pack(numbers).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    expected = FluxPipeline._prepare_latent_image_ids(1, 2, 3, "cpu", torch.float32)
    assert torch.equal(positions(2, 3, torch.device("cpu")), expected)


def test_text_is_the_pipelines(model):
    backbone = opened(model)
    tokens = 512 if model.name == "tiny-flux" else 256
    with quiet():
        embeddings, pooled, _ = FluxPipeline.from_pretrained(model).encode_prompt(
            [*PROMPTS, ""], max_sequence_length=tokens
        )
    cond, empty = backbone.encode_prompts(PROMPTS), backbone.unconditional(1)
    assert cond.embeddings.shape == (2, tokens, 24)
    assert cond.pooled.shape == (2, 16)
    torch.testing.assert_close(torch.cat([cond.embeddings, empty.embeddings]), embeddings, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat([cond.pooled, empty.pooled]), pooled)


def test_pictures_are_the_pipelines(model):
    backbone = opened(model)
    tokens = {"max_sequence_length": backbone.text_tokens}
    ours = generate_images(backbone, PROMPTS, SEEDS, steps=3, guidance=3.5)
    theirs = pipeline_output(FluxPipeline, model, 3, 3.5, **tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours[0] - ours[1]).abs().mean() > 0.05
    other = generate_images(backbone, PROMPTS, SEEDS, steps=3, guidance=1.0)
    told = model.name == "tiny-flux"
    assert torch.equal(ours, other) is not told


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_euler_steps_in_the_terms_of_the_process_are_the_pipelines(model, steps):
    backbone = opened(model, few_steps=steps)
    tokens = {"max_sequence_length": backbone.text_tokens}
    theirs = pipeline_output(FluxPipeline, model, steps, 3.5, output_type="latent", **tokens)
    torch.testing.assert_close(euler(backbone, 3.5), unpack(theirs, 8, 8), rtol=0, atol=1e-4)


def test_few_step_times_are_the_samplers(tiny_flux, tiny_flux_schnell):
    assert opened(tiny_flux_schnell, few_steps=4).process.grid.tolist() == [0.25, 0.5, 0.75, 1.0]
    # 64 patches: mu = 0.5 + 0.65 (64 - 256) / 3840 = 0.4675; 1/2 is moved to e^mu / (e^mu + 1).
    shift = math.exp(0.4675)
    assert opened(tiny_flux, few_steps=2).process.grid.tolist() == pytest.approx([shift / (shift + 1), 1.0])
    # 256 patches: mu = 0.5.
    shift = math.exp(0.5)
    larger = opened(tiny_flux, few_steps=2, resolution=128)
    assert larger.process.grid.tolist() == pytest.approx([shift / (shift + 1), 1.0])
    assert opened(tiny_flux).process.grid is None


def test_dev_is_told_the_guidance_and_schnell_is_not(tiny_flux, tiny_flux_schnell):
    dev = opened(tiny_flux)
    inputs = noisy_inputs(dev)
    seen = []
    dev.core.time_text_embed.register_forward_pre_hook(lambda module, args: seen.append(args))
    unsaid = dev.predict(*inputs)
    assert seen[0][1].tolist() == [1000, 1000]  # The network multiplies by 1000.
    torch.testing.assert_close(seen[0][0], torch.tensor([200.0, 900.0]))
    uncond = dev.unconditional(2)
    assert torch.equal(dev.guided(*inputs, uncond, 1.0), unsaid)
    assert not torch.equal(dev.guided(*inputs, uncond, 3.5), unsaid)
    dev.guided(*inputs, uncond, torch.tensor([2.0, 3.0]))
    assert seen[-1][1].tolist() == [2000, 3000]
    set_to = opened(tiny_flux, guidance_embedding=3.5)
    assert torch.equal(set_to.predict(*inputs), dev.guided(*inputs, uncond, 3.5))
    schnell = opened(tiny_flux_schnell)
    inputs = noisy_inputs(schnell)
    assert torch.equal(schnell.guided(*inputs, uncond, 3.5), schnell.predict(*inputs))


def test_dev_and_schnell_with_the_same_encoders_have_caches_of_their_own(tiny_flux, tmp_path):
    """Their embeddings differ in length."""
    folder = shutil.copytree(tiny_flux, tmp_path / "schnell")
    config = ModelConfig(path=str(folder))
    before = model_fingerprint(config)
    assert before == model_fingerprint(ModelConfig(path=str(tiny_flux)))
    facts = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**facts, "guidance_embeds": False}))
    assert model_fingerprint(config) != before


def test_stored_reference_errors_depend_on_what_dev_is_told(tiny_flux, tmp_path):
    keys = []
    for scale in (None, 3.5):
        backbone = opened(tiny_flux, guidance_embedding=scale)
        keys.append(reference_key(backbone, FixedDraws(open_pairs(backbone, tmp_path), 0, 1)))
    assert keys[0] != keys[1]


def test_the_plan_knows_its_size(tiny_flux):
    backbone = opened(tiny_flux)
    options = [f"model.path={tiny_flux}", "data.resolution=64", "model.lora.rank=4"]
    size, whole = (
        network_size(
            load_recipe("flux/dpo_lora", [*options, f"model.gradient_checkpointing={on}"]), torch.float32
        )
        for on in ("true", "false")
    )
    assert size.total == sum(p.numel() for p in backbone.core.parameters())
    # 8 layers of the double block and 3 of the single one, each 32 x 32 with rank 4.
    assert size.trained == (8 + 3) * 4 * (32 + 32)
    assert 0 < size.activations < whole.activations
    assert size.forward_flops == whole.forward_flops > 0


def test_bf16_is_close_to_fp32_and_makes_pictures(tiny_flux):
    exact, rounded = opened(tiny_flux), opened(tiny_flux, precision="bf16")
    inputs = noisy_inputs(exact)
    scale = exact.predict(*inputs).abs().max()
    difference = (exact.predict(*inputs) - rounded.predict(*inputs)).abs().max() / scale
    assert 1e-5 < difference < 0.1
    assert generate_images(rounded, PROMPTS, SEEDS, steps=2, guidance=3.5).isfinite().all()


def test_lora_of_dev_works_in_the_plain_pipeline(tiny_flux, tmp_path):
    """With alpha 8 on rank 4."""
    backbone = opened(tiny_flux)
    perturb(backbone)
    save_lora(backbone, tmp_path)
    with quiet():
        pipeline = FluxPipeline.from_pretrained(tiny_flux)
        pipeline.set_progress_bar_config(disable=True)
        base = run_pipeline(pipeline, 2, 3.5)
        pipeline.load_lora_weights(tmp_path)
    tuned = run_pipeline(pipeline, 2, 3.5)
    ours = generate_images(backbone, PROMPTS, SEEDS, steps=2, guidance=3.5)
    torch.testing.assert_close(ours, tuned, rtol=0, atol=1e-5)
    assert (tuned - base).abs().mean() > 1e-2


def test_dpo_learns_from_cached_pairs(model, tmp_path):
    backbone = opened(model)
    trainer = DPOTrainer(DPOConfig(caption_dropout=0.3), backbone, seed=0)
    trainer.prepare(open_pairs(backbone, tmp_path))
    batch = trainer.fetch(whole_draw())
    assert batch.conditioning_chosen.pooled is not None
    assert batch.conditioning_chosen.embeddings.shape[1] == backbone.text_tokens
    losses, metrics = trainer.loss(batch)
    assert torch.equal(metrics["margin"], torch.zeros(4))
    assert torch.equal(losses, torch.full((4,), math.log(2)))
    optimizer = torch.optim.AdamW([p for _, p in backbone.trainable_parameters()], lr=3e-3)
    for _ in range(4):
        optimizer.zero_grad()
        trainer.loss(batch)[0].mean().backward()
        optimizer.step()
    assert trainer.loss(batch)[0].mean() < math.log(2) - 0.01
