"""Steps of MaPO, Diffusion-KTO and of losses on denoising steps as their releases take them, to measure ours against.

What each release does and wastes: mapo-t2i/mapo, jacklishufan/diffusion-kto, RockeyCoss/SPO and yk7333/d3po. Pictures
and captions go through the loop as in `reference_style.py`; stored denoising steps come with their embeddings.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import Tensor

from benchmarks.reference_style import ReferenceStyleStep
from diffalign.backbones import Backbone
from diffalign.conditioning import Conditioning
from diffalign.config import RunConfig
from diffalign.data.records import PreferenceRecord
from diffalign.data.step_pairs import StepBatch
from diffalign.sampling.transition import Kernel, transition

SNR, STEPS = 0.5, 1000


class ReferenceStyleMaPO(ReferenceStyleStep):
    """No reference, but VAE and both text encoders at each step."""

    def loss(self, batch: list[PreferenceRecord]) -> Tensor:
        """Mean loss of a batch of pairs, as released."""
        chosen, rejected = self.errors(*self.noised(batch)).chunk(2)
        better, worse = (SNR * error / (torch.exp(SNR * error) - 1) for error in (chosen, rejected))
        preferred = F.logsigmoid(STEPS * (better - worse))
        return chosen.mean() - self.config.trainer["beta"] * preferred.mean()


class ReferenceStyleKTO(ReferenceStyleStep):
    """Full fine-tuning whose reference is a copy of all weights, put into the network and taken out at each step."""

    def trainable(self, config: RunConfig) -> Any:
        """All weights of the network, and the copy."""
        unet = self.pipeline.unet.requires_grad_(True).train()
        self.initial = EMAModel(unet.parameters())
        return unet

    def loss(self, batch: list[PreferenceRecord]) -> Tensor:
        """Mean loss of the pictures of a batch, chosen ones desirable, rejected ones not."""
        inputs, noise = self.noised(batch, shared=False)
        self.initial.store(self.unet.parameters())
        self.initial.copy_to(self.unet.parameters())
        with torch.no_grad():
            reference = self.errors(inputs, noise)
        self.initial.restore(self.unet.parameters())
        gain = reference - self.errors(inputs, noise)
        sign = torch.ones_like(gain)
        sign[len(batch) :] = -1
        baseline = gain.mean().clamp(min=0).detach()
        return (1 - torch.sigmoid(sign * self.config.trainer["beta"] * (gain - baseline))).mean()


class ReferenceStyleSteps:
    """The loss of a pair of next states: policy and a second network on each of the two, though their state is one."""

    def __init__(self, backbone: Backbone, beta: float, clip: float) -> None:
        self.unet, self.reference = backbone.core, copy.deepcopy(backbone.core).requires_grad_(False)
        self.process, self.beta, self.clip = backbone.process, beta, clip

    def loss(self, batch: StepBatch) -> Tensor:
        """Mean loss of a batch."""
        chosen, rejected = (self._ratio(batch, x) for x in (batch.chosen, batch.rejected))
        margin = self.beta * torch.log(chosen) - self.beta * torch.log(rejected)
        return -torch.log(torch.sigmoid(margin)).mean()

    def _ratio(self, batch: StepBatch, following: Tensor) -> Tensor:
        """Clamped ratio `[B]` of the two densities of a next state."""
        policy, reference = (self._log_density(net, batch, following) for net in (self.unet, self.reference))
        return torch.exp(policy - reference).clamp(1 - self.clip, 1 + self.clip)

    def _log_density(self, net: Any, batch: StepBatch, following: Tensor) -> Tensor:
        """Log-density `[B]` of a next state under the guided step, a mean over elements."""
        told, x_t = batch.told, batch.x_t
        assert told.unconditional is not None
        uncond = replace(told.unconditional, time_ids=told.conditioning.time_ids)
        both = Conditioning.concat([uncond, told.conditioning])
        added = {"text_embeds": both.pooled, "time_ids": both.time_ids}
        inputs = (torch.cat([x_t, x_t]), torch.cat([batch.t, batch.t]), both.embeddings)
        off, on = net(*inputs, added_cond_kwargs=added).sample.chunk(2)
        step = transition(
            self.process, Kernel("ddim"), x_t, batch.t, batch.t_prev, off + told.guidance * (on - off)
        )
        square = (following - step.mean).square().flatten(1).mean(1)
        return -square / (2 * step.std**2) - step.std.log() - 0.5 * math.log(2 * math.pi)
