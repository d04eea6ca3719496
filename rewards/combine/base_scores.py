"""What the untuned model scores: a table of its samples' scores per prompt, against which transforms compare."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Reward
from diffalign.rewards.combine.transforms import Percentile, reference_percentile, reference_std

_FORMAT = "diffalign-base-scores"
_LEAST = 2  # scores that a prompt needs before its own statistics mean anything


@dataclass
class BaseScores:
    """Scores of one reward on samples of the base model.

    A prompt with fewer than two samples, or none, falls back on the scores of all prompts together.

    Fields:
        reward: name of the reward that gave them. prompts: prompt to its scores.
    """

    reward: str
    prompts: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def collect(cls, reward: Reward, batches: Iterable[tuple[Tensor, Sequence[str]]]) -> BaseScores:
        """Score batches (media, prompts) of the base model's samples; scores that are not finite are left out."""
        table = cls(reward.name)
        for media, prompts in batches:
            with torch.no_grad():
                scores = reward.score(media, prompts).mean.tolist()
            table.add(prompts, scores)
        return table

    def add(self, prompts: Sequence[str], scores: Sequence[float]) -> None:
        """Add samples, one score per prompt of the list."""
        for prompt, score in zip(prompts, scores, strict=True):
            if math.isfinite(score):
                self.prompts.setdefault(prompt, []).append(float(score))

    def pooled(self) -> list[float]:
        """The scores of all prompts.

        Raises:
            DiffalignError: fewer than two scores in the whole table.
        """
        scores = list(chain.from_iterable(self.prompts.values()))
        if len(scores) < _LEAST:
            raise DiffalignError(
                f"the base scores of {self.reward!r} hold {len(scores)} scores; expected at least {_LEAST}. "
                "Score samples of the base model with BaseScores.collect"
            )
        return scores

    def references(self, prompts: Sequence[str]) -> Tensor:
        """Base scores for each prompt `[B, M]`, padded with NaN where a prompt has fewer than M."""
        pooled = self.pooled()
        rows = [self.prompts.get(prompt, []) for prompt in prompts]
        rows = [row if len(row) >= _LEAST else pooled for row in rows]
        width = max(map(len, rows))
        return torch.tensor([row + [math.nan] * (width - len(row)) for row in rows], dtype=torch.float32)

    def percentile(self, prompts: Sequence[str], q: float, method: Percentile = "normal") -> Tensor:
        """The q-quantile of the base scores of each prompt `[B]`."""
        return reference_percentile(self.references(prompts), q, method)

    def std(self, prompts: Sequence[str]) -> Tensor:
        """Standard deviation of the base scores of each prompt `[B]`, that of all prompts where it is 0."""
        own = reference_std(self.references(prompts))
        everywhere = torch.tensor(self.pooled()).std()
        return torch.where(own > 0, own, everywhere)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, beside and then renamed."""
        path = Path(path)
        content = {"format": _FORMAT, "version": 1, "reward": self.reward, "prompts": self.prompts}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> BaseScores:
        """Read a table.

        Raises:
            DiffalignError: no such file, or not a table of base scores.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DiffalignError(f"cannot read base scores {str(path)!r}: {error.strerror}") from error
        except ValueError as error:
            raise DiffalignError(f"base scores {str(path)!r} are not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("version") != 1:
            raise DiffalignError(
                f"{str(path)!r} is not a table of base scores (format {_FORMAT!r}, version 1); "
                "make one with BaseScores.collect(...).save(...)"
            )
        table = cls(str(content["reward"]))
        for prompt, scores in content["prompts"].items():
            table.add([prompt] * len(scores), scores)
        return table
