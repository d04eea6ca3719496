"""Stored rollouts: what a model drew and how it was judged, as a folder that training reads lazily.

A folder holds `common.safetensors` (times, unconditional embedding), shards of `PROMPTS_PER_SHARD` prompts and an index
that is written last. Shards are written one by one: an interrupted job goes on where it stopped. Latents are float32,
since a ratio with rounded states is off by more than a clip range.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.conditioning import Conditioning
from diffalign.data.shards import (
    CorruptShard,
    is_complete,
    read_metadata,
    read_tensors,
    remove_stale_partials,
    write_tensors,
    write_text,
)
from diffalign.errors import DiffalignError
from diffalign.randomness import derive_seed
from diffalign.sampling.collection import tell
from diffalign.sampling.rollout import Rollout, Sampler, Told, candidate_rollout, chunks, rollout
from diffalign.sampling.schedules import Schedule
from diffalign.sampling.step_scores import Judge, StepReward, attach, predicted_picture, step_aware
from diffalign.sampling.transition import Kernel

INDEX = "index.json"
COMMON = "common.safetensors"
PROMPTS_PER_SHARD = 16
# Raise this when the same job would give other tensors.
VERSION = 1

Kind = Literal["trajectories", "candidates"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""


def silent(label: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class RolloutJob:
    """What to draw.

    Fields:
        kind: `trajectories`: K samples per prompt. `candidates`: one per prompt, with K next states at `steps`.
        prompts: distinct. samples: K. sampler: how they are drawn. guidance: scale; 1 or less turns it off.
        steps: where candidates are drawn; None: at all steps that draw noise.
        same_start: whether the samples of a prompt share their initial latents.
        seed: of everything that is drawn.
    """

    kind: Kind
    prompts: tuple[str, ...]
    samples: int
    sampler: Sampler
    guidance: float = 1.0
    steps: tuple[int, ...] | None = None
    same_start: bool = True
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """Everything that decides what is drawn, as JSON can hold it."""
        sampler = self.sampler
        return {
            "kind": self.kind,
            "prompts": list(self.prompts),
            "samples": self.samples,
            "times": sampler.schedule.times.tolist(),
            "kernel": asdict(sampler.kernel) | {"noise": sampler.kernel.level},
            "window": sampler.window,
            "batch_size": sampler.batch_size,
            "guidance": self.guidance,
            "steps": self.steps,
            "same_start": self.same_start,
            "seed": self.seed,
            "version": VERSION,
        }

    def key(self, *facts: object) -> str:
        """Hash of the job and of facts such as the model's fingerprint and the reward: the name of the folder."""
        text = json.dumps([self.settings(), [str(fact) for fact in facts]], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def seeds(self, prompt: str) -> list[int]:
        """Seeds of a prompt's samples: they do not depend on the other prompts."""
        count = self.samples if self.kind == "trajectories" else 1
        return [derive_seed(self.seed, "rollout", prompt, k) for k in range(count)]

    def starts(self, prompt: str) -> list[int]:
        """Seeds of the initial latents of a prompt's samples."""
        seeds = self.seeds(prompt)
        return [seeds[0]] * len(seeds) if self.same_start else seeds


def store_rollouts(
    folder: Path,
    backbone: Backbone,
    job: RolloutJob,
    reward: Any,
    *,
    key: str,
    progress: Progress = silent,
) -> RolloutStore:
    """Draw and judge what is missing of a job, write it, and open the result.

    Args:
        reward: `diffalign.rewards.Reward` for the final pictures. Candidates are scored by its `score_step` when it is
            a `StepReward`, else by the score of the picture that the network sees in them.
        key: `job.key(...)`; files of another key are never used.

    Raises:
        DiffalignError: a kernel that the model cannot use, a reward of another generator's latents, scores that are
            not finite, or a full disk.
    """
    attach(reward, backbone)
    remove_stale_partials(folder)
    if not is_complete(folder / COMMON, key):
        blank = {f"uncond.{n}": v.cpu() for n, v in backbone.unconditional(1).tensors().items()}
        write_tensors(folder / COMMON, {"times": job.sampler.schedule.times, **blank}, {"key": key})
    shards = list(chunks(len(job.prompts), PROMPTS_PER_SHARD))
    for number, part in enumerate(shards):
        path = folder / _shard(number)
        if not is_complete(path, key):
            prompts = job.prompts[part.start : part.stop]
            make = _trajectories if job.kind == "trajectories" else _candidates
            write_tensors(path, make(backbone, job, prompts, reward), {"key": key})
        progress("rollouts", part.stop, len(job.prompts))
    if not (folder / INDEX).exists():
        write_text(folder / INDEX, json.dumps({"key": key, "settings": job.settings()}, indent=1))
    return RolloutStore.open(folder, key)


class RolloutStore:
    """Stored rollouts of N prompts, read from memory-mapped files when asked for.

    Attributes:
        folder, kind, prompts, guidance: of the job. schedule, kernel: how its steps were drawn.
        steps: where there are candidates.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.kind: Kind = settings["kind"]
        self.prompts: list[str] = settings["prompts"]
        self.guidance: float = settings["guidance"]
        self.schedule = Schedule(read_tensors(folder / COMMON)["times"])
        self.kernel = Kernel(**settings["kernel"])
        window = settings["window"]
        self.sampler = Sampler(self.schedule, self.kernel, window and tuple(window), settings["batch_size"])
        self._files: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def open(cls, folder: Path, key: str) -> RolloutStore:
        """Open a complete folder; no latents are read yet.

        Raises:
            CorruptShard: it is incomplete or damaged, or belongs to another key.
        """
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            settings = index["settings"]
        except (OSError, ValueError, KeyError) as error:
            raise CorruptShard(
                f"{folder} holds no complete rollouts ({type(error).__name__} in {INDEX}). Start training again: "
                "they are continued where they stopped."
            ) from error
        for name in [
            COMMON,
            *(_shard(i) for i, _ in enumerate(chunks(len(settings["prompts"]), PROMPTS_PER_SHARD))),
        ]:
            read_metadata(folder / name, key)
        return cls(folder, settings)

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def rewards(self) -> Tensor:
        """Rewards of the final pictures `[N, K]` (`candidates`: `[N, 1]`)."""
        return self._all("rewards")

    @cached_property
    def scores(self) -> Tensor:
        """Scores of the candidates `[N, n, K]`."""
        return self._all("scores")

    @cached_property
    def steps(self) -> list[int]:
        """The n steps that have candidates."""
        return self._tensors(_shard(0))["steps"].tolist()

    def read(self, name: str, prompt: int) -> Tensor:
        """A stored tensor of one prompt.

        Args:
            name: `latents` `[K, S + 1, C, h, w]`, `log_probs` `[K, S]`, `seeds` `[K]`, `rewards` `[K]`; K is 1 for
                `candidates`, which add `candidates` `[n, K, C, h, w]` and `scores` `[n, K]`.
        """
        shard, row = divmod(prompt, PROMPTS_PER_SHARD)
        return self._tensors(_shard(shard))[name][row]

    def told(self, prompts: Sequence[int]) -> Told:
        """What the network was told for prompts, by number."""
        rows = []
        for prompt in prompts:
            shard, row = divmod(prompt, PROMPTS_PER_SHARD)
            tensors = self._tensors(_shard(shard))
            rows.append({n[5:]: v[row] for n, v in tensors.items() if n.startswith("cond.")})
        cond = Conditioning(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        if not self._tensors(_shard(0))["guided"].item():
            return Told(cond)
        blank = {n[7:]: v for n, v in self._tensors(COMMON).items() if n.startswith("uncond.")}
        other = Conditioning(**{n: v.expand(len(rows), *v.shape[1:]) for n, v in blank.items()})
        return Told(cond, other, self.guidance)

    def rollout(self, prompts: Sequence[int]) -> Rollout:
        """The trajectories of prompts, K rows each in a row, as they were drawn."""
        latents = torch.cat([self.read("latents", prompt) for prompt in prompts]).transpose(0, 1)
        log_probs = torch.cat([self.read("log_probs", prompt) for prompt in prompts]).transpose(0, 1)
        seeds = [seed for prompt in prompts for seed in self.read("seeds", prompt).tolist()]
        told = self.told(prompts).repeat(len(seeds) // len(prompts))
        return Rollout(latents, log_probs, told, self.sampler, tuple(seeds))

    def _all(self, name: str) -> Tensor:
        count = -(-len(self) // PROMPTS_PER_SHARD)
        return torch.cat([self._tensors(_shard(number))[name] for number in range(count)])

    def _tensors(self, name: str) -> dict[str, Tensor]:
        if name not in self._files:
            self._files[name] = read_tensors(self.folder / name)
        return self._files[name]


def _trajectories(
    backbone: Backbone, job: RolloutJob, prompts: Sequence[str], reward: Any
) -> dict[str, Tensor]:
    told = tell(backbone, prompts, job.guidance)
    seeds = [seed for prompt in prompts for seed in job.seeds(prompt)]
    starts = [seed for prompt in prompts for seed in job.starts(prompt)]
    drawn = rollout(backbone, told.repeat(job.samples), job.sampler, seeds, starts=starts)
    return _stored(backbone, drawn, told, prompts, reward, job.samples)


def _candidates(
    backbone: Backbone, job: RolloutJob, prompts: Sequence[str], reward: Any
) -> dict[str, Tensor]:
    told = tell(backbone, prompts, job.guidance)
    if isinstance(reward, StepReward):
        score = step_aware(reward, prompts)
    else:
        score = predicted_picture(backbone, told, prompts, judge_of(reward), job.sampler.batch_size)
    drawn = candidate_rollout(
        backbone,
        told,
        job.sampler,
        [job.seeds(prompt)[0] for prompt in prompts],
        candidates=job.samples,
        score=score,
        steps=job.steps,
    )
    tensors = _stored(backbone, drawn.rollout, told, prompts, reward, 1)
    candidates, scores = drawn.candidates.transpose(0, 1), drawn.scores.transpose(0, 1)
    tensors |= {"candidates": candidates.contiguous(), "scores": _finite(scores).contiguous()}
    return tensors | {"steps": torch.tensor(drawn.steps)}


def _stored(
    backbone: Backbone, drawn: Rollout, told: Told, prompts: Sequence[str], reward: Any, samples: int
) -> dict[str, Tensor]:
    """Tensors of a shard, prompts first."""
    judge, size = judge_of(reward), drawn.sampler.batch_size
    each = [prompt for prompt in prompts for _ in range(samples)]
    with torch.no_grad():
        parts = [
            judge(backbone.decode(drawn.clean[part.start : part.stop]), each[part.start : part.stop])
            for part in chunks(len(drawn), size)
        ]
    shape = (len(prompts), samples)
    conditioning = told.conditioning.to("cpu").tensors()
    return {
        "latents": drawn.latents.transpose(0, 1).unflatten(0, shape).contiguous(),
        "log_probs": drawn.log_probs.T.unflatten(0, shape).contiguous(),
        "rewards": _finite(torch.cat([part.float().cpu() for part in parts])).reshape(shape),
        "seeds": torch.tensor(drawn.seeds).reshape(shape),
        "guided": torch.tensor(told.unconditional is not None),
        **{f"cond.{name}": value.contiguous() for name, value in conditioning.items()},
    }


def judge_of(reward: Any) -> Judge:
    """The mean score of a reward as a function of pictures and prompts."""
    return lambda pictures, prompts: reward.score(pictures, prompts).mean


def _finite(scores: Tensor) -> Tensor:
    if not scores.isfinite().all():
        raise DiffalignError(
            "the reward gave scores that are not finite; expected numbers. Look at pictures of the model with "
            "`diffalign generate` and `diffalign score`, or use another trainer.reward."
        )
    return scores


def _shard(number: int) -> str:
    return f"rollouts-{number:05d}.safetensors"
