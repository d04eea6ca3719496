"""Agreement of the tiny scorers with the exact judge on held-out pairs, and what their uncertainty is worth.

    python -m benchmarks.scorer_agreement --json result.json --plot docs/images/scorer_calibration.png

Gold is the judge's score of each picture (the share of checks that hold), not the noisy label. Pairs that the judge
scores alike are left out and counted.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffalign.evaluation.calibration import answers, reliability, validate_preferences
from diffalign.objectives.reward_model import win_probability
from diffalign.rewards.scenes_scorers import ScenesAesthetic, ScenesClip, ScenesEnsemble
from diffalign.samples import FOLDER
from diffalign.samples.judge import judge
from diffalign.samples.train_scorers import TIE_FACTOR, Pairs, read_pairs, unit

Array = NDArray[np.float64]
BLUE, RED, GREY, GOLD = "#0f8b8d", "#c8553d", "#7a8fa6", "#d9a21b"
# The pairs are too few for the ten bins that the calibration error is computed with.
BINS = 5
COLORS = {"scenes-clip": GREY, "scenes-aesthetic": GOLD, "scenes-preference": RED, "scenes-ensemble": BLUE}


@dataclass(frozen=True)
class Opinion:
    """What a scorer says about N pairs.

    Fields:
        margin: `[N]` score of the first picture minus that of the second. probability: `[N]` that the first is better.
        uncertainty: `[N]` by name; larger is less certain.
    """

    margin: Array
    probability: Array
    uncertainty: dict[str, Array]


def gold_labels(pairs: Pairs) -> Array:
    """1 where the judge scores the first picture higher, 0 where the second, 0.5 where alike."""
    scores = [
        [judge(image, caption).score for image in both]
        for caption, both in zip(pairs.captions, pairs.images, strict=True)
    ]
    first, second = np.array(scores).T
    return (1 + np.sign(first - second)) / 2


def opinions(pairs: Pairs, folder: str | None = None) -> dict[str, Opinion]:
    """Every tiny scorer's opinion, that of `scenes-preference` for each of its members.

    Uncertainties of the ensemble, over its members: standard deviation of the margin (`spread`), the same relative to
    the mean margin, standard deviation of the chance that the first is better, and the sum of both pictures' `std`.
    """
    images = unit(pairs.images.reshape(-1, *pairs.images.shape[2:]))
    prompts = [caption for caption in pairs.captions for _ in range(2)]
    clip, aesthetic, ensemble = ScenesClip(folder), ScenesAesthetic(folder), ScenesEnsemble(folder)
    with torch.no_grad():
        cosine = _margin(clip.score(images, prompts).mean)
        rating = _margin(aesthetic.score(images, prompts).mean)
        scored = ensemble.score(images, prompts)
    members = torch.stack([_margin(part) for part in scored.parts.values()])
    found = {
        "scenes-clip": Opinion(
            _numpy(cosine), _numpy(torch.sigmoid(cosine * clip.clip.logit_scale.exp())), {}
        ),
        "scenes-aesthetic": Opinion(_numpy(rating), _numpy(torch.sigmoid(rating)), {}),
    }
    for number, margin in enumerate(members):
        found[f"scenes-preference {number}"] = Opinion(_numpy(margin), _numpy(_chance(margin)), {})
    mean, spread = members.mean(0), members.std(0)
    uncertainty = {
        "spread": _numpy(spread),
        "spread of the chance": _numpy(_chance(members).std(0)),
        "spread / |margin|": _numpy(spread / mean.abs().clamp(min=1e-6)),
        "picture std": _numpy(_both(scored.std).sum(1)),
    }
    found["scenes-ensemble"] = Opinion(_numpy(mean), _numpy(_chance(members).mean(0)), uncertainty)
    return found


def _both(scores: Tensor | None) -> Tensor:
    assert scores is not None
    return scores.view(-1, 2)


def _margin(scores: Tensor) -> Tensor:
    return _both(scores).flip(1).diff(dim=1)[:, 0]


def _chance(margin: Tensor) -> Tensor:
    return win_probability(margin, k=TIE_FACTOR)


def _numpy(values: Tensor) -> Array:
    return values.double().numpy()


def measure(pairs: Pairs, folder: str | None = None) -> dict[str, Any]:
    """Agreement with the judge, and with the noisy labels, as plain data."""
    gold = gold_labels(pairs)
    scorers = {
        name: {
            "bins": [asdict(b) for b in reliability(*answers(o.probability, gold), BINS)],
            "judge": validate_preferences(o.margin, o.probability, gold, o.uncertainty),
            "labels": validate_preferences(o.margin, o.probability, pairs.labels.double().numpy())[
                "accuracy"
            ],
        }
        for name, o in opinions(pairs, folder).items()
    }
    decided = gold != 0.5
    labels = pairs.labels.numpy()
    return {
        "pairs": len(gold),
        "tied_by_the_judge": int((~decided).sum()),
        "labels_that_agree": float((labels[decided] == gold[decided]).mean()),
        "scorers": scorers,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print accuracies, and the halves by uncertainty."""
    console.print(
        f"{result['pairs']} pairs, {result['tied_by_the_judge']} of them tied by the judge and left out; "
        f"{100 * result['labels_that_agree']:.1f} % of the labels agree with the judge"
    )
    table = Table(
        "scorer", "judge", "95 %", "labels", "ECE", title="Agreement with the judge and with the noisy labels"
    )
    for name, found in result["scorers"].items():
        share = found["judge"]["accuracy"]
        table.add_row(
            name,
            _percent(share),
            _interval(share["interval"]),
            _percent(found["labels"]),
            f"{found['judge']['ece']:.3f}",
        )
    console.print(table)
    title = "Agreement of the ensemble in the more certain and in the less certain half"
    halves = Table("uncertainty", "certain", "uncertain", "difference, 95 %", title=title)
    for name, half in result["scorers"]["scenes-ensemble"]["judge"]["halves"].items():
        halves.add_row(
            name, _percent(half["certain"]), _percent(half["uncertain"]), _interval(half["interval"])
        )
    console.print(halves)


def _percent(share: dict[str, Any]) -> str:
    return f"{100 * share['value']:.1f} %"


def _interval(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def plot(result: dict[str, Any], path: Path) -> None:
    """Reliability diagrams, and accuracy in the certain and the uncertain half, side by side; a PNG file."""
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    _reliability(left, result["scorers"])
    _halves(right, result["scorers"]["scenes-ensemble"]["judge"]["halves"])
    decided = result["pairs"] - result["tied_by_the_judge"]
    figure.suptitle(f"Tiny scorers against the exact judge, {decided} held-out pairs", fontsize=11)
    figure.savefig(path, dpi=150)


def _reliability(axes: Axes, scorers: dict[str, Any]) -> None:
    axes.plot([0.5, 1], [0.5, 1], color="#b0b7c3", linestyle="--", linewidth=1, label="perfect")
    shown = ("scenes-clip", "scenes-preference 0", "scenes-ensemble")
    for number, name in enumerate(shown):
        bins = scorers[name]["bins"]
        shares = [b["accuracy"] for b in bins]
        label = f"{name.split()[0]} (ECE {scorers[name]['judge']['ece']:.2f})"
        axes.errorbar(
            # Moved aside a little, so that the intervals do not cover each other.
            [b["confidence"] + 0.004 * (number - 1) for b in bins],
            [s["value"] for s in shares],
            yerr=_lengths(shares),
            color=COLORS[name.split()[0]],
            marker="o",
            capsize=2,
            linewidth=1.3,
            label=label,
        )
    axes.set_xlabel("confidence")
    axes.set_ylabel("share that agrees with the judge")
    axes.set_ylim(0, 1.03)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _halves(axes: Axes, halves: dict[str, Any]) -> None:
    places = np.arange(len(halves))
    for shift, side, color in ((-0.2, "certain", BLUE), (0.2, "uncertain", GREY)):
        shares = [half[side] for half in halves.values()]
        values = [s["value"] for s in shares]
        axes.bar(
            places + shift, values, 0.38, yerr=_lengths(shares), color=color, capsize=3, label=f"{side} half"
        )
    axes.set_xticks(places, [name.replace(" ", "\n") for name in halves], fontsize=8)
    axes.set_ylim(0.4, 1.03)
    axes.set_title("scenes-ensemble, pairs halved by", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")


def _lengths(shares: list[dict[str, Any]]) -> list[list[float]]:
    return [
        [max(0.0, s["value"] - s["interval"][0]) for s in shares],
        [max(0.0, s["interval"][1] - s["value"]) for s in shares],
    ]


def main(
    pairs: Annotated[Path, typer.Option(help="Parquet file of held-out pairs.")] = FOLDER
    / "preferences"
    / "validation-00000.parquet",
    folder: Annotated[
        str | None, typer.Option(help="Folder of the scorers; default: the shipped ones.")
    ] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Write the calibration picture here.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all numbers here.")] = None,
) -> None:
    """Measure the agreement of the tiny scorers with the judge."""
    result = measure(read_pairs(pairs), folder)
    show(result, Console())
    if plot_path is not None:
        plot(result, plot_path)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
