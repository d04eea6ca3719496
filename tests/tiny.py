"""Tiny random pipelines in the real diffusers classes, saved as normal folders; nothing is downloaded.

`tiny_sdxl`: VAE factor 4, latents 4 channels, embeddings 16 + 24, pooled 12, 16 tokens.
`tiny_sd`: VAE factor 8, embeddings 16, 16 tokens; also as a v-prediction model (SD 2.1 style).
Few-step models are the same with other schedulers, and with an input for the guidance scale where they have one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 16
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FEW_STEPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lcm": (LCMScheduler, {}),
    "lcm-25": (LCMScheduler, {"original_inference_steps": 25}),
    "sd-turbo": (EulerDiscreteScheduler, {"timestep_spacing": "trailing", "steps_offset": 1}),
    "sdxl-turbo": (EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing", "steps_offset": 1}),
}
"""Schedulers of few-step models as they are published."""


def build_few_step(folder: Path, sampler: str, guidance_width: int | None, sdxl: bool) -> Path:
    """Save a random few-step pipeline of the SD or SDXL type with a scheduler of `FEW_STEPS`, return its folder.

    Args:
        guidance_width: of the embedded guidance scale that the network is told; None: it is told none.
    """
    build = build_tiny_sdxl if sdxl else build_tiny_sd
    cls = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    quiet = {} if sdxl else {"safety_checker": None, "requires_safety_checker": False}
    parts = cls.from_pretrained(build(folder), **quiet).components
    scheduler_class, options = FEW_STEPS[sampler]
    parts["scheduler"] = scheduler_class(**NOISE, **options)
    if guidance_width is not None:
        torch.manual_seed(0)
        config = {**parts["unet"].config, "time_cond_proj_dim": guidance_width}
        parts["unet"] = UNet2DConditionModel.from_config(config)
        if not sdxl:
            cls = LatentConsistencyModelPipeline
    cls(**parts, **({"requires_safety_checker": False} if not sdxl else {})).save_pretrained(folder)
    return folder


def build_tiny_sdxl(folder: Path) -> Path:
    """Save a random StableDiffusionXLPipeline (160k parameters, 64x64 pictures), return its folder."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    pipeline = StableDiffusionXLPipeline(
        vae=_vae((8, 8, 8), scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_text_config(tokenizer, width=16)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, width=24, projection=12)),
        tokenizer=tokenizer,
        tokenizer_2=_tokenizer(pad="!"),
        unet=_sdxl_unet(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def build_tiny_sd(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Save a random StableDiffusionPipeline (about 90k parameters, 64x64 pictures) and return its folder."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=_vae((8, 8, 8, 8), scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_text_config(tokenizer, width=16)),
        tokenizer=tokenizer,
        unet=_sd_unet(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def _sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
        norm_num_groups=4,
    )


def _sd_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    )


def _vae(channels: tuple[int, ...], scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def _tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token per byte, 514 tokens in all."""
    letters = sorted(ByteLevel.alphabet())
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: index for index, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=TOKENS)


def _text_config(tokenizer: Any, width: int, projection: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
