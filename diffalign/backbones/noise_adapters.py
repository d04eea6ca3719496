"""Adapters that predict how the initial noise should change, beside a network that stays as it is.

HyperNoise (Eyring et al. 2025, arXiv 2508.09968): the change f(x, c) is made by the generator's own network with
adapters. Here f is the difference that the adapters make to the network's output at the first time: 0 before training,
for every family alike, for one evaluation without gradients more than the release, whose last layer answers with its
adapter's part alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.backbones.lora import adapters_on
from diffalign.conditioning import Conditioning


def changes_noise(backbone: Backbone) -> bool:
    """Whether a backbone's adapters change the noise; inside `reference()` they do nothing."""
    own = backbone.config.tune == "lora" and backbone.config.lora.changes == "noise"
    return own and not backbone.is_reference


def noise_change(backbone: Backbone, noise: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """What the adapters add to initial noise `[B, C, h, w]`; gradients reach the adapters alone.

    Args:
        t: `[B]`, the first time that a sampler visits. cond: B rows, with sizes where the family has them, and with
            the guidance scale where the network is told one.
    """
    with torch.no_grad():
        plain = backbone.predict(noise, t, cond)
    with adapters_on(backbone._lora_layers):
        return backbone.predict(noise, t, cond) - plain
