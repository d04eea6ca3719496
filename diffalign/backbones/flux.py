"""FLUX.1 dev and schnell (Black Forest Labs 2024): rectified flow on packed latents, guidance told to the network.

Latents between rooms are `[B, 16, h, w]`; the transformer sees a sequence of 2 x 2 patches. There is no
classifier-free guidance: dev was distilled to answer for a guidance scale that it is given as a number, schnell has
none. Training times are those of `trainer.time_weighting`; the shift that dev's sampler puts on its times, which grows
with the picture, is not applied to them, except through `model.few_steps`: then they are the sampler's own.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffalign.backbones.base import Backbone
from diffalign.backbones.guidance import tell_guidance
from diffalign.backbones.meta import empty
from diffalign.backbones.schedule import patch_step_options
from diffalign.conditioning import Conditioning

TRAINING_GUIDANCE = 1.0
"""What dev is told where nothing else is said. Only there does it predict the plain velocity, whose error the
likelihood-based objectives are about: at 3.5, its usual value in sampling, the error also holds the guidance that was
distilled into it, and training would unlearn that. Trainers of LoRAs use 1 too, and sample at 3.5 afterwards."""
OWN_SIDE = 128
"""Latents along one side of the pictures that the pipeline makes unasked: 1024 pixels."""


class Flux(Backbone):
    """The unconditional branch, used to drop captions, is the encoded empty prompt."""

    family = "flux"
    pipeline_class = FluxPipeline
    network_name = "transformer"
    network_class = FluxTransformer2DModel

    @classmethod
    def meta_inputs(cls, config: Any, side: int, dtype: torch.dtype) -> dict[str, Any]:
        """As `Backbone.meta_inputs`."""
        tokens = text_tokens(config)
        return {
            "hidden_states": empty((side // 2) ** 2, config.in_channels, dtype=dtype),
            "timestep": empty(),
            "guidance": empty() if config.guidance_embeds else None,
            "pooled_projections": empty(config.pooled_projection_dim, dtype=dtype),
            "encoder_hidden_states": empty(tokens, config.joint_attention_dim, dtype=dtype),
            "txt_ids": torch.empty(tokens, 3, device="meta"),
            "img_ids": torch.empty((side // 2) ** 2, 3, device="meta"),
        }

    @property
    def text_tokens(self) -> int:
        """Tokens of T5, padding included."""
        return text_tokens(self.core.config)

    @property
    def call_options(self) -> dict[str, Any]:
        """The pipeline's own default is 512 for schnell, too."""
        return {"max_sequence_length": self.text_tokens}

    def guided(
        self, x_t: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning, scale: float | Tensor
    ) -> Tensor:
        """The prediction at a guidance scale as the pipeline's `guidance_scale` means it, in one ordinary forward.

        Dev is told the scale; schnell knows none and ignores it. `uncond` is not used.
        """
        return self.predict(x_t, t, tell_guidance(cond, scale))

    @property
    def _is_told_guidance(self) -> bool:
        config: Any = self.core.config
        return bool(config.guidance_embeds)

    def _latent_facts(self) -> tuple[int, float, int]:
        config: Any = self.core.config
        return config.in_channels // 4, OWN_SIDE, 2

    def _step_options(self, config: dict[str, Any], steps: int) -> dict[str, Any]:
        return patch_step_options(config, steps, self.latent_shape)

    def _encode_text(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeddings, pooled, _ = pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.text_tokens
        )
        return Conditioning(embeddings, pooled)

    def _encode_unconditional(self, pipeline: Any) -> Conditioning:
        return self._encode_text(pipeline, [""])

    def _call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        rows, columns = x_t.shape[2] // 2, x_t.shape[3] // 2
        output = network(
            hidden_states=pack(x_t),
            timestep=time / self.process.time_scale,
            guidance=self._guidance(cond),
            pooled_projections=cond.pooled,
            encoder_hidden_states=cond.embeddings,
            txt_ids=torch.zeros(cond.embeddings.shape[1], 3, device=x_t.device),
            img_ids=positions(rows, columns, x_t.device),
            return_dict=False,
        )[0]
        return unpack(output, rows, columns)

    def _guidance(self, cond: Conditioning) -> Tensor | None:
        """The scale `[B]` that dev is told: of the conditioning, else of the configuration; None for schnell."""
        if not self._is_told_guidance:
            return None
        if cond.guidance is not None:
            return cond.guidance
        scale = self.config.guidance_embedding
        return tell_guidance(cond, TRAINING_GUIDANCE if scale is None else scale).guidance


def text_tokens(config: Any) -> int:
    """Tokens of T5 that a network of this configuration was trained with: 256 for schnell, 512 for dev."""
    return 512 if config.guidance_embeds else 256


def pack(latents: Tensor) -> Tensor:
    """Latents `[B, C, 2 H, 2 W]` as a sequence `[B, H W, 4 C]` of 2 x 2 patches, row by row."""
    return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `pack`: `[B, rows * columns, 4 C]` to `[B, C, 2 rows, 2 columns]`."""
    return pixel_shuffle(patches.transpose(1, 2).unflatten(2, (rows, columns)), 2)


def positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Where each patch lies `[rows * columns, 3]`: 0, row, column. Text lies at 0, 0, 0."""
    axes = (
        torch.arange(1, device=device),
        torch.arange(rows, device=device),
        torch.arange(columns, device=device),
    )
    return torch.cartesian_prod(*axes).float()
