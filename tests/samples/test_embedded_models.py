"""The few-step and flow models of the embedded world: how they are made, and that what ships works."""

from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusion3Pipeline, StableDiffusionXLPipeline

from diffalign.backbones import open_backbone
from diffalign.backbones.guidance import guidance_embedding
from diffalign.config import ModelConfig
from diffalign.evaluation.prompts import read_prompts, with_seeds
from diffalign.process import Process
from diffalign.rewards.scenes_judge import ScenesJudge
from diffalign.samples import FOLDER, architectures, consistency, flow, training
from diffalign.sampling.generate import generate_images


def test_the_consistency_function_is_the_samplers_and_starts_at_the_identity():
    scheduler = consistency.lcm_scheduler()
    scheduler.set_timesteps(1)
    process = Process.from_scheduler(dict(scheduler.config))
    x, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    expected = scheduler.step(eps, scheduler.timesteps[0], x).denoised
    torch.testing.assert_close(consistency.consistency(process, eps, x, torch.tensor([999, 999])), expected)
    skip, out = consistency.boundary_scalings(torch.tensor([0, 39]))
    # At t = 39: 0.25 / (390^2 + 0.25), and nearly 1.
    assert skip.tolist() == pytest.approx([1.0, 1.6436e-6], rel=1e-3)
    assert out.tolist() == pytest.approx([0.0, 1.0], abs=1e-5)


def test_the_student_is_told_guidance_as_the_pipeline_tells_it():
    scale = torch.tensor([2.0, 4.0, 6.0])
    pipeline = StableDiffusionXLPipeline.get_guidance_scale_embedding
    expected = pipeline(None, scale - 1, embedding_dim=architectures.TIME_WIDTH)
    torch.testing.assert_close(
        guidance_embedding(scale, architectures.TIME_WIDTH), expected, atol=2e-4, rtol=0
    )


def test_the_student_starts_as_the_teacher_whatever_it_is_told():
    teacher = architectures.tiny_unet()
    student = consistency.student_of(teacher)
    x, t, states = torch.randn(2, 4, 16, 16), torch.tensor([39, 999]), torch.randn(2, 16, 128)
    added = {"text_embeds": torch.randn(2, 64), "time_ids": torch.full((2, 6), 64.0)}
    with torch.no_grad():
        plain = teacher(x, t, states, added_cond_kwargs=added).sample
        told = guidance_embedding(torch.tensor([2.0, 6.0]), architectures.TIME_WIDTH)
        same = student(x, t, states, added_cond_kwargs=added, timestep_cond=told).sample
    torch.testing.assert_close(same, plain)


def test_one_step_of_distillation_moves_student_and_target():
    torch.manual_seed(0)
    run = consistency.Distillation(architectures.tiny_unet(), "cpu")
    before = [p.clone() for p in run.target.parameters()]
    loss = run.loss(torch.randn(4, 4, 16, 16), torch.randn(4, 16, 128), torch.randn(4, 64))
    loss.backward()
    assert 0 < loss.item() < 10
    assert all(p.grad is None for p in [*run.teacher.parameters(), *run.target.parameters()])
    with torch.no_grad():
        for parameter in run.student.parameters():
            parameter.add_(1.0)
    run.follow()
    moved = [(a - b).mean().item() for a, b in zip(run.target.parameters(), before, strict=True)]
    assert moved == pytest.approx([0.05] * len(moved), rel=1e-3)


def test_tiny_lcm_is_trained_where_it_is_sampled():
    backbone = open_backbone(ModelConfig(path="scenes:tiny-lcm"), device="cpu")
    grid = set(backbone.process.grid.tolist())
    assert len(grid) == consistency.GRID
    for steps in (1, 2, 4, 8):
        scheduler = LCMScheduler.from_pretrained(FOLDER / "tiny-lcm" / "scheduler")
        scheduler.set_timesteps(steps)
        assert set(scheduler.timesteps.tolist()) <= grid


def test_tiny_sd3_is_told_captions_as_its_pipeline_tells_them():
    options = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(FOLDER / "tiny-sd3", **options)
    captions = ["a red circle", "two black stars"]
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    width = pipeline.transformer.config.joint_attention_dim
    tokens = training.tokenized(pipeline.tokenizer, captions)
    with torch.no_grad():
        states, pooled = flow.text_conditioning(encoders, tokens, width)
        length = architectures.MAX_TOKENS
        expected, _, expected_pooled, _ = pipeline.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(pooled, expected_pooled)
    cond = open_backbone(ModelConfig(path="scenes:tiny-sd3"), device="cpu").encode_prompts(captions)
    torch.testing.assert_close(cond.embeddings, expected)


@pytest.mark.parametrize(
    ("model", "steps", "least"),
    [("scenes:tiny-lcm", 4, 0.7), ("scenes:tiny-lcm", 1, 0.4), ("scenes:tiny-sd3", 16, 0.6)],
)
def test_the_shipped_models_draw_single_objects(model, steps, least):
    backbone = open_backbone(ModelConfig(path=model), device="cpu", resolution=64)
    rows = [row for row in read_prompts("scenes:held-out") if row.category == "single_object"]
    rows = with_seeds(rows, 0)
    prompts = [row.text for row in rows]
    images = generate_images(backbone, prompts, [row.seed for row in rows], steps=steps, guidance=4.0)
    assert ScenesJudge().score(images, prompts).mean.mean() >= least
