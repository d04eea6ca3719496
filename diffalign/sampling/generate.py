"""Pictures from prompts and seeds, through the diffusers pipeline itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.backbones.loading import quiet
from diffalign.backbones.noise_adapters import changes_noise
from diffalign.errors import DiffalignError
from diffalign.sampling.collection import tell
from diffalign.sampling.initial import adapted, noise_dtype, pipeline_latents


def generate_images(
    model: Backbone | Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int = 8,
    resolution: tuple[int, int] | None = None,
    progress: Callable[[int], None] | None = None,
    noises: Tensor | None = None,
) -> Tensor:
    """Generate one picture per prompt and seed: `[N, 3, H, W]` in [0, 1], float32, on the CPU.

    Each picture has its own CPU generator with its seed, so it is what a user gets from the pipeline with the
    same prompt, seed, steps and guidance, and, but for float rounding, it does not depend on its batch. A backbone with
    noise adapters changes what is drawn first (`sampling/initial.py`).

    Args:
        model: a backbone (the policy; inside `backbone.reference()` the frozen model) or a pipeline. A backbone's
            `prompt_prefix` comes before every prompt.
        guidance: classifier-free guidance scale; 1 or less turns it off. A network that is told its scale (LCM, FLUX.1
            dev) is told this one, and SD-Turbo and SDXL-Turbo want 0.
        resolution: `(height, width)` in pixels; None is the backbone's, or the pipeline's own.
        progress: called after every batch with the number of pictures done.
        noises: `[N, C, h, w]` that a backbone's pictures start from instead of those of the seeds, standard normal.

    Raises:
        DiffalignError: numbers of prompts and seeds differ, or there are none; a consistency model has no such number
            of steps.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise DiffalignError(
            f"there are {len(prompts)} prompts and {len(seeds)} seeds; expected one seed per prompt."
        )
    if isinstance(model, Backbone):
        resolution = resolution or model.resolution
        prompts = [model.prompt_prefix + prompt for prompt in prompts]
    size = {} if resolution is None else {"height": resolution[0], "width": resolution[1]}
    options = {**size, **(model.call_options if isinstance(model, Backbone) else {})}
    batches: list[Tensor] = []
    with _ready(model) as pipeline:
        _check_steps(pipeline, steps)
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            sources = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]]
            if isinstance(model, Backbone) and (noises is not None or changes_noise(model)):
                given = None if noises is None else noises[rows]
                options["latents"] = _initial(model, prompts[rows], sources, steps, guidance, size, given)
            batches.append(_batch(pipeline, prompts[rows], sources, steps, guidance, options))
            if progress is not None:
                progress(min(start + batch_size, len(prompts)))
    return torch.cat(batches)


def _check_steps(pipeline: Any, steps: int) -> None:
    most = getattr(pipeline.scheduler.config, "original_inference_steps", steps)
    if steps > most:
        raise DiffalignError(
            f"the number of steps is {steps}; expected at most {most}, which this consistency model was distilled at."
        )


def _batch(
    pipeline: Any,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    steps: int,
    guidance: float,
    options: dict[str, Any],
) -> Tensor:
    images = pipeline(
        prompt=list(prompts),
        generator=list(generators),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="pt",
        **options,
    ).images
    return images.float().cpu()


def _initial(
    model: Backbone,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    steps: int,
    guidance: float,
    size: dict[str, int],
    given: Tensor | None,
) -> Tensor:
    """The pipeline's `latents`: given or drawn from the generators as the pipeline does it, changed by adapters."""
    dtype, noise = noise_dtype(model), given
    if noise is None:
        shape = (1, model.latent_shape[0], size["height"] // model.factor, size["width"] // model.factor)
        noise = torch.cat([torch.randn(shape, generator=source, dtype=dtype) for source in generators])
    if changes_noise(model):
        noise = adapted(model, noise.float(), tell(model, prompts, guidance), steps)
    return pipeline_latents(noise.to(model.device, dtype), model.family)


@contextmanager
def _ready(model: Backbone | Any) -> Iterator[Any]:
    """The model's pipeline without progress bars; a backbone without dropout."""
    pipeline: Any = model.pipeline() if isinstance(model, Backbone) else model
    bars = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**bars, "disable": True})
    try:
        with quiet(), model.inference() if isinstance(model, Backbone) else nullcontext():
            yield pipeline
    finally:
        pipeline.set_progress_bar_config(**bars)
