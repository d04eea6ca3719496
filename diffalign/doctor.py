"""`diffalign doctor`: what is installed, what this machine can do, and whether a recipe fits on it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from rich.table import Table

    from diffalign.plan import Plan

GB = 1e9
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "safetensors")
OPTIONAL = {
    "bitsandbytes": "optim.optimizer=adamw8bit or model.quantize=nf4",
    "xformers": "model.attention=xformers",
}
# Libraries, kernels and fragmentation take memory that no tensor accounts for.
OVERHEAD = 1.0 * GB
SLACK = 1.1


def machine_table() -> Table:
    """Facts about this machine."""
    from rich.table import Table

    table = Table(title="this machine", show_header=False)
    for name, value in _lines():
        table.add_row(name, value)
    return table


def fits(plan: Plan) -> tuple[bool, str]:
    """Whether a run fits into memory and disk here, and a sentence that says so; unknown sizes fit."""
    uses = plan.memory()
    if not uses:
        return True, "The model is not on this machine yet, so its memory is unknown; train downloads it."
    needed = sum(uses.values()) * SLACK + OVERHEAD
    available = available_memory()
    problems = []
    if needed > available:
        problems.append(
            f"it needs about {needed / GB:.1f} GB of memory and {available / GB:.1f} GB are there: "
            f"{_advice(plan, uses)}"
        )
    free = shutil.disk_usage(_existing(Path(plan.config.output_dir))).free
    disk = plan.disk() or 0.0
    if disk > free:
        problems.append(
            f"checkpoints need up to {disk / GB:.1f} GB and {free / GB:.1f} GB are free in "
            f"{plan.config.output_dir}: lower checkpoint.keep_last or choose another output_dir"
        )
    if problems:
        return False, f"{plan.config.name} does not fit: {'; '.join(problems)}."
    return True, f"{plan.config.name} fits: about {needed / GB:.1f} of {available / GB:.1f} GB of memory."


def available_memory() -> float:
    """Bytes of the first GPU, or of main memory that is free when there is no GPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(psutil.virtual_memory().available)


def _advice(plan: Plan, uses: dict[str, float]) -> str:
    """The setting that lowers the largest use."""
    config = plan.config
    advice = []
    if uses.get("activations", 0) > sum(uses.values()) / 3:
        if not config.model.gradient_checkpointing:
            advice.append("model.gradient_checkpointing=true")
        if config.optim.batch_size > 1:
            advice.append("a smaller optim.batch_size with more optim.accumulation")
    if config.model.tune == "full":
        advice.append("model.tune=lora, or several GPUs with configs/accelerate/fsdp2.yaml")
    return "try " + (", ".join(advice) or "model.precision=bf16, or a lower data.resolution")


def _lines() -> Iterator[tuple[str, str]]:
    yield "system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    for package in PACKAGES:
        yield package, _version(package)
    for package, option in OPTIONAL.items():
        installed = importlib.util.find_spec(package) is not None
        yield package, _version(package) if installed else f"not installed (only for {option})"
    yield from _gpus()
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB free"
    yield "disk", f"{shutil.disk_usage(Path.cwd()).free / GB:.1f} GB free here"


def _gpus() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        yield (
            "GPU",
            f"none that PyTorch {torch.__version__} can use; CPU threads: {torch.get_num_threads()}",
        )
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = (
            "bf16" if torch.cuda.is_bf16_supported(False) else "no bf16: fp32, or fp16 with an fp16-safe VAE"
        )
        yield (
            f"GPU {index}",
            f"{facts.name}, {facts.total_memory / GB:.0f} GB, compute {facts.major}.{facts.minor}, {bf16}",
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing: reinstall diffalign"


def _existing(path: Path) -> Path:
    """The nearest folder above that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
