"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): a multimodal transformer, rectified flow."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.backbones.meta import CLIP_TOKENS, empty
from diffalign.conditioning import Conditioning
from diffalign.errors import DiffalignError

T5_TOKENS = 256
"""Text states of T5 that the pipeline takes unasked."""
LENGTH_KEY = "_max_sequence_length"
"""Entry of a model_index.json that names another number, for a model that was trained with it (`scenes:tiny-sd3`)."""


class StableDiffusion3(Backbone):
    """Text states `[B, 77 + 256, 4096]`: those of two CLIPs padded with zeros, then those of T5, or zeros without T5.

    The unconditional branch is the encoded empty prompt.
    """

    family = "sd3"
    pipeline_class = StableDiffusion3Pipeline
    left_out = ("text_encoder_3", "tokenizer_3")
    network_name = "transformer"
    network_class = SD3Transformer2DModel

    @classmethod
    def meta_inputs(cls, config: Any, side: int, dtype: torch.dtype) -> dict[str, Any]:
        """As `Backbone.meta_inputs`."""
        return {
            "hidden_states": empty(config.in_channels, side, side, dtype=dtype),
            "timestep": empty(),
            "encoder_hidden_states": empty(CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim, dtype=dtype),
            "pooled_projections": empty(config.pooled_projection_dim, dtype=dtype),
        }

    @property
    def call_options(self) -> dict[str, Any]:
        """The number of T5 states, which decides how much attention each of the others gets."""
        return {"max_sequence_length": int(self.source.index.get(LENGTH_KEY, T5_TOKENS))}

    def _encode_text(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False, **self.call_options
        )
        return Conditioning(embeddings, pooled)

    def _encode_unconditional(self, pipeline: Any) -> Conditioning:
        return self._encode_text(pipeline, [""])

    def _latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        """As for every family, within the positions that the network knows."""
        shape = super()._latent_shape(resolution)
        config: Any = self.core.config
        largest = config.pos_embed_max_size * config.patch_size
        if shape[1] > largest:
            raise DiffalignError(
                f"resolution is {resolution}; expected at most {largest * self.factor} for {self.source.name}, "
                "whose network knows no positions beyond it."
            )
        return shape

    def _latent_facts(self) -> tuple[int, float, int]:
        config: Any = self.core.config
        return config.in_channels, config.sample_size, config.patch_size

    def _call(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        output: Tensor = network(
            hidden_states=x_t,
            timestep=time,
            encoder_hidden_states=cond.embeddings,
            pooled_projections=cond.pooled,
            return_dict=False,
        )[0]
        return output
