"""Puts a reward-model run together: embeddings or pictures, head, validation, and the files of the finished model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from diffalign.backbones.loading import choose_precision
from diffalign.config import DataConfig, RunConfig, trainer_class, trainer_config
from diffalign.data.features import JudgedPairs, open_store
from diffalign.data.judged import ANYBODY, judgements
from diffalign.data.records import Records, files_identity
from diffalign.data.sources import open_held_out, open_records
from diffalign.engine.assembly import Ingredients
from diffalign.engine.parallel import Parallel
from diffalign.errors import DiffalignError
from diffalign.evaluation.calibration import Share, answers, validate_preferences
from diffalign.evaluation.calibration_charts import margin_chart, reliability_diagram
from diffalign.progress import Reporter
from diffalign.randomness import Draw
from diffalign.rewards.clip_model import ClipModel, load_clip
from diffalign.rewards.heads import PALHead, build_head, spec_to_dict
from diffalign.rewards.preference_head import DESCRIPTION, RewardNetwork, clip_source
from diffalign.trainers.reward_model import pair_scores
from diffalign.versions import versions

PAIRS_PER_CALL = 512
PICTURE_PAIRS_PER_CALL = 32


class ScorerBackbone:
    """A reward network as the engine tunes it."""

    def __init__(self, network: RewardNetwork) -> None:
        self.core = network
        self.network: nn.Module = network
        self.dtype = network.precision

    def trainable_parameters(self) -> list[tuple[str, Parameter]]:
        """Names and parameters of everything that is trained."""
        return [(name, p) for name, p in self.core.named_parameters() if p.requires_grad]

    def trainable_state(self) -> dict[str, Tensor]:
        """Trained weights by name, sharing memory with the network."""
        return {name: p.detach() for name, p in self.trainable_parameters()}


@dataclass
class Predictions:
    """What a model says about N pairs.

    Fields:
        scores: `[M, N, 2, K]`. variance: the margin's own `[M, N, K]`, or None. preference: `[N, K]`.
    """

    scores: Tensor
    variance: Tensor | None
    preference: Tensor

    @property
    def margin(self) -> Tensor:
        """`[M, N, K]`."""
        return self.scores[:, :, 0] - self.scores[:, :, 1]


@dataclass
class Validation:
    """Measures the current weights on pairs that are not trained on, and keeps the newest result for the files."""

    trainer: Any
    core: RewardNetwork
    pairs: JudgedPairs | None
    dimensions: tuple[str, ...]
    device: torch.device
    result: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> dict[str, float]:
        """Numbers for the log; all of them, with bins and intervals, stay in `result`."""
        if self.pairs is None:
            return {}
        found = predict(self.trainer, self.core, self.pairs, self.device)
        self.result = validation_result(self.trainer, found, self.dimensions)
        self.result["untrained_clip"] = _untrained(self.pairs)
        if isinstance(self.core.head, PALHead):
            mean = predict(self.trainer, self.core, self.pairs, self.device, anybody=True)
            self.result["population"] = validation_result(self.trainer, mean, self.dimensions)["dimensions"]
        return dict(_logged(self.result))


def assemble_scorer(config: RunConfig, parallel: Parallel, reporter: Reporter) -> Ingredients:
    """The parts of a reward-model run; embeddings are computed on first use, by the first process.

    Raises:
        DiffalignError: bad CLIP or data, or options that only generators have.
    """
    refuse_generator_options(config)
    options, kind = trainer_config(config), trainer_class(config)
    clip = ClipOnce(config, parallel.device)
    train, held_out = open_judged(config, clip, parallel.is_main, reporter)
    network = build_network(config, clip, train).to(parallel.device)
    backbone = ScorerBackbone(network)
    trainer = kind(options, backbone, config.seed)
    trainer.prepare(train)
    device, measured = parallel.device, held_out or train
    validation = Validation(trainer, network, held_out, kind.dimensions(options), device)
    return Ingredients(
        backbone,
        trainer,
        train,
        None if held_out is None else validation,
        export=lambda folder: write_description(
            folder, config, predict(trainer, network, measured, device), network
        ),
        summary=_summary(config, options, train),
        report=lambda: write_validation(config.folder, validation.result),
    )


class ClipOnce:
    """Loads the frozen CLIP when first called, and gives the same one afterwards."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.path, self.device = config.model.path, device
        self._clip: ClipModel | None = None

    def __call__(self) -> ClipModel:
        """The CLIP."""
        if self._clip is None:
            self._clip = load_clip(clip_source(self.path)).to(self.device)
        return self._clip

    @property
    def identity(self) -> str:
        """Changes whenever the CLIP's files may have changed."""
        source = clip_source(self.path)
        place = Path(source.partition("@")[2] or source.removeprefix("local-dir:"))
        found = sorted(place.rglob("*")) if place.is_dir() else [place] if place.is_file() else []
        return files_identity([file for file in found if file.is_file()], source)


def open_judged(
    config: RunConfig, clip: ClipOnce, builder: bool, reporter: Reporter | None = None
) -> tuple[JudgedPairs, JudgedPairs | None]:
    """Training pairs and held-out pairs (None when there are none), embedded where still missing.

    Raises:
        DiffalignError: bad data, or a full disk.
    """
    heads_only = config.model.tune == "head"
    dimensions = trainer_class(config).dimensions(trainer_config(config))

    # Controls belong to training; held-out pairs are measured as they are.
    plain = config.data.model_copy(update={"labels": "given", "flipped": 0.0})

    def opened(records: Records, names: tuple[str, ...] | None, data: DataConfig) -> JudgedPairs:
        judged = judgements(records, data, dimensions, names, config.seed)
        if heads_only:
            return JudgedPairs(open_store(records, data, clip.identity, clip, reporter, builder), judged)
        return JudgedPairs(open_store(records, data, progress=reporter, builder=builder), judged)

    train = opened(open_records(config.data), None, config.data)
    held_out = open_held_out(config.data)
    return train, None if held_out is None else opened(held_out, train.judgements.names, plain)


def build_network(config: RunConfig, clip: ClipOnce, pairs: JudgedPairs) -> RewardNetwork:
    """The head on embeddings, or on a CLIP that is trained with it."""
    options, kind = trainer_config(config), trainer_class(config)
    names = pairs.judgements.names
    if config.model.tune == "head":
        scale = math.exp(pairs.store.logit_scale)
        return RewardNetwork(build_head(kind.spec(options, pairs.store.width, scale, names, config.seed)))
    tower = clip()
    width, scale = int(tower.embed_texts(["a"]).shape[-1]), float(tower.logit_scale.exp())
    tower.requires_grad_(True)
    # The head has a scale of its own.
    tower.logit_scale.requires_grad_(False)
    precision = choose_precision(config.model.precision, clip.device)
    head = build_head(kind.spec(options, width, scale, names, config.seed))
    return RewardNetwork(head, tower, precision)


@torch.no_grad()
def predict(
    trainer: Any, network: RewardNetwork, pairs: JudgedPairs, device: torch.device, *, anybody: bool = False
) -> Predictions:
    """Scores of all pairs without dropout.

    Args:
        anybody: in the eyes of the population's mean instead of each pair's own user.
    """
    rows = PAIRS_PER_CALL if pairs.store.texts is not None else PICTURE_PAIRS_PER_CALL
    means, spreads, labels = [], [], []
    mode = network.training
    network.eval()
    for start in range(0, len(pairs), rows):
        index = range(start, min(start + rows, len(pairs)))
        batch = pairs.fetch(Draw(0, 0, index, index, len(pairs))).to(device)
        if anybody:
            batch = replace(batch, users=torch.full_like(batch.users, ANYBODY))
        mean, log_std = pair_scores(network, batch)
        means.append(mean.float().cpu())
        labels.append(batch.preference.cpu())
        if log_std is not None:
            spreads.append((2 * log_std).exp().sum(2).float().cpu())
    network.train(mode)
    return Predictions(torch.cat(means, 1), torch.cat(spreads, 1) if spreads else None, torch.cat(labels))


def validation_result(trainer: Any, found: Predictions, dimensions: tuple[str, ...]) -> dict[str, Any]:
    """Accuracy, calibration and the worth of the uncertainty, per dimension; and each member's accuracy."""
    result: dict[str, Any] = {}
    margin, variance = found.margin, found.variance
    probability = trainer.probability(margin, variance)
    for k, name in enumerate(dimensions):
        m, v = margin[..., k], None if variance is None else variance[..., k]
        result[name] = validate_preferences(
            _array(m.mean(0)),
            _array(probability[..., k].mean(0)),
            _array(found.preference[:, k]),
            _spreads(m, v),
        )
    preference = _array(found.preference[:, 0])
    members = [answers(_array(row), preference)[0] for row in probability[..., 0]]
    return {"dimensions": result, "members": [float(right.mean()) for right in members]}


def write_description(folder: Path, config: RunConfig, found: Predictions, network: RewardNetwork) -> None:
    """`reward.json`: what `TrainedReward` needs beside the weights."""
    scores = found.scores.flatten(1, 2)
    facts = {
        "name": config.name,
        "head": spec_to_dict(network.head.spec),
        "dimensions": list(getattr(network.head.spec, "dimensions", ("overall",))),
        "clip": config.model.path,
        "trained_clip": network.clip is not None,
        "location": scores.mean(1).tolist(),
        "spread": scores.std(1).clamp(min=1e-6).tolist(),
        "versions": versions(),
    }
    (folder / DESCRIPTION).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def write_validation(folder: Path, result: dict[str, Any]) -> None:
    """`validation.json`, and a reliability diagram and a margin chart per dimension."""
    if not result:
        return
    (folder / "validation.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    for name, values in result["dimensions"].items():
        reliability_diagram(values, folder / f"reliability-{name}.png", name)
        margin_chart(values, folder / f"margin-{name}.png", f"{name}: accuracy against margin")


def refuse_generator_options(config: RunConfig) -> None:
    """Options that a reward model has no use for must not be set in vain.

    Raises:
        DiffalignError: one is set.
    """
    idle = {
        "model": ("revision", "variant", "vae", "attention", "compile", "gradient_checkpointing"),
        "data": ("flip",),
    }
    for section, names in idle.items():
        values = getattr(config, section)
        for name in names:
            if getattr(values, name) != type(values).model_fields[name].default:
                raise DiffalignError(
                    f"{section}.{name} is {getattr(values, name)!r}, but a reward model does not use it; remove it"
                )


def _spreads(margin: Tensor, variance: Tensor | None) -> dict[str, Any]:
    """Uncertainties `[N]` of margins `[M, N]`: members against each other, what they state, and both.

    `..._relative` is the deviation over |mean margin|: a small disagreement matters where the margin is small, too.
    """
    found: dict[str, Tensor] = {}
    if len(margin) > 1:
        found["ensemble"] = margin.var(0).sqrt()
    if variance is not None:
        found["stated"] = variance.mean(0).sqrt()
    if len(found) == 2:
        found["both"] = torch.hypot(found["ensemble"], found["stated"])
    size = margin.mean(0).abs().clamp(min=1e-12)
    relative = {f"{name}_relative": value / size for name, value in found.items()}
    return {name: _array(value) for name, value in {**found, **relative}.items()}


def _logged(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What goes into `metrics.jsonl`."""
    for place, (name, values) in enumerate(result["dimensions"].items()):
        end = f"_{name}" if place else ""
        yield f"held_out/accuracy{end}", values["accuracy"]["value"]
        yield f"held_out/log_loss{end}", values["log_loss"]
        yield f"held_out/calibration_error{end}", values["ece"]
        for kind, halves in values["halves"].items():
            yield f"held_out/certain_gain_{kind}{end}", halves["difference"]


def _untrained(pairs: JudgedPairs) -> dict[str, Any] | None:
    """Accuracy of the CLIP's own similarity on the same pairs, where its embeddings are at hand."""
    if pairs.store.texts is None:  # fetching all pictures at once would take their memory
        return None
    batch = pairs.fetch(Draw(0, 0, range(len(pairs)), range(len(pairs)), len(pairs)))
    assert batch.texts is not None
    similarity = (batch.images * batch.texts).sum(-1)
    margin = (similarity[:, 0] - similarity[:, 1]) * math.exp(pairs.store.logit_scale)
    right, _ = answers(_array(margin.sigmoid()), _array(batch.preference[:, 0]))
    return asdict(Share.of(right))


def _summary(config: RunConfig, options: Any, pairs: JudgedPairs) -> str:
    shown = ", ".join(f"{name} {value}" for name, value in options.model_dump().items() if name != "method")
    users = len(pairs.judgements.names)
    what = (
        f"heads on {pairs.store.width} embeddings of" if config.model.tune == "head" else "heads and all of"
    )
    return (
        f"{config.trainer['method']}: {shown}\n{what} {config.model.path}; "
        f"{users} known users, {len(pairs.broken)} images left out"
    )


def _array(values: Tensor) -> Any:
    return values.double().cpu().numpy()
