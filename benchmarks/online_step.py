"""Images per second of an online round, end to end, against a plain reference-style DDPO round in the same process.

    python -m benchmarks.online_step --json result.json

Both draw the same number of samples with as many steps and guidance, score them and take one optimiser step over every
(sample, step) row. The reference does what first scripts do: text is encoded for every batch, the branches of
guidance are two forwards, pictures are scored one by one, the update is a loop over small batches and steps, all in
fp32. Rounds of both alternate, the first of each is not counted.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffalign.backbones import open_backbone
from diffalign.config import RunConfig, load_recipe, trainer_config
from diffalign.engine.assembly import assemble
from diffalign.engine.parallel import Parallel
from diffalign.engine.run import Run
from diffalign.progress import Reporter
from diffalign.rewards import load_reward
from diffalign.sampling.collection import tell
from diffalign.sampling.rollout import Sampler
from diffalign.sampling.transition import transition

PARTS = ("rollout", "reward", "update")
SAMPLE_BATCH, TRAIN_BATCH = 8, 4


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began


def recipe(precision: str, prompts: int, samples: int, steps: int, batch: int) -> RunConfig:
    """DDPO on `tiny-sdxl`, one optimiser step a round."""
    return load_recipe(
        "scenes/ddpo",
        [
            f"model.precision={precision}",
            "evaluation.prompts=null",
            "trainer.reward=scenes-preference",
            f"trainer.prompts_per_round={prompts}",
            f"trainer.samples={samples}",
            "trainer.updates=1",
            "trainer.passes=1",
            "trainer.filter_flat=false",
            "trainer.fraction=1",
            "trainer.sampling.window=null",
            f"trainer.sampling.steps={steps}",
            f"optim.batch_size={batch}",
        ],
    )


class Ours:
    """A run of this package, driven round by round."""

    def __init__(self, config: RunConfig) -> None:
        parallel = Parallel()
        self.parts = assemble(config, parallel, Reporter(enabled=False))
        self.run = Run(config, parallel, self.parts.backbone, self.parts.trainer)

    def round(self) -> dict[str, float]:
        """One round; seconds by part."""
        rounds, step = self.parts.rounds, self.run.counters.step
        found = rounds.prepare(step)
        began = time.perf_counter()
        share, batches = rounds.share(step)
        self.run.step(batches, share=share)
        update = time.perf_counter() - began
        return {
            "rollout": found["round/rollout_seconds"],
            "reward": found["round/reward_seconds"],
            "update": update,
        }


class Reference:
    """The same round as a plain script would do it."""

    def __init__(self, config: RunConfig) -> None:
        options = trainer_config(config)
        self.backbone = open_backbone(config.model, device=_device(), parts="network", resolution=64)
        self.reward, self.options = load_reward(options.reward), options
        self.sampler: Sampler = sampler_of(config, self.backbone)
        self.prompts = [
            f"a {colour} circle" for colour in ("red", "blue", "green", "yellow", "purple", "black")
        ]
        self.optimizer = torch.optim.AdamW([p for _, p in self.backbone.trainable_parameters()], lr=1e-4)

    def round(self) -> dict[str, float]:
        """One round; seconds by part."""
        clock, options = Clock(), self.options
        texts = [
            self.prompts[i % len(self.prompts)]
            for i in range(options.prompts_per_round)
            for _ in range(options.samples)
        ]
        stored, scores = [], []
        for start in range(0, len(texts), SAMPLE_BATCH):
            batch = texts[start : start + SAMPLE_BATCH]
            with torch.no_grad(), clock("rollout"):
                told = tell(self.backbone, batch, options.sampling.guidance)
                states, log_probs = self._trajectories(told, len(batch))
                pictures = torch.cat([self.backbone.decode(states[-1][i : i + 1]) for i in range(len(batch))])
            with torch.no_grad(), clock("reward"):
                scores += [
                    float(self.reward.score(pictures[i : i + 1], batch[i : i + 1]).mean)
                    for i in range(len(batch))
                ]
            stored.append((batch, states, log_probs))
        rewards = torch.tensor(scores)
        with clock("update"):
            self._update(stored, (rewards - rewards.mean()) / (rewards.std() + 1e-8))
        return clock.seconds

    def _step(self, told: Any, x: Tensor, step: int) -> Any:
        """The distribution of the next state; two forwards for guidance."""
        t, t_prev = self.sampler.schedule.span(step, len(x), self.backbone.device)
        empty = type(told.conditioning)(**{**told.conditioning.tensors(), **told.unconditional.tensors()})
        off = self.backbone.predict(x, t, empty)
        on = self.backbone.predict(x, t, told.conditioning)
        guided = off + told.guidance * (on - off)
        return transition(self.backbone.process, self.sampler.kernel, x, t, t_prev, guided)

    def _trajectories(self, told: Any, count: int) -> tuple[list[Tensor], list[Tensor]]:
        x = torch.randn(count, *self.backbone.latent_shape, device=self.backbone.device)
        states, log_probs = [x], []
        for step in range(len(self.sampler.schedule)):
            now = self._step(told, x, step)
            x = now.sample(torch.randn_like(x))
            states.append(x)
            log_probs.append(now.log_prob(x))
        return states, log_probs

    def _update(self, stored: list[Any], advantage: Tensor) -> None:
        steps, total = self.sampler.stochastic(self.backbone.process), len(advantage)
        for number, (texts, states, log_probs) in enumerate(stored):
            for start in range(0, len(texts), TRAIN_BATCH):
                rows = slice(start, min(start + TRAIN_BATCH, len(texts)))
                with torch.no_grad():
                    told = tell(self.backbone, texts[rows], self.options.sampling.guidance)
                first = number * SAMPLE_BATCH
                weight = advantage[first + rows.start : first + rows.stop].to(self.backbone.device)
                for step in steps:
                    log_prob = self._step(told, states[step][rows], step).log_prob(states[step + 1][rows])
                    ratio = (log_prob - log_probs[step][rows]).exp()
                    clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
                    loss = torch.maximum(-weight * ratio, -weight * clipped).sum() / (total * len(steps))
                    loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([p for _, p in self.backbone.trainable_parameters()], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def sampler_of(config: RunConfig, backbone: Any) -> Sampler:
    """The sampler of the recipe."""
    from diffalign.config import trainer_class

    sampler: Sampler = trainer_class(config)(trainer_config(config), backbone, 0).sampler(0)
    return sampler


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(
        title=f"{result['images']} images a round, {result['steps']} steps, guided, median of rounds"
    )
    for heading in ("", *(f"{part}, s" for part in PARTS), "images/s", "times the reference"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in result["rows"].items():
        parts = [f"{row[part]:.2f}" for part in PARTS]
        table.add_row(name, *parts, f"{row['images_per_second']:.2f}", f"{row['ratio']:.2f}")
    console.print(table)


def main(
    prompts: Annotated[int, typer.Option(min=1, help="Groups of a round.")] = 4,
    samples: Annotated[int, typer.Option(min=2, help="Samples of a group.")] = 8,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Rows at once in our update.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds of each.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all numbers here.")] = None,
) -> None:
    """Measure the rounds."""
    torch.manual_seed(0)
    configs = {p: recipe(p, prompts, samples, steps, batch) for p in ("fp32", "bf16")}
    runners: dict[str, Any] = {"reference, fp32": Reference(configs["fp32"])}
    runners |= {f"ours, {p}": Ours(config) for p, config in configs.items()}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    for turn in range(rounds + 1):
        for name, runner in runners.items():
            seconds = runner.round()
            if turn:
                times[name].append(seconds)
    rows: dict[str, dict[str, float]] = {}
    for name, found in times.items():
        medians = {part: statistics.median(one[part] for one in found) for part in PARTS}
        rows[name] = {**medians, "images_per_second": prompts * samples / sum(medians.values())}
    base = rows["reference, fp32"]["images_per_second"]
    for row in rows.values():
        row["ratio"] = row["images_per_second"] / base
    result = {"images": prompts * samples, "steps": steps, "torch": torch.__version__, "rows": rows}
    show(result, Console(width=110))
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
