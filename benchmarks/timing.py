"""What every benchmark needs: interleaved timing, peak memory of one piece of work, the machine in words."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

T = TypeVar("T")


def interleaved(
    steps: Mapping[str, Callable[[], Any]], repeats: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call of each step; the steps take turns, so that a disturbance meets all alike.

    Args:
        repeats: timed rounds. warmup: rounds before them that do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(warmup + repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            elapsed = timed(steps[name], device)
            if number >= warmup:
                seconds[name].append(elapsed)
    return seconds


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's queue included."""
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(seconds: Mapping[str, list[float]], against: str) -> dict[str, float]:
    """How many times faster each step is than `against`: the median over rounds of the ratio in a round.

    A round's steps run within a few seconds of each other, so a slow minute of the machine cancels out.
    """
    return {
        name: statistics.median(a / b for a, b in zip(seconds[against], values, strict=True))
        for name, values in seconds.items()
    }


def in_fresh_process(work: Callable[..., T], *arguments: Any) -> T:
    """The result of a call in a Python process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def resident_memory() -> float:
    """Resident set of this process in MB."""
    return float(psutil.Process().memory_info().rss) / 1e6


def peak_resident_memory() -> float:
    """Largest resident set of this process so far in MB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # A child's ru_maxrss starts at its parent's on Linux; VmHWM is its own.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: device, threads, versions, and how busy the machine was before."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "load_before": round(psutil.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """Model name of the processor and the number of its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {psutil.cpu_count()} cores"


def chosen_device(name: str) -> str:
    """`cpu` or `cuda` for `cpu`, `cuda`, or `auto`: a GPU if there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
