"""ReNO's iterations per second and peak memory on `tiny-lcm`, against a plain loop in the same process.

    python -m benchmarks.reno_step --json result.json

Both climb from the same noises of the same prompts in one step on the sum of three scorers (CLIP, preference model,
aesthetic head). The plain loop is what first scripts do: fp32, one prompt at a time, prompts encoded and every scorer
asked by itself in each iteration, torch's SGD and clipping. Ours takes all prompts at once, in fp32 and in bf16. The
rewards of the first iteration are compared, so that both are known to do the same. Memory: each mode in a process of
its own.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.timing import (
    chosen_device,
    in_fresh_process,
    interleaved,
    machine,
    peak_resident_memory,
    ratios,
    resident_memory,
)
from diffalign.backbones import open_backbone
from diffalign.backbones.base import Backbone
from diffalign.config import ModelConfig
from diffalign.evaluation.prompts import EvalPrompt, read_prompts, with_seeds
from diffalign.inference.config import GenerationConfig
from diffalign.inference.run import optimize
from diffalign.rewards import load_reward, place

SCORERS = ("scenes-clip", "scenes-preference", "scenes-aesthetic")
GUIDANCE = 4.0
MODES = {
    "ours, fp32": ("fp32", "none"),
    "ours, fp32, steps recomputed": ("fp32", "steps"),
    "ours, fp32, blocks recomputed": ("fp32", "blocks"),
    "ours, bf16": ("bf16", "none"),
    "ours, bf16, blocks recomputed": ("bf16", "blocks"),
}
"""Precision and checkpointing by name."""
PLAIN = "plain loop, fp32"


class Plain:
    """The loop of a plain script around a diffusers pipeline."""

    def __init__(self, model: str, device: str) -> None:
        backbone = opened(model, "fp32", device)
        self.pipe: Any = backbone.pipeline()
        self.size, self.device = backbone.resolution, torch.device(device)
        self.rewards = [place(load_reward(name), self.device) for name in SCORERS]
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2):
            part.requires_grad_(False).eval()

    def picture(self, latents: Tensor, prompt: str) -> Tensor:
        """The picture `[1, 3, H, W]` in [0, 1] of one step."""
        pipe = self.pipe
        with torch.no_grad():
            embeds, _, pooled, _ = pipe.encode_prompt(
                prompt, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        pipe.scheduler.set_timesteps(1, device=self.device)
        t = pipe.scheduler.timesteps[0]
        ids = torch.tensor([[*self.size, 0, 0, *self.size]], dtype=embeds.dtype, device=self.device)
        told = pipe.get_guidance_scale_embedding(
            torch.full((1,), GUIDANCE - 1), embedding_dim=pipe.unet.config.time_cond_proj_dim
        ).to(embeds)
        prediction = pipe.unet(
            latents,
            t,
            encoder_hidden_states=embeds,
            timestep_cond=told,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
            return_dict=False,
        )[0]
        clean = pipe.scheduler.step(prediction, t, latents, return_dict=False)[1]
        decoded = pipe.vae.decode(clean / pipe.vae.config.scaling_factor, return_dict=False)[0]
        return (decoded / 2 + 0.5).clamp(0, 1)

    def climb(self, start: Tensor, prompt: str, iterations: int) -> list[float]:
        """Rewards of a prompt's pictures from one noise `[1, C, h, w]` on; equations 5 and 6 of ReNO."""
        latents = start.to(self.device).clone().requires_grad_()
        optimizer = torch.optim.SGD([latents], lr=5.0, momentum=0.9, nesterov=True)
        seen, d = [], latents.numel()
        for _ in range(iterations):
            optimizer.zero_grad()
            picture = self.picture(latents, prompt)
            reward = torch.stack([scorer.score(picture, [prompt]).mean for scorer in self.rewards]).sum()
            norm = latents.norm()
            loss = -reward + 0.01 * (norm.square() / 2 - (d - 1) * norm.log())
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(latents, 0.1)
            optimizer.step()
            seen.append(reward.item())
        return seen


def opened(model: str, precision: Any, device: str) -> Backbone:
    """The model, ready to draw."""
    return open_backbone(ModelConfig(path=model, precision=precision), device=device)


def rows(count: int) -> list[EvalPrompt]:
    """The first held-out prompts, each with its own seed."""
    return with_seeds(read_prompts("scenes:held-out", count), 0)


def ours(
    backbone: Backbone, prompts: Sequence[EvalPrompt], iterations: int, checkpointing: Any
) -> Callable[[], Any]:
    """A run of all prompts at once."""
    options = GenerationConfig(
        steps=1, guidance=GUIDANCE, batch_size=len(prompts), checkpointing=checkpointing
    )
    reward = {"reward": "weighted-sum", "of": list(SCORERS)}
    method = {"method": "reno", "iterations": iterations}

    def run() -> Any:
        return optimize(
            backbone, prompts, reward, method=method, generation=options, baseline="none", shown=0
        )

    return run


def plainly(plain: Plain, start: Tensor, prompts: Sequence[EvalPrompt], iterations: int) -> list[list[float]]:
    """Rewards `[B][iterations]`, one prompt after the other."""
    return [plain.climb(noise[None], row.text, iterations) for noise, row in zip(start, prompts, strict=True)]


def memory(mode: str, model: str, device: str, count: int) -> float:
    """Peak MB of three iterations above what the loaded model takes."""
    prompts = rows(count)
    if mode == PLAIN:
        plain = Plain(model, device)
        start = torch.randn(1, *_shape(plain), generator=torch.Generator().manual_seed(0))
        before = resident_memory()
        plain.climb(start, prompts[0].text, 3)
        return _peak(device) - before
    precision, checkpointing = MODES[mode]
    run = ours(opened(model, precision, device), prompts, 3, checkpointing)
    before = resident_memory()
    run()
    return _peak(device) - before


def _shape(plain: Plain) -> tuple[int, int, int]:
    side = plain.pipe.unet.config.sample_size
    return plain.pipe.unet.config.in_channels, side, side


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_resident_memory()


def main(
    model: Annotated[
        str, typer.Option(help="A one-step consistency model of SDXL's kind.")
    ] = "scenes:tiny-lcm",
    prompts: Annotated[int, typer.Option(help="Prompts.")] = 8,
    iterations: Annotated[int, typer.Option(help="Of each timed run.")] = 20,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
) -> None:
    """Time all modes in turns, then measure their memory."""
    where = chosen_device(device)
    wanted, plain = rows(prompts), Plain(model, where)
    opened_ones = {precision: opened(model, precision, where) for precision in ("fp32", "bf16")}
    runs: dict[str, Callable[[], Any]] = {
        mode: ours(opened_ones[precision], wanted, iterations, checkpointing)
        for mode, (precision, checkpointing) in MODES.items()
    }
    found = runs["ours, fp32"]()
    start = found.first[:, 0]
    rewards = plainly(plain, start, wanted, 1)
    apart = max(abs(a[0] - b) for a, b in zip(rewards, found.rewards["before"].tolist(), strict=True))
    steps = {PLAIN: lambda: plainly(plain, start, wanted, iterations), **runs}
    seconds = interleaved(steps, repeats, 1, torch.device(where))
    faster = ratios(seconds, PLAIN)
    result = {
        "machine": machine(torch.device(where)),
        "rewards_apart": apart,
        "modes": {
            mode: {
                "iterations_per_second": iterations * prompts / statistics.median(values),
                "times_as_fast": faster[mode],
                "peak_mb": in_fresh_process(memory, mode, model, where, prompts),
            }
            for mode, values in seconds.items()
        },
    }
    show(result, Console())
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2), encoding="utf-8")


def show(result: dict[str, Any], console: Console) -> None:
    """Print the result as a table."""
    grid = Table("mode", "prompt iterations/s", "times as fast", "peak MB above the models")
    for mode, figures in result["modes"].items():
        grid.add_row(
            mode,
            f"{figures['iterations_per_second']:.1f}",
            f"{figures['times_as_fast']:.2f}",
            f"{figures['peak_mb']:.0f}",
        )
    console.print(grid)
    console.print(f"rewards of the first pictures differ by at most {result['rewards_apart']:.1e}")


if __name__ == "__main__":
    typer.run(main)
