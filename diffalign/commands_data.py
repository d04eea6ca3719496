"""What the commands under `diffalign data` do that make new data: labels, pairs from samples, captions."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffalign.backbones import model_fingerprint
from diffalign.commands import open_for_pictures, reward_specs
from diffalign.data.captioning import Captioned, caption_records
from diffalign.data.chances import Array
from diffalign.data.from_samples import Sample, pairs_of, rank_samples, score_samples, write_samples
from diffalign.data.from_samples import summary as samples_summary
from diffalign.data.pair_rules import Ranks, Selection
from diffalign.data.records import TIE
from diffalign.data.relabel import (
    Feedback,
    Options,
    feedback,
    predicted_labels,
    relabel,
    score_records,
    summary,
    write_relabelled,
)
from diffalign.data.score_log import Scorer
from diffalign.data.sources import open_source
from diffalign.errors import DiffalignError
from diffalign.evaluation.calibration import validate_preferences
from diffalign.evaluation.independence import REWARD_FILES, shared_backbones
from diffalign.evaluation.pictures import Settings, generate_pictures, weights_fingerprint
from diffalign.evaluation.prompts import read_prompts, with_seeds
from diffalign.evaluation.scoring import unique_names
from diffalign.evaluation.statistics import wilson
from diffalign.progress import Reporter
from diffalign.rewards import Reward, load_reward, place
from diffalign.rewards.guard import Guarded, ask

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class Making:
    """Which pictures are made: K per prompt; what is None comes from the run, or the usual values."""

    model: str
    prompts: str
    per_prompt: int = 4
    num: int | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    batch_size: int | None = None
    resolution: int | None = None


def relabel_command(
    source: str,
    rewards: Sequence[str],
    out: Path,
    options: Options,
    *,
    split: str = "train",
    format: str = "auto",
    pairs: str = "all",
    limit: int | None = None,
    batch_size: int = 16,
    on_error: OnError = "raise",
    dry_run: bool = False,
) -> None:
    """Score pairs, print what the rewards think of the labels, and write the new set unless it is a dry run."""
    specs = reward_specs(rewards) or []
    records = open_source(source, split, format, limit, pairs)
    scorers = _scorers(specs, on_error)
    with Reporter(Console(stderr=True)) as reporter:
        log = score_records(records, _callables(scorers), out, _about(specs), batch_size, reporter)
    given = np.array([row.label_0 for row in records.rows])
    said = feedback(log, given, options)
    settings = {"source": source, "split": split, "rewards": specs, **asdict(options)}
    result = relabel(records, said, options, settings)
    report = summary(result)
    console = Console()
    for warning in shared_backbones(list(scorers.values())):
        console.print(f"[bold yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    console.print(relabel_table(report, said, given))
    if dry_run:
        _say(console, f"no pairs written; the scores are kept in {out}")
        return
    write_relabelled(out, split, records, result)
    _say(console, f"{report['written']} pairs in {out}; train with data.source={out}")


def relabel_table(report: Mapping[str, Any], said: Feedback, given: Array) -> Table:
    """Counts per action, agreement before and after, and the calibration."""
    table = Table(title=escape(str(report["source"])), show_header=False)
    total = max(report["pairs"], 1)
    table.add_row("pairs", f"{report['pairs']:,} ({report['ties']:,} ties)")
    table.add_row("written", f"{report['written']:,}")
    table.add_section()
    for action, count in report["actions"].items():
        table.add_row(escape(action), f"{count:,} ({count / total:.1%})")
    table.add_section()
    table.add_row("labels agree with the rewards", _share(report["agreement"]))
    table.add_row("  afterwards", _share(report["agreement_after"]))
    for label, value in _calibration(said, given):
        table.add_row(label, value)
    if report["mean_weight"] is not None:
        table.add_row("mean weight", f"{report['mean_weight']:.3f}")
    return table


def _calibration(said: Feedback, given: Array) -> list[tuple[str, str]]:
    """Temperature, label noise, and how well the chances foretell the given labels."""
    fit = said.calibration
    fitted = f" (fitted on {fit.pairs:,} decided pairs)" if fit.pairs else ""
    lines = [("temperature", f"{fit.temperature:.4g}{fitted}"), ("label noise", f"{fit.label_noise:.1%}")]
    scored = np.isfinite(said.chance) & (given != TIE)
    if not scored.any():
        return lines
    told = validate_preferences(said.margin[scored], predicted_labels(said)[scored], given[scored])
    return [*lines, ("calibration error, log loss", f"{told['ece']:.3f}, {told['log_loss']:.3f}")]


def _share(agreement: Mapping[str, float]) -> str:
    """A share with its 95 % interval (Wilson)."""
    right, pairs = agreement["right"], int(agreement["pairs"])
    if not pairs:
        return "no decided pair"
    low, high = wilson(right, pairs)
    return f"{right / pairs:.1%} of {pairs:,} ({low:.1%} to {high:.1%})"


def from_samples_command(
    making: Making,
    rewards: Sequence[str],
    out: Path,
    selection: Selection,
    *,
    temperature: float | None = None,
    format: Literal["jsonl", "parquet"] = "jsonl",
    on_error: OnError = "raise",
) -> None:
    """Make K pictures per prompt, score and rank them, write pictures and pairs, print what came out."""
    specs = reward_specs(rewards) or []
    scorers = _scorers(specs, on_error)
    main = next(iter(scorers))
    with Reporter(Console(stderr=True)) as reporter:
        samples, used = _make_samples(making, out, reporter)
        log = score_samples(out, samples, _callables(scorers), _about(specs), progress=reporter)
    pictures, unscored = rank_samples(out, samples, log, main, making.model)
    pairs, counts = pairs_of(pictures, selection, temperature, making.seed)
    counts.unscored = unscored
    found = samples_summary(pictures, pairs, counts)
    console = Console()
    console.print(samples_table(found, main))
    if not pairs:
        raise DiffalignError(
            f"none of {counts.groups} prompts gave a pair ({counts.flat} with equal scores, {counts.without} left out "
            "by margin or ranks). Use more pictures per prompt, a finer reward, or looser limits."
        )
    facts = asdict(making) | used | {"rewards": specs, "label_temperature": temperature}
    target = write_samples(out, pictures, pairs, format, {**facts, **asdict(selection), **found})
    _say(console, f"{len(pairs)} pairs; train with data.source={target}")
    _say(console, f"all pictures with scores and ranks: {out / 'pictures.jsonl'}")


def _make_samples(making: Making, out: Path, reporter: Reporter) -> tuple[list[Sample], dict[str, float]]:
    """The pictures, those of an earlier call included, and the steps and guidance they were made with.

    Raises:
        DiffalignError: fewer than two pictures per prompt; no such model or prompts.
    """
    if making.per_prompt < 2:
        raise DiffalignError(f"{making.per_prompt} picture per prompt makes no pair; expected at least 2")
    rows = with_seeds(read_prompts(making.prompts, making.num), making.seed, making.per_prompt)
    backbone, usual = open_for_pictures(making.model, making.resolution)
    settings = Settings(
        making.steps or usual.steps,
        usual.guidance if making.guidance is None else making.guidance,
        making.batch_size or usual.batch_size,
    )
    made = generate_pictures(
        backbone, rows, settings, out / "pictures", fingerprint=_fingerprint(backbone), progress=reporter
    )
    del backbone  # rewards may need its memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    samples = [Sample(row.text, path) for row, path in zip(rows, made.paths, strict=True)]
    return samples, {"steps": settings.steps, "guidance": settings.guidance}


def samples_table(report: Mapping[str, Any], main: str) -> Table:
    """Counts of groups and pairs, and what picking the best gains."""
    table = Table(show_header=False)
    lines = {
        "prompts": "groups",
        "pictures": "pictures",
        "  without a score": "unscored",
        "pairs": "pairs",
        "prompts with equal scores": "flat",
        "prompts with one scored picture": "small",
        "prompts left out by margin or ranks": "without",
    }
    for label, key in lines.items():
        table.add_row(label, f"{report[key]:,}")
    table.add_section()
    for label, key in (
        (f"mean {main}", "mean_score"),
        ("mean of the best", "mean_best"),
        ("mean margin", "mean_margin"),
    ):
        if report[key] is not None:
            table.add_row(escape(label), f"{report[key]:.4g}")
    return table


def caption_command(
    source: str,
    captioner: str,
    out: Path,
    perturb: str | None = None,
    *,
    split: str = "train",
    format: str = "auto",
    pairs: str = "all",
    limit: int | None = None,
) -> None:
    """Caption the pictures of pairs, write the pairs with their captions, and print what came out."""
    records = open_source(source, split, format, limit, pairs)
    with Reporter(Console(stderr=True)) as reporter:
        done = caption_records(records, captioner, out, perturb, split, reporter)
    console = Console()
    console.print(caption_table(done))
    _say(console, f"{done.written} pairs in {out}; train with data.source={out} and trainer.captions=dual")


def caption_table(done: Captioned) -> Table:
    """Counts of pairs and captions, and why pairs were left out."""
    table = Table(show_header=False)
    table.add_row("pairs", f"{done.pairs:,}")
    table.add_row("written", f"{done.written:,}")
    table.add_row("captions that differ from the prompt", f"{done.changed:,} of {2 * done.written:,}")
    if done.broken:
        table.add_row("left out: broken picture", f"{done.broken:,}")
    if done.failed:
        table.add_row("left out: the captioner failed", f"{done.failed:,}; the next call tries them again")
    if done.reason:
        table.add_row("  the first time", escape(done.reason))
    return table


def parse_ranks(text: str | None, option: str) -> Ranks | None:
    """First and last rank from `1-3` or `2`.

    Raises:
        DiffalignError: another form.
    """
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise DiffalignError(f"{option} is {text!r}; expected ranks such as 1-3 or 2, 1 being the best")
    return int(first), int(last or first)


def parse_fitted(text: str, option: str) -> float | None:
    """A number, or None for `fit`.

    Raises:
        DiffalignError: neither.
    """
    if text == "fit":
        return None
    try:
        return float(text)
    except ValueError:
        raise DiffalignError(f"{option} is {text!r}; expected fit or a number") from None


def _scorers(specs: Sequence[str], on_error: str) -> dict[str, Reward]:
    """Rewards by name, on the machine's device.

    Raises:
        DiffalignError: none is named, or one judges sets.
    """
    if not specs:
        raise DiffalignError("no reward to score by; expected at least one, such as --rewards pickscore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rewards = [place(load_reward(spec), device) for spec in specs]
    for reward in rewards:
        if reward.kind != "sample":
            raise DiffalignError(
                f"{reward.name} judges whole sets; pictures are compared by rewards on single ones"
            )
    names = unique_names(rewards)
    return {
        name: Guarded(reward, "skip") if on_error == "skip" else reward
        for name, reward in zip(names, rewards, strict=True)
    }


def _callables(scorers: Mapping[str, Reward]) -> dict[str, Scorer]:
    return {name: partial(ask, reward) for name, reward in scorers.items()}


def _about(specs: Sequence[str]) -> dict[str, Any]:
    """What scores depend on beside the pictures."""
    return {"rewards": [_spec_key(spec) for spec in specs]}


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _spec_key(spec: str) -> str:
    """A specification with the contents of its file: scores of a changed file are other scores."""
    path = Path(spec)
    if path.suffix in REWARD_FILES and path.is_file():
        return f"{spec}\n{path.read_text(encoding='utf-8')}"
    return spec


def _fingerprint(backbone: Any) -> str:
    """Key of everything that shapes a picture besides prompt, seed, steps and guidance."""
    kind = f"{backbone.dtype}-{torch.device(backbone.device).type}-{backbone.resolution}"
    return f"{model_fingerprint(backbone.config)}-{weights_fingerprint(backbone.core)}-{kind}"
