"""Z-Image and Z-Image-Turbo (Tongyi-MAI 2025, arXiv 2511.22699): a single-stream flow transformer, 6 B parameters.

Chosen among the efficient models of 2025-26: undistilled weights for tuning (Z-Image) and few-step ones (Turbo), both
Apache 2.0, fit one 24 GB GPU; its VAE is the plain 16-channel `AutoencoderKL` of FLUX.1, and there is one text encoder.
FLUX.2-klein, the other small one, has its own VAE class whose latents are patched and normalised by stored batch
statistics, so encoding and decoding would need code of their own.

The transformer counts time backwards (1 is the picture), predicts x0 - eps, and takes lists: captions of different
lengths, latents with a frame axis. All of it is turned around in `_call`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import pad

from diffalign.backbones.base import Backbone
from diffalign.backbones.meta import empty
from diffalign.backbones.schedule import patch_step_options
from diffalign.conditioning import Conditioning

TEXT_TOKENS = 512
"""The pipeline's own limit. Captions are padded to it, so that all of a cache have one shape."""
OWN_SIDE = 1024
"""Pixels along one side of the pictures that the pipeline makes unasked."""


class ZImage(Backbone):
    """The unconditional branch is the encoded empty prompt, inside the chat template like any other.

    The pipeline adds `guidance_scale` times the difference of the branches to the conditional one: its scale g, which
    pictures are made with, is `guided(..., scale=1 + g)`; 0 turns it off, as Turbo needs.
    """

    family = "z_image"
    pipeline_class = ZImagePipeline
    network_name = "transformer"
    network_class = ZImageTransformer2DModel

    @classmethod
    def meta_inputs(cls, config: Any, side: int, dtype: torch.dtype) -> dict[str, Any]:
        """As `Backbone.meta_inputs`; captions of 128 tokens, longer than most."""
        return {
            "x": list(empty(config.in_channels, 1, side, side, dtype=dtype).unbind()),
            "t": empty(),
            "cap_feats": list(empty(128, config.cap_feat_dim, dtype=dtype).unbind()),
        }

    def _latent_facts(self) -> tuple[int, float, int]:
        config: Any = self.core.config
        return config.in_channels, OWN_SIDE / self.factor, 2

    def _step_options(self, config: dict[str, Any], steps: int) -> dict[str, Any]:
        return patch_step_options(config, steps, self.latent_shape)

    def _encode_text(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        # A list of its own, since the pipeline writes the templated prompts into the one it is given.
        captions, _ = pipeline.encode_prompt(
            list(prompts), self.device, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
        )
        return padded(captions)

    def _encode_unconditional(self, pipeline: Any) -> Conditioning:
        return self._encode_text(pipeline, [""])

    def _call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        scale = self.process.time_scale
        latents = list(x_t.unsqueeze(2).unbind())
        outputs = network(latents, (scale - time) / scale, unpadded(cond), return_dict=False)[0]
        return -torch.stack(outputs).squeeze(2)


def padded(captions: list[Tensor]) -> Conditioning:
    """Captions `[L_i, D]` as embeddings `[B, 512, D]`, zeros after them, with a mask `[B, 512]` of ones and zeros."""
    embeddings = torch.stack([pad(caption, (0, 0, 0, TEXT_TOKENS - len(caption))) for caption in captions])
    lengths = torch.tensor([len(caption) for caption in captions], device=embeddings.device)
    mask = torch.arange(TEXT_TOKENS, device=embeddings.device) < lengths[:, None]
    return Conditioning(embeddings, mask=mask.float())


def unpadded(cond: Conditioning) -> list[Tensor]:
    """Inverse of `padded`: each row's embeddings `[L_i, D]`; without a mask all of them."""
    if cond.mask is None:
        return list(cond.embeddings.unbind())
    lengths = cond.mask.sum(1).long().tolist()
    return [row[:length] for row, length in zip(cond.embeddings, lengths, strict=True)]
