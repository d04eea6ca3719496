"""Numbers and verdicts in plain words, the same in the report, on the terminal and in model cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.evaluation.compare import Comparison, Metric
from diffalign.evaluation.statistics import Interval

if TYPE_CHECKING:
    from diffalign.evaluation.result import Evaluation

SHOWN_PROMPTS = 3
SHOWN_LOSSES = 4


def amount(metric: Metric, value: float) -> str:
    """A score: percent for right/wrong metrics, else four significant digits."""
    return f"{100 * value:.1f} %" if metric.binary else f"{value:.4g}"


def amount_interval(metric: Metric, bounds: Interval) -> str:
    """Bounds of a score."""
    return share_interval(bounds) if metric.binary else f"{bounds[0]:.4g} to {bounds[1]:.4g}"


def change(metric: Metric, value: float) -> str:
    """A difference with its sign: percentage points for right/wrong metrics."""
    return f"{100 * value:+.1f} points" if metric.binary else f"{value:+.3g}"


def interval(metric: Metric, bounds: Interval) -> str:
    """Bounds of a difference, with signs."""
    low, high = bounds
    if metric.binary:
        return f"{100 * low:+.1f} to {100 * high:+.1f} points"
    return f"{low:+.3g} to {high:+.3g}"


def share(value: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.1f} %"


def share_interval(bounds: Interval) -> str:
    """Bounds of a fraction as percentages."""
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


def verdict(comparison: Comparison) -> str:
    """One or two sentences: what the main metric says, and which other measurements got worse."""
    metric = comparison.main
    numbers = f"from {amount(metric, metric.base)} to {amount(metric, metric.tuned)}"
    detail = f"{change(metric, metric.difference)}, 95 % interval {interval(metric, metric.interval)}"
    pictures = f"{metric.n} pairs of pictures, {metric.prompts} prompts"
    if metric.change == "better":
        text = f"Better: {metric.name} rose {numbers} ({detail}; {pictures})."
    elif metric.change == "worse":
        text = f"Worse: {metric.name} fell {numbers} ({detail}; {pictures})."
    elif metric.difference == 0 and metric.wins.ties == metric.n:
        value = amount(metric, metric.base)
        text = f"No difference: {metric.name} is {value} for both, picture by picture ({pictures})."
    else:
        text = (
            f"No difference shown: {metric.name} went {numbers}, but the interval of the change includes 0 "
        )
        text += f"({detail}; {pictures})."
    return " ".join([text, *losses(comparison)])


def losses(comparison: Comparison) -> list[str]:
    """What got worse besides the main metric (intervals that leave out 0), and how many pictures flipped."""
    main = comparison.main
    lost = [
        f"{m.name} fell by {change(m, abs(m.difference)).lstrip('+')}"
        for m in list(comparison.metrics.values())[1:]
        if m.change == "worse"
    ]
    for category, metrics in comparison.categories.items():
        for m in (metrics[name] for name in comparison.skipped if name in metrics):
            if m.change != "worse":
                continue
            lost.append(f"{m.name} for {category} fell by {change(m, abs(m.difference)).lstrip('+')}")
    more = [f"and {len(lost) - SHOWN_LOSSES} more"] if len(lost) > SHOWN_LOSSES else []
    sentences = [f"What was lost: {'; '.join([*lost[:SHOWN_LOSSES], *more])}."] if lost else []
    if main.binary and main.wins.losses:
        gained, wrong = main.wins.wins, main.wins.losses
        sentences.append(
            f"{gained} pictures that were wrong are right now, {wrong} that were right are wrong now."
        )
    return sentences


def lost_prompts(evaluation: Evaluation) -> list[str]:
    """The prompts that fell most over their seeds, when prompts have several; significant ones are marked."""
    falls = [fall for fall in evaluation.lost.prompts if fall.seeds > 1][:SHOWN_PROMPTS]
    main = evaluation.comparison.main
    return [
        f"fell: {fall.prompt!r} {change(main, fall.difference)}, {fall.worse} of {fall.seeds} seeds"
        + (", significant" if fall.significant else "")
        for fall in falls
    ]


def side_effect_lines(evaluation: Evaluation) -> list[str]:
    """What else changed, in one line, and how far the model moved, in another."""
    changed = [
        f"{effect.name} {effect.change} ({effect.base:.3g} to {effect.tuned:.3g})"
        for effect in evaluation.side_effects.values()
        if effect.change != "no difference"
    ]
    measured = ", ".join(evaluation.side_effects)
    lines = []
    if measured:
        lines.append(f"side effects: {'; '.join(changed) or f'no difference in {measured}'}")
    if evaluation.drift is not None:
        drift = evaluation.drift
        low, high = drift.interval
        lines.append(f"drift from the base: {drift.kl:.3g} nats per picture ({low:.3g} to {high:.3g})")
    return lines
