"""Rebuild the embedded world from a seed: `python -m diffalign.samples.build [STAGE ...]`.

Stages: vae, unet, preferences, held-out, clip, scorers. Each writes into the package folder (or `--out`) and can be
run alone once the earlier ones exist. Times and accuracies of the shipped build stand in README.md beside this file.
"""

from __future__ import annotations

import argparse
import copy
import itertools
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

DROP_CAPTION = 0.1
STAGES = ("vae", "unet", "preferences", "held-out", "clip", "scorers")


def pictures(seed: int, count: int) -> tuple[np.ndarray, list[str]]:
    """`count` training pictures `[N, 64, 64, 3]` uint8 with their captions."""
    rng = np.random.default_rng(derive_seed("backgrounds", seed))
    drawn = itertools.islice(scenes.training_scenes(seed), count)
    rows = [(scenes.draw(placed, scenes.random_background(rng)), scenes.caption(s)) for s, placed in drawn]
    return np.stack([row[0] for row in rows]), [row[1] for row in rows]


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 `[N, H, W, 3]` to float `[N, 3, H, W]` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then cosine decay to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * progress)))


def report(name: str, step: int, steps: int, loss: float, started: float) -> None:
    """One progress line."""
    left = (time.time() - started) / (step + 1) * (steps - step - 1)
    print(f"{name} {step + 1}/{steps} loss {loss:.4f}, {left / 60:.1f} min left", flush=True)


def autocast(device: str) -> torch.autocast:
    """bf16 on any device: half the time on CPUs and GPUs that have it."""
    return torch.autocast(device, torch.bfloat16)


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


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray, device: str) -> Tensor:
    """Scaled posterior means `[N, 4, 16, 16]`."""
    parts = []
    for chunk in to_tensor(images).split(256):
        with autocast(device):
            parts.append(vae.encode(chunk.to(device)).latent_dist.mode().float().cpu())
    return torch.cat(parts) * vae.config.scaling_factor


def text_conditioning(encoders: list[torch.nn.Module], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """SDXL text states `[B, L, D1 + D2]` and pooled embedding `[B, P]` of token ids `[B, L]`."""
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    return torch.cat([o.hidden_states[-2] for o in outputs], -1), outputs[1][0]


def train_unet(out: Path, seed: int, steps: int, batch: int, device: str) -> None:
    """Fit UNet and both text encoders together on noisy latents (eps prediction, min-SNR weight 5), keep the EMA."""
    torch.manual_seed(derive_seed("unet", seed))
    images, captions = pictures(seed + 2, 60_000)
    vae = AutoencoderKL.from_pretrained(out / "tiny-sdxl" / "vae").to(device)
    latents = encode_all(vae, images, device)
    del images
    tokenizer = architectures.train_tokenizer(captions, out / "tiny-sdxl" / "tokenizer")
    tokens = tokenizer(
        captions, padding="max_length", max_length=architectures.MAX_TOKENS, return_tensors="pt"
    ).input_ids
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
    size = torch.tensor([64.0, 64, 0, 0, 64, 64], device=x0.device).expand(len(x0), 6)
    with autocast(x0.device.type):
        states, pooled = text_conditioning(encoders, tokens)
        added = {"text_embeds": pooled * keep[:, None], "time_ids": size}
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
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("*/config.json"):
        facts = json.loads(path.read_text())
        facts.pop("_name_or_path", None)
        path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


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
        else:
            write_held_out(args.out)


if __name__ == "__main__":
    main()
