"""Latent consistency distillation of the embedded SDXL-type model (Luo et al. 2023, arXiv 2310.04378, algorithm 1)."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from diffalign.backbones.guidance import guidance_embedding
from diffalign.process import Process, expand_as
from diffalign.randomness import derive_seed
from diffalign.samples import architectures, training

GRID = 25
"""Times of the teacher's solver, which are also those that the student is trained and sampled at."""
GUIDANCE = (2.0, 6.0)
"""Guidance scales that the student is taught, as an input."""
TARGET_DECAY = 0.95
HUBER = 0.001
SCALE_DATA = 0.5
SCALE_TIME = 10.0


def lcm_scheduler() -> LCMScheduler:
    """The teacher's noise schedule with the consistency sampler."""
    noise = {k: architectures.scheduler().config[k] for k in ("beta_start", "beta_end", "beta_schedule")}
    return LCMScheduler(**noise, original_inference_steps=GRID)


def student_of(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The teacher with an input for the guidance scale, whose projection starts at zero."""
    known = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    student = UNet2DConditionModel.from_config({**known, "time_cond_proj_dim": architectures.TIME_WIDTH})
    student.load_state_dict(teacher.state_dict(), strict=False)
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def boundary_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """`c_skip` and `c_out` `[B]` at timesteps `t` `[B]`: the student is the identity at t = 0."""
    scaled = t.float() * SCALE_TIME
    total = scaled.square() + SCALE_DATA**2
    return SCALE_DATA**2 / total, scaled / total.sqrt()


def consistency(process: Process, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The consistency function `c_skip x_t + c_out x0` of a noise prediction."""
    skip, out = boundary_scalings(t)
    return expand_as(skip, x_t) * x_t + expand_as(out, x_t) * process.to_x0(eps, x_t, t)


class Distillation:
    """Teacher, student and its slowly following target, with the loss of one step."""

    def __init__(self, teacher: UNet2DConditionModel, device: str):
        self.teacher = teacher.requires_grad_(False).eval().to(device)
        self.student = student_of(teacher).to(device)
        self.target = copy.deepcopy(self.student).requires_grad_(False)
        self.process = Process.from_scheduler(dict(lcm_scheduler().config))
        self.step_size = self.process.num_timesteps // GRID

    def loss(self, x0: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        """Pseudo-Huber distance of the student at a time to the target one solver step nearer to the picture."""
        count, device = len(x0), x0.device
        index = (torch.randperm(count) + torch.rand(count)) / count * GRID
        t = ((index.long().clamp(max=GRID - 1) + 1) * self.step_size - 1).to(device)
        earlier = (t - self.step_size).clamp(min=0)
        x_t = self.process.noise(x0, torch.randn_like(x0), t)
        scale = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(count, device=device)
        with torch.no_grad():
            x_earlier = self._solve(x_t, t, earlier, scale, states, pooled)
            there = self._consistent(self.target, x_earlier, earlier, scale, states, pooled)
        here = self._consistent(self.student, x_t, t, scale, states, pooled)
        return ((here - there).square() + HUBER**2).sqrt().sub(HUBER).mean()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the target towards the student."""
        for slow, fast in zip(self.target.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 1 - TARGET_DECAY)

    def _solve(
        self, x_t: Tensor, t: Tensor, earlier: Tensor, scale: Tensor, states: Tensor, pooled: Tensor
    ) -> Tensor:
        """One guided DDIM step of the teacher."""
        both = [torch.cat([torch.zeros_like(part), part]) for part in (states, pooled)]
        off, on = self._eps(self.teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), *both).chunk(2)
        eps = off + expand_as(scale, on) * (on - off)
        return self.process.noise(self.process.to_x0(eps, x_t, t), eps, earlier)

    def _consistent(
        self,
        net: UNet2DConditionModel,
        x_t: Tensor,
        t: Tensor,
        scale: Tensor,
        states: Tensor,
        pooled: Tensor,
    ) -> Tensor:
        eps = self._eps(
            net, x_t, t, states, pooled, timestep_cond=guidance_embedding(scale, architectures.TIME_WIDTH)
        )
        return consistency(self.process, eps, x_t, t)

    @staticmethod
    def _eps(
        net: UNet2DConditionModel, x_t: Tensor, t: Tensor, states: Tensor, pooled: Tensor, **more: Tensor
    ) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": training.size_ids(len(x_t), x_t.device)}
        with training.autocast(x_t.device.type):
            return net(x_t, t, states, added_cond_kwargs=added, **more).sample.float()


def train_lcm(out: Path, seed: int, steps: int, batch: int, device: str) -> None:
    """Distil `tiny-sdxl` into `tiny-lcm`; VAE, tokenizer and text encoders stay as they are."""
    torch.manual_seed(derive_seed("lcm", seed))
    teacher = StableDiffusionXLPipeline.from_pretrained(out / "tiny-sdxl", add_watermarker=False)
    latents, captions = training.latents_and_captions(
        teacher.vae.float().to(device), seed + 4, 30_000, device
    )
    encoders = [teacher.text_encoder.to(device), teacher.text_encoder_2.to(device)]
    tokens = training.tokenized(teacher.tokenizer, captions)
    run = Distillation(teacher.unet.float(), device)
    optimizer = torch.optim.AdamW(run.student.parameters(), lr=1e-3, weight_decay=0.0)
    started, running = time.time(), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = training.learning_rate(step, steps, 4e-4)
        rows = torch.randint(len(latents), (batch,))
        with torch.no_grad(), training.autocast(device):
            states, pooled = training.text_conditioning(encoders, tokens[rows].to(device))
        loss = run.loss(latents[rows].to(device), states.float(), pooled.float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.student.parameters(), 1.0)
        optimizer.step()
        run.follow()
        running.append(loss.item())
        if step % 100 == 99:
            training.report("lcm", step, steps, float(np.mean(running[-100:])), started)
        if step % 500 == 499 or step == steps - 1:
            save(out / "tiny-lcm", teacher, run.target)


def save(folder: Path, teacher: StableDiffusionXLPipeline, student: UNet2DConditionModel) -> None:
    """Write the pipeline folder: the teacher's other parts, the student's network in fp16, the consistency sampler."""
    pipeline = StableDiffusionXLPipeline(
        vae=copy.deepcopy(teacher.vae).half(), text_encoder=teacher.text_encoder,
        text_encoder_2=teacher.text_encoder_2, tokenizer=teacher.tokenizer, tokenizer_2=teacher.tokenizer_2,
        unet=copy.deepcopy(student).half(), scheduler=lcm_scheduler(), add_watermarker=False,
    )  # fmt: skip
    training.save_folder(pipeline, folder)
