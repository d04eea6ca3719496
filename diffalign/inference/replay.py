"""Draw the pictures of stored noises again."""

from __future__ import annotations

from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.errors import DiffalignError
from diffalign.inference.generation import Generation, ready
from diffalign.inference.noise_file import NoiseFile
from diffalign.sampling.transition import Kernel


def replay(backbone: Backbone, content: NoiseFile) -> Tensor:
    """Pictures `[P, 3, H, W]` in [0, 1] of a file's noises, drawn with its settings.

    Raises:
        DiffalignError: the model's latents have another shape, or it draws another number of noises.
    """
    settings = content.settings
    own = settings["own_sampler"]
    generation = Generation(
        backbone,
        content.prompts,
        steps=settings["steps"],
        guidance=settings["guidance"],
        kernel=None if own else Kernel(settings["kernel"], settings["noise"]),
        batch_size=settings["batch_size"],
    )
    if generation.noise_shape != tuple(content.noises.shape[1:]):
        raise DiffalignError(
            f"the file's noises have shape {tuple(content.noises.shape[1:])}, {backbone.source.name} in "
            f"{settings['steps']} steps takes {generation.noise_shape}; give the model they were found with."
        )
    with ready(backbone):
        return generation.media(content.noises)
