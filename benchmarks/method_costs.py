"""What a step of MaPO, KTO and of losses on denoising steps costs: ours against their releases', and less than DPO.

    python -m benchmarks.method_costs --repeats 20 --json result.json

Counts forward passes, times the two kinds of step in turns, and takes the peak memory of methods with and without a
reference in processes of their own. See README.md beside this file.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import timing
from benchmarks.dpo_step import DATA_BATCHES, MEMORY_STEPS, our_step
from benchmarks.reference_methods import ReferenceStyleKTO, ReferenceStyleMaPO, ReferenceStyleSteps
from diffalign.backbones import Backbone, open_backbone
from diffalign.config import RunConfig, load_recipe
from diffalign.data.sources import open_records
from diffalign.data.step_pairs import StepBatch
from diffalign.randomness import Draw
from diffalign.sampling.rollout import Told, policy_transition
from diffalign.sampling.transition import Kernel
from diffalign.trainers.step_preference import StepPreferenceConfig, StepPreferenceTrainer

Step = Callable[[], Any]
OURS, RELEASE = "ours", "release"
GUIDANCE, SAMPLER_STEPS, LEARNING_RATE = 5.0, 20, 1e-4
MEMORY = [(method, tune) for tune in ("lora", "full") for method in ("dpo", "mapo", "simpo")]
"""Methods whose peak memory is taken: DPO asks a reference, the other two none."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Fields:
        model, data: as in a recipe. pairs: batch size. precision: of our steps. device: cpu or cuda.
        folder: where caches are kept.
    """

    model: str
    data: str
    pairs: int
    precision: str
    device: str
    folder: str


@contextmanager
def counted_forwards() -> Iterator[Counter[str]]:
    """Samples that UNets are given inside the block, by whether the output carries a gradient; and the calls."""
    counts: Counter[str] = Counter()

    def count(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(module, UNet2DConditionModel):
            predicted = output[0] if isinstance(output, tuple) else output.sample
            counts["with gradient" if predicted.requires_grad else "without"] += len(predicted)
            counts["calls"] += 1

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


def run_config(method: str, tune: str, precision: str, settings: Settings) -> RunConfig:
    """The recipe of a method on the embedded world, with adapters on attention as the public scripts have them."""
    return load_recipe(
        f"scenes/{method}",
        [
            f"model.path={settings.model}",
            f"model.tune={tune}",
            f"model.precision={precision}",
            "model.lora.targets=attention",
            f"data.source={settings.data}",
            "data.held_out=null",
            f"data.limit={DATA_BATCHES * settings.pairs}",
            f"data.cache_dir={settings.folder}",
            f"optim.batch_size={settings.pairs}",
        ],
    )


def open_steps(settings: Settings) -> dict[str, dict[str, Step]]:
    """The two kinds of step of each method. KTO tunes all weights, as its release does, the others a LoRA."""
    return {
        "mapo": open_pair_steps("mapo", "lora", ReferenceStyleMaPO, settings),
        "kto": open_pair_steps("kto", "full", ReferenceStyleKTO, settings),
        "spo": open_transition_steps(settings),
    }


def open_pair_steps(method: str, tune: str, release: type, settings: Settings) -> dict[str, Step]:
    """Steps of a method on pairs of pictures."""
    theirs = run_config(method, tune, "fp32", settings)
    return {
        RELEASE: release(theirs, open_records(theirs.data), torch.device(settings.device)),
        OURS: our_step(run_config(method, tune, settings.precision, settings), Path(settings.folder)),
    }


def open_transition_steps(settings: Settings) -> dict[str, Step]:
    """Steps of the loss of SPO and LPO on stored pairs of next states; only the forwards differ."""
    config = StepPreferenceConfig(form="spo", reward="scenes-judge")
    assert config.clip is not None
    ours, theirs = (open_model(precision, settings) for precision in (settings.precision, "fp32"))
    trainer = StepPreferenceTrainer(config, ours)
    release = ReferenceStyleSteps(theirs, trainer.beta, config.clip)
    batch = step_pairs(ours, settings.pairs)
    return {
        RELEASE: training_step(theirs, lambda: release.loss(batch)),
        OURS: training_step(ours, lambda: trainer.loss(batch)[0].mean()),
    }


def open_model(precision: str, settings: Settings) -> Backbone:
    """The model with adapters on attention."""
    config = run_config("dpo", "lora", precision, settings)
    return open_backbone(config.model, device=settings.device, resolution=config.data.resolution)


@torch.no_grad()
def step_pairs(backbone: Backbone, pairs: int) -> StepBatch:
    """Two next states of each of `pairs` states, drawn by the base model from random latents."""
    torch.manual_seed(0)
    shape, device = (pairs, *backbone.latent_shape), backbone.device
    stride = backbone.process.num_timesteps // SAMPLER_STEPS
    t = torch.randint(1, SAMPLER_STEPS, (pairs,), device=device) * stride + 1
    x_t = backbone.process.noise(torch.randn(shape, device=device), torch.randn(shape, device=device), t)
    size = torch.tensor([backbone.resolution], device=device).expand(pairs, 2)
    cond = backbone.encode_prompts([f"a red circle, {number}" for number in range(pairs)])
    told = Told(
        backbone.with_sizes(cond, size, 0 * size, size), backbone.unconditional(pairs).to(device), GUIDANCE
    )
    backbone.release_encoders()
    drawn = policy_transition(backbone, Kernel("ddim"), x_t, t, t - stride, told)
    chosen, rejected = (drawn.sample(torch.randn(shape, device=device)) for _ in range(2))
    ones, rows = torch.ones(pairs, device=device), list(range(pairs))
    draw = Draw(0, 0, rows, rows, pairs)
    return StepBatch(x_t, chosen, rejected, t, t - stride, told, ones, ones, draw)


def training_step(backbone: Backbone, loss: Callable[[], Tensor]) -> Step:
    """Loss, backward, clipping and update."""
    trained = [parameter for _, parameter in backbone.trainable_parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(settings: Settings, repeats: int, warmup: int) -> list[dict[str, Any]]:
    """A row for each method and kind of step: forwards per pair, and seconds taken in turns in this process."""
    rows = []
    for method, steps in open_steps(settings).items():
        counts = {name: forwards_per_pair(step, settings.pairs) for name, step in steps.items()}
        seconds = timing.interleaved(steps, repeats, warmup, torch.device(settings.device))
        ratios = timing.ratios(seconds, RELEASE)
        for name in steps:
            median = statistics.median(seconds[name])
            rows.append(
                {"method": method, "step": name, **counts[name], "seconds": median, "ratio": ratios[name]}
            )
    return rows


def forwards_per_pair(step: Step, pairs: int) -> dict[str, float]:
    """Samples through the network for a pair, with and without gradient, and calls of the network in a step."""
    with counted_forwards() as counts:
        step()
    return {
        "with_gradient": counts["with gradient"] / pairs,
        "without": counts["without"] / pairs,
        "calls": counts["calls"],
    }


def memory_row(method: str, tune: str, settings: Settings) -> dict[str, Any]:
    """Peak MB of a few of our steps above what was there before, opening included, and their forwards per pair."""
    before = timing.resident_memory()
    step = our_step(run_config(method, tune, settings.precision, settings), Path(settings.folder))
    counts = forwards_per_pair(step, settings.pairs)
    for _ in range(MEMORY_STEPS - 1):
        step()
    if settings.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        peak = timing.peak_resident_memory() - before
    return {"method": method, "tune": tune, **counts, "peak_memory_mb": peak}


def show(result: dict[str, Any], console: Console) -> None:
    """Print the machine and the tables."""
    console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), soft_wrap=True)
    settings = result["settings"]
    heads = ("method", "step", "with gradient", "without", "calls", "seconds", "times as fast")
    table = Table(*heads, title=f"a step of {settings['pairs']} pairs; samples through the network per pair")
    for row in result["costs"]:
        table.add_row(
            row["method"], row["step"], f"{row['with_gradient']:g}", f"{row['without']:g}", str(row["calls"]),
            f"{row['seconds']:.4f}", f"{row['ratio']:.2f}",
        )  # fmt: skip
    console.print(table)
    if result["memory"]:
        table = Table("method", "tune", "with gradient", "without", "peak MB", title="peak memory of ours")
        for row in result["memory"]:
            numbers = f"{row['with_gradient']:g}", f"{row['without']:g}", f"{row['peak_memory_mb']:.0f}"
            table.add_row(row["method"], row["tune"], *numbers)
        console.print(table)


def main(
    pairs: Annotated[int, typer.Option(min=1, help="Pairs per step.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each kind.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Steps of each kind before timing.")] = 2,
    precision: Annotated[
        str, typer.Option(help="Our precision: fp32 as the releases' here, or bf16.")
    ] = "fp32",
    model: Annotated[str, typer.Option(help="An SDXL-type model, as in a recipe.")] = "scenes:tiny-sdxl",
    data: Annotated[str, typer.Option(help="Preference pairs, as in a recipe.")] = "scenes:preferences",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in a process per method.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all numbers here.")] = None,
) -> None:
    """Measure steps of MaPO, KTO and SPO against their releases', and memory against DPO."""
    device = timing.chosen_device(device)
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(model, data, pairs, precision, device, folder)
        machine = timing.machine(torch.device(device))
        described = {key: value for key, value in asdict(settings).items() if key != "folder"}
        costs = compare(settings, repeats, warmup)
        used = [timing.in_fresh_process(memory_row, *which, settings) for which in MEMORY if memory]
    described |= {"repeats": repeats, "warmup": warmup}
    result = {"machine": machine, "settings": described, "costs": costs, "memory": used}
    show(result, Console())
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
