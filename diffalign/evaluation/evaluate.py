"""Evaluate a run: pictures of base and tuned model from the same noise, scores, intervals, a report."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diffalign.backbones import model_fingerprint, open_backbone
from diffalign.config import EvaluationConfig, ModelConfig, RunConfig, load_run_config
from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import compare
from diffalign.evaluation.history import held_out_metrics, read_history
from diffalign.evaluation.pictures import (
    Pictures,
    Progress,
    Settings,
    generate_pictures,
    silent,
    weights_fingerprint,
)
from diffalign.evaluation.prompts import EvalPrompt, read_prompts, with_seeds
from diffalign.evaluation.report import write_report
from diffalign.evaluation.result import Evaluation, save_evaluation
from diffalign.rewards import load_reward
from diffalign.validation import validate_section
from diffalign.versions import versions


def evaluate_run(
    run_folder: str | Path,
    against: str | None = None,
    *,
    prompts: str | None = None,
    num: int | None = None,
    rewards: Sequence[str] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    seeds_per_prompt: int = 1,
    checkpoint: str = "final",
    device: str | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Compare a run with the model it started from (or with `against`) and write what came out.

    What is not given is taken from the run's `evaluation` section. Writes `evaluation.json`, `report.html`,
    `comparison.png` and `evaluation/scores.jsonl` into the run folder. Pictures are kept, of the base in the
    cache folder and of the tuned model in the run, so that a stopped evaluation goes on.

    Args:
        against: another run folder, a hub id or a model folder; None or `base`: the untuned model of the run.
        checkpoint: folder of the weights inside the run, such as `final` or `checkpoints/step-000500`.

    Raises:
        DiffalignError: not a run, no such weights, bad prompts or rewards, or nothing to measure.
    """
    run = Path(run_folder)
    config = load_run_config(run)
    options = _options(
        config.evaluation,
        dict(prompts=prompts, num_prompts=num, rewards=rewards and list(rewards), steps=steps,
             guidance=guidance, batch_size=batch_size, seed=seed),
    )  # fmt: skip
    scorers = [load_reward(name) for name in options.rewards]
    rows = with_seeds(read_prompts(str(options.prompts), options.num_prompts), options.seed, seeds_per_prompt)
    weights = weights_file(run, checkpoint)
    against = None if against == "base" else against
    maker = _Maker(
        rows, Settings(options.steps, options.guidance, options.batch_size), _device(device), progress
    )
    base, tuned = _both_pictures(maker, run, config, weights, against)
    evaluation = Evaluation(
        compare(base, tuned, rows, scorers, progress=progress),
        base,
        tuned,
        _settings(options, seeds_per_prompt, checkpoint, against or config.model.path),
        held_out_metrics(read_history(run)),
    )
    save_evaluation(run, evaluation)
    write_report(run, evaluation)
    return evaluation


def weights_file(run_folder: Path, checkpoint: str) -> Path:
    """The trained weights of a run.

    Raises:
        DiffalignError: there are none; checkpoints that exist are named.
    """
    path = run_folder / checkpoint / "trainable.safetensors"
    if not path.is_file():
        found = sorted(
            p.parent.relative_to(run_folder).as_posix() for p in run_folder.glob("**/trainable.safetensors")
        )
        hint = f"Found: {', '.join(found)}; choose one as checkpoint." if found else "Train the run first."
        raise DiffalignError(f"{run_folder} has no weights at {checkpoint}/trainable.safetensors. {hint}")
    return path


@dataclass(frozen=True)
class _Maker:
    """What to generate, and how."""

    rows: list[EvalPrompt]
    settings: Settings
    device: str
    progress: Progress

    def open(self, config: RunConfig) -> Any:
        return open_backbone(config.model, device=self.device, parts="all", resolution=config.data.resolution)

    def make(self, backbone: Any, folder: Path, fingerprint: str, label: str) -> Pictures:
        return generate_pictures(
            backbone,
            self.rows,
            self.settings,
            folder,
            fingerprint=fingerprint,
            label=label,
            progress=self.progress,
        )


def _both_pictures(
    maker: _Maker, run: Path, config: RunConfig, weights: Path, against: str | None
) -> tuple[Pictures, Pictures]:
    """Base and tuned pictures; without `against` one model gives both, the base before the weights go in."""
    kept = Path(config.data.cache_dir) / "pictures"
    if against is not None:
        base = _other_pictures(maker, config, against, kept)
        backbone = maker.open(config)
    else:
        backbone = maker.open(config)
        base = _untuned_pictures(maker, backbone, config.model, kept)
    backbone.load_trainable_state(load_file(weights))
    tuned = maker.make(
        backbone,
        run / "evaluation" / "pictures",
        _fingerprint(backbone, config.model, False),
        "tuned pictures",
    )
    return base, tuned


def _untuned_pictures(maker: _Maker, backbone: Any, model: ModelConfig, folder: Path) -> Pictures:
    """Pictures of a model as it was opened: adapters switched off, or full weights not yet replaced."""
    frozen: AbstractContextManager[Any] = backbone.reference() if model.tune == "lora" else nullcontext()
    with frozen:
        return maker.make(backbone, folder, _fingerprint(backbone, model, True), "base pictures")


def _other_pictures(maker: _Maker, config: RunConfig, against: str, folder: Path) -> Pictures:
    """Pictures of another run or of another model."""
    if (Path(against) / "config.yaml").is_file():
        other = load_run_config(against)
        weights = weights_file(Path(against), "final")
        backbone = maker.open(other)
        backbone.load_trainable_state(load_file(weights))
        pictures = maker.make(backbone, folder, _fingerprint(backbone, other.model, False), "base pictures")
    else:
        model = ModelConfig(path=against, precision=config.model.precision, attention=config.model.attention)
        backbone = maker.open(config.model_copy(update={"model": model}))
        pictures = _untuned_pictures(maker, backbone, model, folder)
    del backbone
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return pictures


def _fingerprint(backbone: Any, model: ModelConfig, untuned: bool) -> str:
    """Key of everything that shapes a picture besides prompt, seed, steps and guidance."""
    adapters = (
        [name for name, _ in backbone.trainable_parameters()] if untuned and model.tune == "lora" else []
    )
    weights = weights_fingerprint(backbone.core, adapters)
    kind = f"{backbone.dtype}-{torch.device(backbone.device).type}-{backbone.resolution}"
    return f"{model_fingerprint(model)}-{weights}-{kind}"


def _options(config: EvaluationConfig, given: dict[str, Any]) -> EvaluationConfig:
    values = config.model_dump() | {key: value for key, value in given.items() if value is not None}
    options: EvaluationConfig = validate_section(EvaluationConfig, values, "evaluation")
    if not options.prompts:
        raise DiffalignError("no prompts to evaluate on; expected scenes:held-out or a prompt file")
    if not options.rewards:
        raise DiffalignError("no reward to evaluate by; expected at least one, such as scenes-judge")
    return options


def _settings(options: EvaluationConfig, seeds_per_prompt: int, checkpoint: str, base: str) -> dict[str, Any]:
    used = options.model_dump(include={"prompts", "num_prompts", "steps", "guidance", "seed", "rewards"})
    return {
        **used,
        "seeds_per_prompt": seeds_per_prompt,
        "base": base,
        "checkpoint": checkpoint,
        "interval": "95 % paired bootstrap over prompts",
        "versions": versions(),
    }


def _device(name: str | None) -> str:
    return name or ("cuda" if torch.cuda.is_available() else "cpu")
