"""Tiny random flow-matching pipelines in the real diffusers classes, saved as normal folders; nothing is downloaded.

`tiny_sd3`: VAE factor 4 with a shift, latents 4 channels in patches of 2, text states 48 wide (CLIP 16 + 24, padded),
pooled 16 + 12, 16 CLIP tokens, 256 T5 tokens; the first block has dual attention as in SD3.5.
`tiny_flux`, `tiny_flux_schnell`: VAE as above with 16 channels, T5 states 24 wide, pooled 16.
`tiny_z_image`: the same VAE, Qwen3 states 24 wide, one token per byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny import _text_config, _tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


def build_tiny_sd3(folder: Path, third_encoder: bool = True) -> Path:
    """Save a random StableDiffusion3Pipeline (about 150k parameters, 64x64 pictures), return its folder."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    pipeline = StableDiffusion3Pipeline(
        transformer=_sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_vae(latent_channels=4),
        text_encoder=CLIPTextModelWithProjection(_text_config(tokenizer, width=16)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, width=24, projection=12)),
        tokenizer_2=_tokenizer(pad="!"),
        text_encoder_3=tiny_t5(width=48) if third_encoder else None,
        tokenizer_3=t5_tokenizer() if third_encoder else None,
    )
    pipeline.save_pretrained(folder)
    return folder


def flow_vae(latent_channels: int) -> AutoencoderKL:
    """A VAE of factor 4 with shift and scale, and without the quantisation convolutions."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_t5(width: int) -> T5EncoderModel:
    """A T5 encoder for `t5_tokenizer`."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def t5_tokenizer(max_length: int = 512) -> Any:
    """A T5 tokenizer without merges: one token per character."""
    letters = [(letter, -5.0) for letter in sorted(ByteLevel.alphabet())]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=max_length)


def _sd3_transformer() -> SD3Transformer2DModel:
    network = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 12,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return _lively(network)


def _lively(network: torch.nn.Module) -> Any:
    """Larger weights, so that text, time and adapters show in the pictures of a random network."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return network


def build_tiny_flux(folder: Path, schnell: bool = False) -> Path:
    """Save a random FluxPipeline (about 100k parameters, 64x64 pictures) and return its folder.

    `schnell`: no guidance embedding, no shift of times; otherwise as dev.
    """
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    shifts = {"shift": 1.0} if schnell else {"shift": 3.0, "use_dynamic_shifting": True}
    pipeline = FluxPipeline(
        transformer=_flux_transformer(guidance_embeds=not schnell),
        scheduler=FlowMatchEulerDiscreteScheduler(**shifts),
        vae=flow_vae(latent_channels=16),
        text_encoder=CLIPTextModel(_text_config(tokenizer, width=16)),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(width=24),
        tokenizer_2=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def build_tiny_z_image(folder: Path) -> Path:
    """Save a random ZImagePipeline (about 360k parameters, 64x64 pictures) and return its folder."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    pipeline = ZImagePipeline(
        transformer=_z_image_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_vae(latent_channels=16),
        text_encoder=tiny_qwen(len(tokenizer), width=24),
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_qwen(tokens: int, width: int) -> Qwen3Model:
    """A Qwen3 language model without its head."""
    config = Qwen3Config(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        max_position_embeddings=512,
    )
    return Qwen3Model(config)


def qwen_tokenizer() -> Any:
    """A Qwen tokenizer without merges, one token per byte, with a chat template in Qwen's form."""
    names = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={name: index for index, name in enumerate(names)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _flux_transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    network = FluxTransformer2DModel(
        in_channels=4 * 16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return _lively(network)


def _z_image_transformer() -> ZImageTransformer2DModel:
    network = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[640, 64, 64],
    )
    return _lively(network)
