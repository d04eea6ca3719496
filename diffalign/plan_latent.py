"""Size of a run that trains a reward of noisy latents: a head, and a frozen network that is read up to a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffalign.config import RunConfig, trainer_config
from diffalign.plan_network import NetworkSize, counting, meta_network, network_inputs


def latent_size(config: RunConfig, dtype: torch.dtype) -> NetworkSize | None:
    """Weights and compute of a pair (two pictures); None when the network's configuration is not on this machine.

    Raises:
        DiffalignError: the model path does not exist, or its network has no such layer.
    """
    from diffalign.backbones.early import default_layer, states_of, stopped
    from diffalign.sampling.latent_scorer import HeadSpec, LatentHead

    options, network = trainer_config(config), meta_network(config)
    if network is None:
        return None
    inputs = network_inputs(config, network, dtype)
    with torch.no_grad(), counting(network) as kept, FlopCounterMode(display=False) as counter:
        layer = options.layer or default_layer(network)
        states = states_of(stopped(network, layer, lambda: network(**inputs)))
    head = LatentHead(HeadSpec(states.shape[-1], caption_size(inputs), options.hidden))
    trained = sum(p.numel() for p in head.parameters())
    flops = counter.get_total_flops() + kept.attention_flops
    times = options.times_per_pair * (1 if options.guidance == 1 else 2)
    total = trained + sum(p.numel() for p in network.parameters())
    return NetworkSize(total, trained, 0, int(flops * times), frozen=True)


def caption_size(inputs: dict[str, Any]) -> int:
    """Size of the caption's vector among a network's inputs: pooled, or of the text states."""
    pooled = inputs.get("pooled_projections", inputs.get("added_cond_kwargs", {}).get("text_embeds"))
    return int((inputs["encoder_hidden_states"] if pooled is None else pooled).shape[-1])
