"""Pictures per second of the tiny scorers and of a ViT-H-14 with random weights: batched against one by one.

    python -m benchmarks.scorers --repeats 5 --json result.json

The weights of ViT-H-14 play no part in its speed; it is the backbone of PickScore and HPSv2.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import timing
from diffalign.rewards import REWARDS, Reward, load_reward, place
from diffalign.rewards.base import RewardOutput
from diffalign.rewards.clip_model import ClipModel
from diffalign.rewards.preprocess import ClipPreprocess
from diffalign.samples.scenes import held_out_captions

TINY = ("scenes-clip", "scenes-aesthetic", "scenes-preference", "scenes-ensemble")


class RandomClip(nn.Module):
    """CLIP score of an open_clip architecture with random weights."""

    modality = "image"
    differentiable = True
    kind = "sample"

    def __init__(self, architecture: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = f"{architecture} {str(dtype).removeprefix('torch.')}"
        network = open_clip.create_model(architecture, pretrained=None).eval().requires_grad_(False)
        tokenizer = open_clip.get_tokenizer(architecture)
        config = open_clip.get_model_config(architecture)
        preprocess = ClipPreprocess(size=config["vision_cfg"]["image_size"])
        self.clip = ClipModel(network, lambda texts: (tokenizer(texts),), preprocess, config["embed_dim"]).to(
            dtype
        )

    def score(self, media: Tensor, prompts: list[str]) -> RewardOutput:
        """Cosines of pictures `[B, 3, H, W]` and prompts."""
        return RewardOutput(self.clip.similarity(media, prompts))


def runs(reward: Any, pictures: Tensor, prompts: list[str]) -> Mapping[str, Callable[[], object]]:
    """The same pictures as one batch and one after another."""

    @torch.no_grad()
    def batched() -> object:
        return reward.score(pictures, prompts).mean.cpu()

    @torch.no_grad()
    def singly() -> object:
        one_by_one = zip(pictures.split(1), prompts, strict=True)
        return [reward.score(picture, [prompt]).mean.cpu() for picture, prompt in one_by_one]

    return {"batched": batched, "one by one": singly}


def measure(reward: Any, size: int, count: int, repeats: int, warmup: int, device: str) -> dict[str, Any]:
    """Pictures per second of one scorer on `count` random pictures of `size` pixels."""
    pictures = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    prompts = [text for text, _ in held_out_captions()[:count]]
    seconds = timing.interleaved(runs(reward, pictures, prompts), repeats, warmup, torch.device(device))
    speed = {name: count / statistics.median(values) for name, values in seconds.items()}
    ratio = timing.ratios(seconds, "one by one")["batched"]
    return {"scorer": reward.name, "size": size, "batch": count, **speed, "ratio": ratio}


def tiny(name: str, device: str) -> Reward:
    """A tiny scorer on a device."""
    assert name in REWARDS
    return place(load_reward(name), device)


def show(result: dict[str, Any], console: Console) -> None:
    """Print the machine and the table."""
    console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), soft_wrap=True)
    table = Table("scorer", "pixels", "batch", "batched", "one by one", "ratio", title="pictures per second")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in result["rows"]:
        table.add_row(
            row["scorer"], str(row["size"]), str(row["batch"]),
            f"{row['batched']:.1f}", f"{row['one by one']:.1f}", f"{row['ratio']:.2f}",
        )  # fmt: skip
    console.print(table)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before timing.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Pictures of the tiny scorers.")] = 64,
    large: Annotated[
        str, typer.Option(help="open_clip architecture of real size; empty: none.")
    ] = "ViT-H-14",
    large_batch: Annotated[int, typer.Option(min=1, help="Pictures of 224 px for it.")] = 8,
    precision: Annotated[
        str, typer.Option(help="Of the large one: float32, bfloat16 or float16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all numbers here.")] = None,
) -> None:
    """Measure the throughput of scorers."""
    device = timing.chosen_device(device)
    machine = timing.machine(torch.device(device))
    rows = [measure(tiny(name, device), 64, batch, repeats, warmup, device) for name in TINY]
    if large:
        reward = RandomClip(large, getattr(torch, precision)).to(device)
        rows.append(measure(reward, 224, large_batch, repeats, warmup, device))
    result = {"machine": machine, "rows": rows}
    show(result, Console())
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
