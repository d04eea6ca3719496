"""Rebuild the embedded world from a seed: `python -m diffalign.samples.build [STAGE ...]`.

Stages: vae, unet, preferences, held-out, clip, scorers, latent, lcm, sd3. Each writes into the package folder (or
`--out`) and can be run alone once the earlier ones exist. Times and accuracies of the shipped build stand in README.md
beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.training_utils import EMAModel
from torch import Tensor

from diffalign.process import Process
from diffalign.randomness import derive_seed
from diffalign.samples import FOLDER, architectures, scenes
from diffalign.samples.training import (
    autocast,
    encode_all,
    learning_rate,
    pictures,
    report,
    save_folder,
    size_ids,
    text_conditioning,
    to_tensor,
    tokenized,
)

DROP_CAPTION = 0.1
STAGES = ("vae", "unet", "preferences", "held-out", "clip", "scorers", "latent", "lcm", "sd3")


def train_vae(out: Path, seed: int, steps: int, batch: int, device: str) -> None:
    """Fit the VAE on pictures with an L1 and an edge loss and a faint KL term, then set its scaling factor."""
    torch.manual_seed(derive_seed("vae", seed))
    images = to_tensor(pictures(seed + 1, 12_000)[0])
    vae = architectures.tiny_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    started = time.time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 2e-3)
        x = images[torch.randint(len(images), (batch,))].to(device)
        with autocast(device):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        loss = F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + edges + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            report("vae", step, steps, loss.item(), started)
    with torch.no_grad():
        latents = vae.encode(images[:512].to(device)).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.to(torch.float16).save_pretrained(out / "tiny-sdxl" / "vae")


def train_unet(out: Path, seed: int, steps: int, batch: int, device: str) -> None:
    """Fit UNet and both text encoders together on noisy latents (eps prediction, min-SNR weight 5), keep the EMA."""
    torch.manual_seed(derive_seed("unet", seed))
    images, captions = pictures(seed + 2, 60_000)
    vae = AutoencoderKL.from_pretrained(out / "tiny-sdxl" / "vae").to(device)
    latents = encode_all(vae, images, device)
    del images
    tokenizer = architectures.train_tokenizer(captions, out / "tiny-sdxl" / "tokenizer")
    tokens = tokenized(tokenizer, captions)
    net = torch.nn.ModuleList(
        [architectures.tiny_unet(), *architectures.tiny_text_encoders(len(tokenizer))]
    ).to(device)
    process = Process.from_scheduler(dict(architectures.scheduler().config))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    ema = EMAModel(net.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    started, running = time.time(), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 1.2e-3)
        rows = torch.randint(len(latents), (batch,))
        loss = denoising_loss(net, process, latents[rows].to(device), tokens[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        ema.step(net.parameters())
        running.append(loss.item())
        if step % 100 == 99:
            report("unet", step, steps, float(np.mean(running[-100:])), started)
        if step % 1000 == 999 or step == steps - 1:
            ema.store(net.parameters())
            ema.copy_to(net.parameters())
            save_pipeline(out / "tiny-sdxl", vae, tokenizer, net)
            ema.restore(net.parameters())


def denoising_loss(net: torch.nn.ModuleList, process: Process, x0: Tensor, tokens: Tensor) -> Tensor:
    """Min-SNR weighted eps loss (Hang et al. 2023, gamma 5) with caption dropout to zeros, as SDXL guides."""
    unet, *encoders = net
    noise = torch.randn_like(x0)
    t = process.times((torch.randperm(len(x0)) + torch.rand(len(x0))) / len(x0)).to(x0.device)
    keep = (torch.rand(len(x0), device=x0.device) >= DROP_CAPTION).float()
    with autocast(x0.device.type):
        states, pooled = text_conditioning(encoders, tokens)
        added = {"text_embeds": pooled * keep[:, None], "time_ids": size_ids(len(x0), x0.device)}
        pred = unet(
            process.noise(x0, noise, t), t, states * keep[:, None, None], added_cond_kwargs=added
        ).sample
    snr = process.snr(t)
    weight = snr.clamp(max=5.0) / snr
    return (weight * (pred.float() - noise).square().mean((1, 2, 3))).mean()


def save_pipeline(folder: Path, vae: AutoencoderKL, tokenizer, net: torch.nn.ModuleList) -> None:
    """Write the StableDiffusionXLPipeline folder.

    UNet and VAE in fp16; the small text encoders in fp32, since transformers loads the stored precision where
    diffusers loads fp32, and `from_pretrained` without arguments should just work.
    """
    unet, encoder, encoder_2 = copy.deepcopy(net)
    pipeline = StableDiffusionXLPipeline(
        vae=copy.deepcopy(vae).half(), text_encoder=encoder, text_encoder_2=encoder_2,
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet.half(),
        scheduler=architectures.scheduler(), add_watermarker=False,
    )  # fmt: skip
    save_folder(pipeline, folder)


def write_held_out(out: Path) -> None:
    """The held-out captions in evaluation order, one JSON object a line."""
    lines = [
        json.dumps({"prompt": text, "category": category}) for text, category in scenes.held_out_captions()
    ]
    (out / "held_out.jsonl").write_text("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Run the chosen stages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default all")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: the package)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-steps", type=int, default=900)
    parser.add_argument("--unet-steps", type=int, default=3400)
    parser.add_argument("--clip-steps", type=int, default=500)
    parser.add_argument("--lcm-steps", type=int, default=1500)
    parser.add_argument("--sd3-steps", type=int, default=3600)
    args = parser.parse_args(argv)
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {sorted(unknown)}; choose from {', '.join(STAGES)}")
    for stage in args.stages or STAGES:
        if stage == "vae":
            train_vae(args.out, args.seed, args.vae_steps, 32, args.device)
        elif stage == "unet":
            train_unet(args.out, args.seed, args.unet_steps, 48, args.device)
        elif stage == "preferences":
            from diffalign.samples.preferences import build_preferences

            build_preferences(args.out, args.seed, args.device)
        elif stage == "clip":
            from diffalign.samples.train_scorers import train_clip

            train_clip(args.out, args.seed, args.clip_steps, 128, args.device)
        elif stage == "scorers":
            from diffalign.samples.train_scorers import train_scorers

            train_scorers(args.out, args.seed, args.device)
        elif stage == "latent":
            from diffalign.samples.train_latent import train_latent

            train_latent(args.out, args.seed)
        elif stage == "lcm":
            from diffalign.samples.consistency import train_lcm

            train_lcm(args.out, args.seed, args.lcm_steps, 48, args.device)
        elif stage == "sd3":
            from diffalign.samples.flow import train_sd3

            train_sd3(args.out, args.seed, args.sd3_steps, 64, args.device)
        else:
            write_held_out(args.out)


if __name__ == "__main__":
    main()
