"""Evaluate a run: pictures of base and tuned model from the same noise, scores, side effects, a report."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diffalign.backbones import model_fingerprint, open_backbone
from diffalign.config import EvaluationConfig, ModelConfig, RunConfig, load_run_config
from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import compare
from diffalign.evaluation.drift import Drift, Probe, drift, make_probe, predicted_noise, quadrature
from diffalign.evaluation.history import held_out_metrics, read_history
from diffalign.evaluation.independence import independence_warnings
from diffalign.evaluation.latent_paths import path_effects, path_lengths
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
from diffalign.evaluation.set_metrics import measure_sets
from diffalign.evaluation.side_effects import SideEffect, side_effects
from diffalign.rewards import Reward, Spec, distinct, load_reward, place
from diffalign.rewards.encoders import load_encoder
from diffalign.validation import validate_section
from diffalign.versions import versions

ENCODER = "pixels:8"
DRIFT_PICTURES = 64


def evaluate_run(
    run_folder: str | Path,
    against: str | None = None,
    *,
    prompts: str | None = None,
    num: int | None = None,
    rewards: Sequence[Spec] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    seeds_per_prompt: int = 1,
    checkpoint: str = "final",
    encoder: str = ENCODER,
    drift_pictures: int = DRIFT_PICTURES,
    istd_paths: int = 0,
    device: str | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Compare a run with the model it started from (or with `against`) and write what came out.

    What is not given is taken from the run's `evaluation` section. Writes `evaluation.json`, `report.html`,
    `comparison.png` and `evaluation/scores.jsonl` into the run folder. Pictures are kept, of the base in the
    cache folder and of the tuned model in the run, so that a stopped evaluation goes on.

    Args:
        against: another run folder, a hub id or a model folder; None or `base`: the untuned model of the run.
        rewards: specifications of scorers, the first of single pictures being the main one; those of whole sets are
            measured on all pictures at once.
        checkpoint: folder of the weights inside the run, such as `final` or `checkpoints/step-000500`.
        encoder: in which diversity is measured (`diffalign.rewards.encoders`).
        drift_pictures: base pictures behind the drift; 0 leaves it out. It needs a base with the same VAE.
        istd_paths: prompts between whose noises paths are walked for ISTD (`latent_paths`), 11 pictures each and model.

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
    device = _device(device)
    scorers = _scorers(options, device)
    samples, sets = ([one for one in scorers if one.kind == kind] for kind in ("sample", "set"))
    features: Any = load_encoder(encoder)
    place(features, device)
    rows = with_seeds(read_prompts(str(options.prompts), options.num_prompts), options.seed, seeds_per_prompt)
    weights = weights_file(run, checkpoint)
    against = None if against == "base" else against
    settings = Settings(options.steps, options.guidance, options.batch_size)
    maker = _Maker(rows, settings, device, progress, drift_pictures, istd_paths)
    made = _both_pictures(maker, run, config, weights, against)
    comparison = compare(made.base, made.tuned, rows, samples, progress=progress)
    evaluation = Evaluation(
        comparison,
        made.base,
        made.tuned,
        _settings(options, seeds_per_prompt, checkpoint, against or config.model.path) | {"encoder": encoder},
        held_out_metrics(read_history(run)),
        independence_warnings(scorers, options.rewards, config.trainer) + _skip_warnings(comparison),
        side_effects(made.base, made.tuned, rows, features, progress=progress) | made.path_effects,
        made.drift,
        measure_sets(made.base, made.tuned, rows, sets, progress=progress),
    )
    save_evaluation(run, evaluation)
    write_report(run, evaluation)
    return evaluation


def _scorers(options: EvaluationConfig, device: str) -> list[Reward]:
    """The rewards of an evaluation.

    Raises:
        DiffalignError: none of them is of single pictures.
    """
    found = distinct([place(load_reward(spec), device) for spec in options.rewards])
    if all(scorer.kind == "set" for scorer in found):
        raise DiffalignError(
            f"{', '.join(scorer.name for scorer in found)} judges whole sets of pictures only; expected at least one "
            "reward of single pictures beside it, such as scenes-judge or clip"
        )
    return found


def _skip_warnings(comparison: Any) -> list[str]:
    """How many pictures each reward left out."""
    total = 2 * len(comparison.prompts)
    return [
        f"{name} skipped {count} of {total} pictures; their pairs are left out of its numbers"
        for name, count in comparison.skipped.items()
        if count
    ]


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
    drift_pictures: int
    istd_paths: int

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

    def paths(self, backbone: Any, label: str) -> torch.Tensor | None:
        """Steps of pictures on paths between noises; None when they are not asked for."""
        if not self.istd_paths:
            return None
        return path_lengths(backbone, self.walked, self.settings, label, self.progress)

    @property
    def walked(self) -> list[EvalPrompt]:
        return spread(self.rows, self.istd_paths)

    def predict(self, backbone: Any, probe: Probe) -> torch.Tensor:
        self.progress("drift", 0, 1)
        found = predicted_noise(backbone, probe, self.settings.batch_size)
        self.progress("drift", 1, 1)
        return found


@dataclass(frozen=True)
class _Made:
    """Pictures of both models, how far apart their predictions are (None when not measured), and ISTD by name."""

    base: Pictures
    tuned: Pictures
    drift: Drift | None
    path_effects: dict[str, SideEffect]


@dataclass(frozen=True)
class _Before:
    """The base: its pictures, what it predicts for the probe, and the steps of its paths."""

    pictures: Pictures
    paths: torch.Tensor | None = None
    probe: Probe | None = None
    predicted: torch.Tensor | None = None


def _both_pictures(maker: _Maker, run: Path, config: RunConfig, weights: Path, against: str | None) -> _Made:
    """Base and tuned pictures; without `against` one model gives both, the base before the weights go in."""
    kept = Path(config.data.cache_dir) / "pictures"
    if against is not None:
        before = _other_pictures(maker, config, against, kept)
        backbone = maker.open(config)
    else:
        backbone = maker.open(config)
        before = _untuned_pictures(maker, backbone, config.model, kept)
    backbone.load_trainable_state(load_file(weights))
    fingerprint = _fingerprint(backbone, config.model, False)
    tuned = maker.make(backbone, run / "evaluation" / "pictures", fingerprint, "tuned pictures")
    paths = maker.paths(backbone, "tuned paths")
    effects = {} if before.paths is None or paths is None else path_effects(before.paths, paths, maker.walked)
    return _Made(before.pictures, tuned, _drift(maker, backbone, before), effects)


def _drift(maker: _Maker, backbone: Any, before: _Before) -> Drift | None:
    if before.probe is None or before.predicted is None:
        return None
    after = maker.predict(backbone, before.probe)
    return drift(backbone.process, before.probe, before.predicted, after, _probed(maker))


def _probed(maker: _Maker) -> list[EvalPrompt]:
    """Prompts of the drift."""
    return spread(maker.rows, maker.drift_pictures)


def spread(rows: list[EvalPrompt], most: int) -> list[EvalPrompt]:
    """At most so many prompts, evenly spread, so that every category takes part."""
    return rows[:: -(-len(rows) // most)]


def _with_probe(maker: _Maker, backbone: Any, pictures: Pictures) -> _Before:
    """Ask the base, as it stands, what it predicts for its own noised pictures, and walk its paths."""
    paths = maker.paths(backbone, "base paths")
    if maker.drift_pictures == 0:
        return _Before(pictures, paths)
    rows = _probed(maker)
    chosen = Pictures([pictures.paths[maker.rows.index(row)] for row in rows])
    times, _ = quadrature(backbone.process)
    probe = make_probe(backbone, chosen, rows, times, maker.settings.batch_size)
    return _Before(pictures, paths, probe, maker.predict(backbone, probe))


def _untuned_pictures(maker: _Maker, backbone: Any, model: ModelConfig, folder: Path) -> _Before:
    """The base as it was opened: adapters switched off, or full weights not yet replaced."""
    frozen: AbstractContextManager[Any] = (
        backbone.reference() if model.tune == "lora" else backbone.unprefixed()
    )
    fingerprint = _fingerprint(backbone, model, True)
    with frozen:
        pictures = maker.make(backbone, folder, fingerprint, "base pictures")
        return _with_probe(maker, backbone, pictures)


def _other_pictures(maker: _Maker, config: RunConfig, against: str, folder: Path) -> _Before:
    """Another run or another model as the base; its drift is measured when it is a variant of the same model."""
    if (Path(against) / "config.yaml").is_file():
        other = load_run_config(against)
        weights = weights_file(Path(against), "final")
        backbone = maker.open(other)
        backbone.load_trainable_state(load_file(weights))
        pictures = maker.make(backbone, folder, _fingerprint(backbone, other.model, False), "base pictures")
        same = (other.model.path, other.model.vae) == (config.model.path, config.model.vae)
        if same:
            before = _with_probe(maker, backbone, pictures)
        else:
            before = _Before(pictures, maker.paths(backbone, "base paths"))
    else:
        model = ModelConfig(path=against, precision=config.model.precision, attention=config.model.attention)
        backbone = maker.open(config.model_copy(update={"model": model}))
        found = _untuned_pictures(maker, backbone, model, folder)
        before = found if model.path == config.model.path else _Before(found.pictures, found.paths)
    del backbone
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return before


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
        raise DiffalignError(
            "no prompts to evaluate on; expected scenes:held-out, a prompt file or a named set"
        )
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
