"""What the tests of flow families share: opening tiny models, sampling by hand, sampling by the plain pipeline."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.backbones import Backbone, open_backbone
from diffalign.backbones.loading import quiet
from diffalign.conditioning import Conditioning
from diffalign.config import LoRAConfig, ModelConfig

PROMPTS = ["a red circle", "two big blue squares and a yellow star left of them"]
SEEDS = [3, 4]


def opened(folder: Path, **options: Any) -> Backbone:
    """A backbone at 64 pixels in float32 with a LoRA of rank 4 and alpha 8, if not said otherwise."""
    keys = ("resolution", "frozen_copy", "seed")
    opening = {"resolution": 64, **{key: options.pop(key) for key in keys if key in options}}
    facts = {"precision": "fp32", "lora": LoRAConfig(rank=4, alpha=8), **options}
    return open_backbone(ModelConfig(path=str(folder), **facts), device="cpu", **opening)


@torch.no_grad()
def perturb(backbone: Backbone, std: float = 0.1) -> None:
    """Stands for some training: noise on every trained weight."""
    torch.manual_seed(1)
    for _, parameter in backbone.trainable_parameters():
        parameter.add_(torch.randn_like(parameter), alpha=std)


def noisy_inputs(backbone: Backbone) -> tuple[Tensor, Tensor, Conditioning]:
    """Noise, times and text for two rows."""
    torch.manual_seed(0)
    return torch.randn(2, *backbone.latent_shape), torch.tensor([0.2, 0.9]), backbone.encode_prompts(PROMPTS)


def pipeline_output(pipeline_class: Any, folder: Path, steps: int, guidance: float, **options: Any) -> Tensor:
    """Pictures `[2, 3, 64, 64]` or latents of a pipeline that knows nothing of this package."""
    with quiet():
        pipeline = pipeline_class.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        return run_pipeline(pipeline, steps, guidance, **options)


def run_pipeline(pipeline: Any, steps: int, guidance: float, **options: Any) -> Tensor:
    """The same of a pipeline at hand."""
    arguments = {"height": 64, "width": 64, "output_type": "pt", **options}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with quiet():
        return pipeline(
            prompt=list(PROMPTS),
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=guidance,
            **arguments,
        ).images


def starting_noise(backbone: Backbone) -> Tensor:
    """What a pipeline draws from one generator per picture."""
    return torch.stack(
        [torch.randn(backbone.latent_shape, generator=torch.Generator().manual_seed(s)) for s in SEEDS]
    )


@torch.no_grad()
def euler(backbone: Backbone, scale: float) -> Tensor:
    """Latents `[2, C, h, w]` by Euler steps down the backbone's own grid of times, then to 0."""
    x = starting_noise(backbone)
    cond, uncond = backbone.encode_prompts(PROMPTS), backbone.unconditional(2)
    assert backbone.process.grid is not None
    for t, following in pairwise([*backbone.process.grid.flip(0).tolist(), 0.0]):
        velocity = backbone.guided(x, torch.full((2,), t), cond, uncond, scale)
        x = x + (following - t) * velocity
    return x


def gradients(backbone: Backbone) -> dict[str, Tensor]:
    """Gradient of the summed output by trained weight."""
    backbone.predict(*noisy_inputs(backbone)).square().sum().backward()
    return {name: p.grad for name, p in backbone.trainable_parameters() if p.grad is not None}
