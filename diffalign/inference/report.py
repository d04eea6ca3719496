"""The page that a person reads after a run, and the table behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.evaluation.statistics import paired_difference
from diffalign.inference.result import AFTER, BEFORE, Optimized

Array = NDArray[np.float64]
SHAPE = ("neighbours", "low_power")
"""What norm and moments do not show of a noise."""


def summary(found: Optimized) -> dict[str, dict[str, Any]]:
    """Means by reward and stage, and what changed since before, with a 95 % interval over prompts."""
    optimised = {stage: values.double().numpy() for stage, values in found.rewards.items()}
    return {name: _row(stages) for name, stages in {found.reward: optimised, **found.held_out}.items()}


def report(found: Optimized) -> str:
    """Markdown: what was done, what it cost, what it reached, what else changed, whether the noise is still noise."""
    parts = [
        f"# {found.method['method']}: {found.reward} on {len(found.prompts)} prompts",
        _early(found),
        "![before and after](comparison.png)",
        _cost(found),
        "## Rewards\n\n" + _table(found) + "\n\n" + _advice(found),
        "## Trajectory\n\n" + _trajectory(found),
        _figures(found),
        "## Noise\n\n" + _noise(found),
        "## How the pictures are made\n\n" + _settings(found),
    ]
    return "\n\n".join(part for part in parts if part)


def _row(stages: dict[str, Array]) -> dict[str, Any]:
    row: dict[str, Any] = {stage: float(np.nanmean(values)) for stage, values in stages.items()}
    both = np.isfinite(stages[BEFORE]) & np.isfinite(stages[AFTER])
    if both.sum() > 1:
        difference = paired_difference(stages[BEFORE][both], stages[AFTER][both])
        row["change"], row["interval"] = difference.difference, list(difference.interval)
    return row


def _early(found: Optimized) -> str:
    return f"**Not complete: {found.problem}**" if found.problem else ""


def _cost(found: Optimized) -> str:
    lines = [
        f"Cost per picture: {found.evaluations} network evaluations and {found.backwards} backward ones; "
        f"{found.seconds:.1f} seconds for all {len(found.prompts)} prompts."
    ]
    for name, (evaluations, seconds) in found.baseline_cost.items():
        lines.append(f"{name.capitalize()}: {evaluations} evaluations per picture, {seconds:.1f} seconds.")
    return "\n".join(lines)


def _table(found: Optimized) -> str:
    stages, rows = list(found.rewards), summary(found)
    head = ["reward", *stages, "change", "95 % interval"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, row in rows.items():
        role = "optimised" if name == found.reward else "held out"
        interval = row.get("interval")
        cells = [f"{name} ({role})", *(f"{row[stage]:.4g}" if stage in row else "" for stage in stages)]
        cells.append(f"{row['change']:+.4g}" if "change" in row else "")
        cells.append(f"{interval[0]:+.4g} to {interval[1]:+.4g}" if interval else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _advice(found: Optimized) -> str:
    """Which held-out rewards fell for certain."""
    fallen = [
        name
        for name, row in summary(found).items()
        if name != found.reward and "interval" in row and row["interval"][1] < 0
    ]
    if not fallen:
        return (
            "A held-out reward that falls while the optimised one rises shows that the reward is exploited."
        )
    return f"**Fallen although not optimised: {', '.join(fallen)}.** The reward is probably exploited: stop earlier."


def _trajectory(found: Optimized) -> str:
    points = found.trajectory
    if not points:
        return "Nothing was tried."
    picked = sorted({round(i * (len(points) - 1) / 9) for i in range(10)})
    lines = ["| evaluations | seconds | reward | best so far |", "| --- | --- | --- | --- |"]
    for point in (points[i] for i in picked):
        mean, best = np.nanmean(point.rewards.numpy()), np.nanmean(point.best.numpy())
        lines.append(f"| {point.evaluations} | {point.seconds:.1f} | {mean:.4g} | {best:.4g} |")
    return "\n".join(lines)


def _figures(found: Optimized) -> str:
    """Means over prompts of what a method tells of each, and its sheets of pictures."""
    plain = {name: values.double().numpy() for name, values in found.notes.items() if values.dim() == 1}
    lines = [
        f"| {name} | {np.nanmean(values):.4g} |"
        for name, values in plain.items()
        if np.isfinite(values).any()
    ]
    table = "\n".join(["| figure | mean over prompts |", "| --- | --- |", *lines]) if lines else ""
    sheets = "\n".join(f"![{found.prompts[row].text}](archive/{row:04d}.png)" for row in found.sheets)
    text = "\n\n".join(part for part in (table, sheets) if part)
    return f"## Figures of the method\n\n{text}" if text else ""


def _noise(found: Optimized) -> str:
    looks = [look for look in found.gaussianity[AFTER] if look is not None]
    if not looks:
        return "These pictures were found by steering the sampler; no noise gives them again."
    strange = [look for look in looks if not look.usual]
    first = [look for look in found.gaussianity[BEFORE] if look is not None]
    beside, power = ([np.mean([getattr(x, name) for x in xs]) for xs in (looks, first)] for name in SHAPE)
    lines = [
        f"Norm {np.mean([look.norm for look in looks]):.2f}, of noise {looks[0].expected:.2f}; correlation of "
        f"neighbours {beside[0]:+.3f} (before {beside[1]:+.3f}); power of low frequencies {power[0]:.2f} (before "
        f"{power[1]:.2f}).",
        f"{len(strange)} of {len(looks)} noises are told from white Gaussian noise (p below 0.001 after correction).",
    ]
    if strange:
        worst = min(strange, key=lambda look: min(look.p.values()))
        name = min(worst.p, key=lambda key: worst.p[key])
        lines.append(f"The clearest sign is {name} (p = {worst.p[name]:.1g}).")
    return " ".join(lines)


def _settings(found: Optimized) -> str:
    lines = [f"- {name}: {value}" for name, value in found.settings.items() if value is not None]
    if not found.settings.get("exact"):
        lines.append(
            "\n`before` differs a little from `diffalign generate`: the sampler is not the pipeline's own "
            f"({found.settings.get('solver')})."
        )
    if bool(found.noises.isfinite().all()):
        lines.append("\nThe same pictures again: `diffalign optimize --replay noise.safetensors`.")
    return "\n".join(lines)
