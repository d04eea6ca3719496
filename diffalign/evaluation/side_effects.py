"""What tuning changes besides the scores: sharpness, saturation, and how different the pictures are.

None of these is better high or low. Rewards are often raised by oversharpened, oversaturated pictures that look
alike; a change here says where to look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.evaluation.metric import Shift
from diffalign.evaluation.pictures import Progress, silent
from diffalign.evaluation.prompts import EvalPrompt
from diffalign.evaluation.scoring import Array, Images
from diffalign.evaluation.statistics import PairedDifference, cluster_bootstrap, paired_difference
from diffalign.rewards.diagnostics import log_sharpness, saturation

if TYPE_CHECKING:
    from diffalign.rewards.encoders import Encoder

BATCH = 32


@dataclass(frozen=True)
class SideEffect(Shift):
    """A property of both models' pictures that is not good or bad by itself; its values are means.

    Fields:
        unit: what `n` counts: pictures, prompts or prompts with several seeds.
    """

    unit: str

    @property
    def change(self) -> Literal["higher", "lower", "no difference"]:
        """Higher or lower only when the interval leaves out 0."""
        low, high = self.interval
        return "higher" if low > 0 else "lower" if high < 0 else "no difference"

    def as_json(self) -> dict[str, Any]:
        """The entry of `side_effects` in `evaluation.json`."""
        return {**super().as_json(), "unit": self.unit, "meaning": self.meaning}


DIAGNOSTICS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sharpness": (log_sharpness, "log(1 + variance of the Laplacian): detail, but also noise and halos"),
    "saturation": (saturation, "mean HSV saturation, 0 for grey to 1"),
}


def side_effects(
    base: Images,
    tuned: Images,
    prompts: Sequence[EvalPrompt],
    encoder: Encoder,
    *,
    progress: Progress = silent,
) -> dict[str, SideEffect]:
    """Sharpness, saturation and diversity of both models' pictures `[N, 3, H, W]`, by name.

    Diversity is the mean pairwise distance (see `distances`): `diversity over seeds` between the pictures of the
    same prompt, when prompts have several, and `diversity over prompts` between the first pictures of different
    prompts.
    """
    sides = [_measured(images, len(prompts), encoder, progress) for images in (base, tuned)]
    labels = [prompt.text for prompt in prompts]
    found = {
        name: _effect(name, meaning, paired_difference(sides[0][name], sides[1][name], labels), "pictures")
        for name, (_, meaning) in DIAGNOSTICS.items()
    }
    before, after = (torch.from_numpy(side["features"]) for side in sides)
    for effect in (
        _over_seeds(before, after, labels, encoder.name),
        _over_prompts(before, after, labels, encoder.name),
    ):
        if effect is not None:
            found[effect.name] = effect
    return found


def distances(features: Tensor) -> Tensor:
    """Distances `[N, N]` of embeddings `[N, D]`: 1 minus the cosine, from 0 (the same direction) to 2."""
    unit = F.normalize(features.double(), dim=1)
    return (1 - unit @ unit.T).clamp(min=0).fill_diagonal_(0)


def mean_pairwise(distance: Tensor) -> float:
    """Mean over all pairs of different rows of a distance matrix `[N, N]`, N at least 2."""
    n = len(distance)
    return float(distance.sum() / (n * (n - 1)))


def pseudo_values(distance: Tensor) -> Array:
    """Jackknife pseudo-values `[N]` of the mean pairwise distance (Tukey 1958), N at least 3.

    Their mean is that distance, and their spread is its own, each row taking part in N - 1 pairs: averages of
    rows alone would give intervals too narrow by half.
    """
    n = len(distance)
    mean = distance.sum() / (n * (n - 1))
    row_means = distance.sum(1) / (n - 1)
    values: Array = (mean + 2 * (n - 1) / (n - 2) * (row_means - mean)).numpy()
    return values


def _measured(images: Images, total: int, encoder: Encoder, progress: Progress) -> dict[str, Any]:
    """Diagnostics `[N]` and features `[N, D]` of pictures."""
    parts: dict[str, list[Tensor]] = {name: [] for name in (*DIAGNOSTICS, "features")}
    for start in range(0, total, BATCH):
        progress("side effects", start, total)
        batch = images[start : start + BATCH].float()
        with torch.no_grad():
            parts["features"].append(encoder.embed(batch).float().cpu())
            for name, (function, _) in DIAGNOSTICS.items():
                parts[name].append(function(batch).double().cpu())
    progress("side effects", total, total)
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def _over_seeds(base: Tensor, tuned: Tensor, labels: list[str], encoder: str) -> SideEffect | None:
    """Diversity among the pictures of each prompt; None unless two prompts have several."""
    groups: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        groups.setdefault(label, []).append(row)
    several = [rows for rows in groups.values() if len(rows) > 1]
    if len(several) < 2:
        return None
    values = [[mean_pairwise(distances(side[rows])) for rows in several] for side in (base, tuned)]
    meaning = f"1 - cosine between pictures of a prompt, encoder {encoder}"
    return _effect("diversity over seeds", meaning, paired_difference(*values), "prompts")


def _over_prompts(base: Tensor, tuned: Tensor, labels: list[str], encoder: str) -> SideEffect | None:
    """Diversity among the first pictures of all prompts; None with fewer than three."""
    first = list({label: row for row, label in reversed(list(enumerate(labels)))}.values())
    if len(first) < 3:
        return None
    before, after = (distances(side[first]) for side in (base, tuned))
    low, high = cluster_bootstrap(pseudo_values(after) - pseudo_values(before))
    means = mean_pairwise(before), mean_pairwise(after)
    meaning = f"1 - cosine between pictures of different prompts, encoder {encoder}"
    return SideEffect(
        "diversity over prompts", meaning, *means, means[1] - means[0], (low, high), len(first), "prompts"
    )


def _effect(name: str, meaning: str, paired: PairedDifference, unit: str) -> SideEffect:
    return SideEffect(
        name, meaning, paired.base, paired.tuned, paired.difference, paired.interval, paired.n, unit
    )
