"""What the method matrix holds: methods, backbones, how each method is set on each backbone, and the tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.relabelled import relabelled_name, wrong_share


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Fields:
        recipe: of `configs/`. overrides: on top of the recipe, on every backbone.
        per_backbone: further overrides by backbone. not_for: backbones where it makes no sense, with the reason.
    """

    recipe: str
    overrides: Mapping[str, object] = field(default_factory=dict)
    per_backbone: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    not_for: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run: a method on a backbone with a seed, and with labels flipped by a share."""

    method: str
    backbone: str
    seed: int
    recipe: str
    overrides: Mapping[str, object]
    flipped: float = 0.0

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        noise = f"-flip{round(100 * self.flipped)}" if self.flipped else ""
        method = self.method.replace(", ", "-").replace(" + ", "-").replace(" ", "-")
        return f"{method}-{self.backbone}-s{self.seed}{noise}"


BACKBONES: Mapping[str, Mapping[str, object]] = {
    "tiny-sdxl": {"model.path": "scenes:tiny-sdxl", "model.precision": "bf16"},
    "tiny-lcm": {
        "model.path": "scenes:tiny-lcm",
        "model.precision": "bf16",
        "model.guidance_embedding": 4,
        "evaluation.steps": 4,
    },
    "tiny-sd3": {"model.path": "scenes:tiny-sd3", "model.precision": "bf16"},
}
"""Backbones of the columns, with what every method needs on them."""

DPO = "scenes/dpo"


# The first step of a consistency model decides the picture, where errors of the noise are tiny.
MARGIN_OPTIONS: Mapping[str, Mapping[str, object]] = {
    "tiny-lcm": {"trainer.beta_weighting": "velocity_space", "trainer.beta": 20, "optim.lr": 1e-3},
    "tiny-sd3": {"trainer.time_weighting": "logit_normal", "trainer.beta": 250},
}
# A consistency model's own steps, as many as its evaluation takes.
FEW_STEPS: Mapping[str, Mapping[str, object]] = {"tiny-lcm": {"trainer.rollouts.steps": 4}}


def on_dpo(**options: object) -> Method:
    """A loss on the Diffusion-DPO margin: the recipe of DPO with other trainer options."""
    return Method(DPO, {f"trainer.{name}": value for name, value in options.items()}, MARGIN_OPTIONS)


METHODS: Mapping[str, Method] = {
    "dpo": on_dpo(),
    "ipo": on_dpo(loss="ipo"),
    "cdpo": on_dpo(label_smoothing=0.1),
    "rdpo": on_dpo(label_flip=0.1),
    "hinge": on_dpo(loss="hinge"),
    "exo": on_dpo(loss="exo", label_smoothing=0.01),
    "sppo": on_dpo(loss="sppo"),
    "nca": on_dpo(loss="nca"),
    "bce": on_dpo(loss="bce"),
    "apo_zero": on_dpo(loss="apo_zero"),
    "f-dpo js": on_dpo(divergence="js"),
    "dpo + sft": on_dpo(sft_weight=0.3),
    "dpo, safeguard": on_dpo(safeguard=0.9),
    "mapo": Method("scenes/mapo"),
    "simpo": Method("scenes/simpo"),
    "kto": Method("scenes/kto"),
    "dspo": Method("scenes/dspo"),
    "inpo": Method("scenes/inpo"),
    "sft": Method("scenes/sft"),
    "rpo": Method("scenes/rpo"),
    "rwr": Method("scenes/rwr"),
    "listwise": Method("scenes/listwise"),
    "kto, unpaired": Method("scenes/kto_unpaired"),
    "dcpo": Method("scenes/dcpo"),
    "d3po": Method("scenes/d3po", per_backbone=FEW_STEPS),
    "spo": Method("scenes/spo", per_backbone=FEW_STEPS),
}
"""Rows of the table."""

WRONG_ATTRIBUTES = "wrong-attributes"
"""Folder of the pairs of the group `dual_captions`, beside the runs."""
DUAL_CAPTIONS: Mapping[str, Mapping[str, object]] = {
    "dual captions": {"trainer.captions": "dual"},
    "one caption": {"trainer.captions": "shared"},
}

NOISE_LEVELS = (0.0, 0.2, 0.4)
NOISE_METHODS = ("dpo", "cdpo", "rdpo", "ipo", "kto", "dpo + sft")
RELABELLED = "dpo, relabelled"
"""Row of the label noise table: DPO on pairs that the ensemble relabelled."""


def cells(
    group: str, only: Sequence[str] | None, backbones: Sequence[str], seeds: Sequence[int]
) -> list[Cell]:
    """The cells of a group in the order they are run: seeds last, so that a table fills evenly.

    Args:
        group: `matrix`: methods and backbones. `label_noise`: methods on `tiny-sdxl` with labels reversed.
            `dual_captions`: a caption for each picture or one for both, on pairs with wrong attributes.

    Raises:
        ValueError: unknown group, method or backbone.
    """
    for given, known in ((only or [], [*METHODS, RELABELLED]), (backbones, BACKBONES)):
        if unknown := set(given) - set(known):
            raise ValueError(f"{sorted(unknown)} should be of: {', '.join(known)}")
    if group == "label_noise":
        names = [
            name for name in (*NOISE_METHODS, RELABELLED) if name in (only or (*NOISE_METHODS, RELABELLED))
        ]
        return [
            relabelled(seed, share) if name == RELABELLED else noisy(cell(name, "tiny-sdxl", seed), share)
            for seed in seeds
            for share in NOISE_LEVELS
            for name in names
            if share or name != RELABELLED
        ]
    if group == "dual_captions":
        base = {**BACKBONES["tiny-sdxl"], "data.source": WRONG_ATTRIBUTES}
        return [
            Cell(name, "tiny-sdxl", seed, DPO, {**base, **options})
            for seed in seeds
            for name, options in DUAL_CAPTIONS.items()
        ]
    if group != "matrix":
        raise ValueError(f"group is {group!r}; expected matrix, label_noise or dual_captions")
    return [
        cell(name, backbone, seed)
        for seed in seeds
        for name in only or METHODS
        for backbone in backbones
        if backbone not in METHODS[name].not_for
    ]


def cell(name: str, backbone: str, seed: int) -> Cell:
    """One cell with all its overrides."""
    method = METHODS[name]
    overrides = {**BACKBONES[backbone], **method.overrides, **method.per_backbone.get(backbone, {})}
    return Cell(name, backbone, seed, method.recipe, overrides)


def noisy(clean: Cell, share: float) -> Cell:
    """The cell with a share of its labels reversed; methods that are told the share of wrong labels are told it."""
    if not share:
        return clean
    wrong = wrong_share(share)
    told = {key: wrong for key in ("trainer.label_smoothing", "trainer.label_flip") if key in clean.overrides}
    return replace(clean, overrides={**clean.overrides, **told, "data.flipped": share}, flipped=share)


def relabelled(seed: int, share: float) -> Cell:
    """DPO on what the ensemble made of pairs with a share of their labels reversed."""
    clean = cell("dpo", "tiny-sdxl", seed)
    overrides = {**clean.overrides, "data.source": relabelled_name(share)}
    return replace(clean, method=RELABELLED, overrides=overrides, flipped=share)


Result = tuple[Cell, Mapping[str, Any]]


def table(results: Sequence[Result], group: str) -> list[str]:
    """Markdown lines: methods by backbones (or by shares of flipped labels), gain in points with its interval."""
    columns: Sequence[tuple[str, float]]
    if group == "dual_captions":
        columns, rows, titles = [("tiny-sdxl", 0.0)], list(DUAL_CAPTIONS), ["tiny-sdxl"]
    elif group == "label_noise":
        columns = [("tiny-sdxl", share) for share in NOISE_LEVELS]
        rows = [*NOISE_METHODS, RELABELLED]
        titles = [f"{share:.0%} flipped" for _, share in columns]
    else:
        columns, rows = [(backbone, 0.0) for backbone in BACKBONES], list(METHODS)
        titles = [backbone for backbone, _ in columns]
    lines = [f"| method | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name in rows:
        found = [
            [r for c, r in results if (c.method, c.backbone, c.flipped) == (name, *at)] for at in columns
        ]
        words = [
            gain(runs) or (METHODS[name].not_for.get(at[0], "") if name in METHODS else "")
            for runs, at in zip(found, columns, strict=True)
        ]
        if any(found):
            lines.append(f"| {name} | {' | '.join(words)} |")
    return lines


def gain(runs: Sequence[Mapping[str, Any]]) -> str:
    """Points gained over the base: mean over seeds with the spread, or one run with its interval."""
    judged = [run["metrics"]["scenes-judge"] for run in runs]
    points = [100 * judge["difference"] for judge in judged]
    if not points:
        return ""
    if len(points) == 1:
        low, high = (100 * bound for bound in judged[0]["interval"])
        return f"{points[0]:+.1f} ({low:+.1f} to {high:+.1f})"
    each = ", ".join(f"{value:+.1f}" for value in points)
    return f"{statistics.mean(points):+.1f} ± {statistics.stdev(points):.1f} ({each})"


def table_of_settings(results: Sequence[Result]) -> list[str]:
    """Markdown lines: what each method was run with besides its recipe, and the drift it took."""
    lines = ["| cell | recipe | options | drift, nats |", "|---|---|---|---|"]
    for cell, result in results:
        options = ", ".join(
            f"`{key}={value}`" for key, value in cell.overrides.items() if not key.startswith("model.p")
        )
        drift = result.get("drift") or {}
        shown = f"{drift['kl']:.0f}" if drift.get("kl") is not None else ""
        lines.append(f"| {cell.name} | {cell.recipe} | {options} | {shown} |")
    return lines
