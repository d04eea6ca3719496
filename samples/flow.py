"""The embedded SD3-class model: a small transformer trained by flow matching (Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffalign.backbones.sd3 import LENGTH_KEY
from diffalign.process import Process
from diffalign.randomness import derive_seed
from diffalign.samples import architectures, training

DROP_CAPTION = 0.1
ENCODERS = ("text_encoder", "text_encoder_2")


def text_conditioning(encoders: list[torch.nn.Module], tokens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """SD3's text states `[B, 2 L, width]` and pooled embedding `[B, P1 + P2]` without the third text encoder.

    The CLIP states are padded with zeros to the transformer's width; zeros stand where T5's states would.
    """
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([o.hidden_states[-2] for o in outputs], -1)
    states = torch.nn.functional.pad(states, (0, width - states.shape[-1]))
    pooled = torch.cat([o.text_embeds for o in outputs], -1)
    return torch.cat([states, torch.zeros_like(states)], 1), pooled


def start_encoders(folder: Path, vocab_size: int) -> list[CLIPTextModelWithProjection]:
    """Two text encoders that start from those of `tiny-sdxl`; the first gets a projection, which SD3 needs."""
    first, second = (
        CLIPTextModelWithProjection(architectures.tiny_text_encoders(vocab_size)[1].config) for _ in ENCODERS
    )
    first.text_model.load_state_dict(CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict())
    second.load_state_dict(
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").state_dict()
    )
    return [first, second]


def flow_loss(net: torch.nn.ModuleList, process: Process, x0: Tensor, tokens: Tensor) -> Tensor:
    """Flow-matching loss at logit-normal times."""
    transformer, *encoders = net
    noise = torch.randn_like(x0)
    uniform = (torch.randperm(len(x0)) + torch.rand(len(x0))) / len(x0)
    t = process.times(uniform, "logit_normal").to(x0.device)
    config: Any = transformer.config
    width = int(config.joint_attention_dim)
    with training.autocast(x0.device.type):
        states, pooled = text_conditioning(encoders, tokens, width)
        pred = transformer(process.noise(x0, noise, t), states, pooled, process.model_time(t)).sample
    return (pred.float() - process.target(x0, noise, t)).square().mean()


def train_sd3(out: Path, seed: int, steps: int, batch: int, device: str) -> None:
    """Fit transformer and text encoders together, keep the EMA."""
    torch.manual_seed(derive_seed("sd3", seed))
    vae = AutoencoderKL.from_pretrained(out / "tiny-sdxl" / "vae").to(device)
    latents, captions = training.latents_and_captions(vae, seed + 5, 50_000, device)
    shift = latents.mean().item()
    scale = 1 / latents.std().item()
    vae.register_to_config(
        shift_factor=round(shift / vae.config.scaling_factor, 4),
        scaling_factor=round(vae.config.scaling_factor * scale, 4),
    )
    latents = (latents - shift) * scale
    tokenizer = CLIPTokenizer.from_pretrained(out / "tiny-sdxl" / "tokenizer")
    tokens, empty = training.tokenized(tokenizer, captions), training.tokenized(tokenizer, [""])
    encoders = start_encoders(out / "tiny-sdxl", len(tokenizer))
    net = torch.nn.ModuleList([architectures.tiny_transformer(), *encoders]).to(device)
    process = Process("flow")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMAModel(net.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    started, running = time.time(), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = training.learning_rate(step, steps, 1e-3)
        rows = torch.randint(len(latents), (batch,))
        text = torch.where(torch.rand(batch, 1) < DROP_CAPTION, empty, tokens[rows])
        loss = flow_loss(net, process, latents[rows].to(device), text.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        ema.step(net.parameters())
        running.append(loss.item())
        if step % 100 == 99:
            training.report("sd3", step, steps, float(np.mean(running[-100:])), started)
        if step % 500 == 499 or step == steps - 1:
            ema.store(net.parameters())
            ema.copy_to(net.parameters())
            save(out / "tiny-sd3", vae, tokenizer, net)
            ema.restore(net.parameters())


def save(folder: Path, vae: AutoencoderKL, tokenizer: Any, net: torch.nn.ModuleList) -> None:
    """Write the StableDiffusion3Pipeline folder, without a third text encoder."""
    transformer, *encoders = copy.deepcopy(net)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.half(), scheduler=architectures.flow_scheduler(), vae=copy.deepcopy(vae).half(),
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    training.save_folder(pipeline, folder)
    path = folder / "model_index.json"
    # Pipelines ignore private entries; diffalign reads this one.
    index = {**json.loads(path.read_text()), LENGTH_KEY: architectures.MAX_TOKENS}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
