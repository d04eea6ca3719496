"""How evenly pictures change along paths between noises: ISTD of Smooth Diffusion (arXiv 2312.04410), for two models.

A path of a prompt leads from the noise of its seed to another one in ten steps of spherical interpolation. ISTD is the
deviation of the L2 distances between neighbouring pictures; a model whose pictures change less has a smaller one even
if they change as unevenly, so the mean distance stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.evaluation.pictures import Progress, Settings, silent
from diffalign.evaluation.prompts import EvalPrompt
from diffalign.evaluation.side_effects import SideEffect
from diffalign.evaluation.statistics import paired_difference
from diffalign.randomness import derive_seed
from diffalign.sampling.generate import generate_images
from diffalign.smoothness import slerp, step_lengths

PICTURES = 11

MEANINGS = {
    "ISTD": "deviation of the L2 distances between neighbours on a path between noises; 0: even changes",
    "path step": "mean of these distances; ISTD falls with it when pictures just change less",
}


def path_lengths(
    backbone: Backbone,
    rows: Sequence[EvalPrompt],
    settings: Settings,
    label: str = "paths",
    progress: Progress = silent,
) -> Tensor:
    """L2 distances `[P, PICTURES - 1]` between neighbouring pictures on the path of each of P prompts.

    Inside `backbone.reference()` they are the frozen model's. A sampler that draws noise in its steps draws the same
    along a path.
    """
    found = []
    for done, row in enumerate(rows):
        progress(label, done, len(rows))
        images = generate_images(
            backbone,
            [row.text] * PICTURES,
            [row.seed] * PICTURES,
            steps=settings.steps,
            guidance=settings.guidance,
            batch_size=settings.batch_size,
            noises=path_noises(backbone.latent_shape, row.seed),
        )
        found.append(step_lengths(images[None]))
    progress(label, len(rows), len(rows))
    return torch.cat(found)


def path_noises(shape: Sequence[int], seed: int) -> Tensor:
    """Noises `[PICTURES, C, h, w]` from that of a seed to that of another one that belongs to it."""
    first, last = (
        torch.randn(1, *shape, generator=torch.Generator("cpu").manual_seed(end))
        for end in (seed, derive_seed("other end", seed))
    )
    return torch.cat([slerp(first, last, k / (PICTURES - 1)) for k in range(PICTURES)])


def path_effects(base: Tensor, tuned: Tensor, rows: Sequence[EvalPrompt]) -> dict[str, SideEffect]:
    """ISTD and mean step of both models by name, from their distances `[P, K]` on the same paths."""
    labels = [row.text for row in rows]
    values = {
        "ISTD": [lengths.std(1, correction=0).numpy() for lengths in (base, tuned)],
        "path step": [lengths.mean(1).numpy() for lengths in (base, tuned)],
    }
    effects = {}
    for name, (before, after) in values.items():
        paired = paired_difference(before, after, labels)
        effects[name] = SideEffect(
            name, MEANINGS[name], paired.base, paired.tuned, paired.difference, paired.interval, paired.n, "paths"
        )  # fmt: skip
    return effects
