"""The result of an evaluation and the files it leaves in the run folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.evaluation.compare import Comparison, Images
from diffalign.evaluation.drift import Drift
from diffalign.evaluation.examples import as_rows, random_rows
from diffalign.evaluation.grids import comparison_grid
from diffalign.evaluation.lost import Lost, find_lost
from diffalign.evaluation.set_metrics import SetMetric
from diffalign.evaluation.side_effects import SideEffect


@dataclass(frozen=True)
class Evaluation:
    """An evaluated run: the comparison, its pictures, how they were made, the last held-out measurements.

    Fields:
        warnings: what a reader must know before believing the numbers. side_effects, sets: by name.
        drift: distance of the tuned model from the base, None when it was not measured.
    """

    comparison: Comparison
    base: Images
    tuned: Images
    settings: dict[str, Any]
    held_out: dict[str, float]
    warnings: list[str] = field(default_factory=list)
    side_effects: dict[str, SideEffect] = field(default_factory=dict)
    drift: Drift | None = None
    sets: dict[str, SetMetric] = field(default_factory=dict)

    @property
    def lost(self) -> Lost:
        """What got worse."""
        return find_lost(self.comparison)

    def as_json(self) -> dict[str, Any]:
        """The content of `evaluation.json`."""
        return {
            "warnings": self.warnings,
            **self.comparison.as_json(),
            "sets": {name: metric.as_json() for name, metric in self.sets.items()},
            "side_effects": {name: effect.as_json() for name, effect in self.side_effects.items()},
            "drift": self.drift and self.drift.as_json(),
            "lost": self.lost.as_json(self.comparison),
            "implicit_accuracy": implicit_summary(self.held_out),
            "settings": self.settings,
        }


def save_evaluation(run_folder: Path, evaluation: Evaluation) -> None:
    """Write `evaluation.json`, `comparison.png` (12 random prompts) and `evaluation/scores.jsonl`."""
    comparison = evaluation.comparison
    details = run_folder / "evaluation"
    details.mkdir(parents=True, exist_ok=True)
    write_text(run_folder / "evaluation.json", json.dumps(evaluation.as_json(), indent=2, allow_nan=False))
    lines = (json.dumps(_score_line(comparison, i)) for i in range(len(comparison.prompts)))
    write_text(details / "scores.jsonl", "\n".join(lines) + "\n")
    shown = as_rows(comparison, evaluation.base, evaluation.tuned, random_rows(comparison, 12))
    comparison_grid(shown).save(run_folder / "comparison.png")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def implicit_summary(held_out: dict[str, float]) -> dict[str, Any] | None:
    """Implicit accuracy with interval and number of pairs, None when it was not measured."""
    if "implicit_accuracy" not in held_out:
        return None
    bounds = [held_out.get(f"implicit_accuracy_{side}") for side in ("low", "high")]
    return {"value": held_out["implicit_accuracy"], "interval": bounds, "n": held_out.get("pairs")}


def _score_line(comparison: Comparison, i: int) -> dict[str, Any]:
    prompt = comparison.prompts[i]
    scores = {
        name: [float(s.base[i]), float(s.tuned[i])] for name, s in comparison.scores.items() if s.scored[i]
    }
    return {"prompt": prompt.text, "category": prompt.category, "seed": prompt.seed, "scores": scores}
