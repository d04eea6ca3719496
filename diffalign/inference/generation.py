"""A generation as a function of its noises: the one thing that all methods of this room turn.

`Generation` holds what the network is told for B prompts and how it is sampled; calling it with noises
`[N, S, C, h, w]` gives media `[N, 3, H, W]`, differentiable when gradients are enabled. Noise 0 is the initial one,
the others belong to the steps that draw noise, in their order. Equal noises give equal media, and those of `start` give
the pictures of `diffalign generate` with the same prompts, seeds, steps and guidance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.backbones.base import Backbone
from diffalign.backbones.guidance import is_told_guidance
from diffalign.errors import DiffalignError
from diffalign.inference.own_sampler import OwnSampler, own_sampler
from diffalign.sampling.collection import tell
from diffalign.sampling.initial import adapted, noise_dtype
from diffalign.sampling.rollout import Sampler, chunks, policy_transition
from diffalign.sampling.transition import Kernel, Transition

Checkpointing = Literal["none", "steps", "blocks"]
"""What the backward pass computes again instead of keeping it: nothing; whole network calls and the decoding, so that
a sampler's memory is that of one call; or also the blocks inside of them."""


class Generation:
    """B prompts, how the network is told of them and how it is sampled.

    Fields:
        prompts: B texts. told: what the network is told, B rows. sampler: times and kernel. random: steps that draw
            noise. scale: what the initial noise is multiplied with. exact: whether `diffalign generate` makes the
            same pictures of the same noises. solver: name of the pipeline's scheduler.
        evaluations: network evaluations so far, one per picture, step and branch of guidance; those that
            checkpointing repeats are not counted.

    Args:
        guidance: as the pipeline means it; 1 or less turns it off. kernel: another stochastic step than the model's
            own, with its schedule. batch_size: pictures at once without gradients.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        kernel: Kernel | None = None,
        batch_size: int = 8,
        checkpointing: Checkpointing = "none",
    ) -> None:
        own = own_sampler(backbone, steps, batch_size=batch_size)
        self.backbone, self.prompts, self.checkpointing = backbone, list(prompts), checkpointing
        self._use(own, kernel)
        texts = [backbone.prompt_prefix + prompt for prompt in prompts]
        self.told = tell(backbone, texts, _branch_scale(backbone, guidance))
        self.steps, self.guidance, self.evaluations = steps, guidance, 0

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """`(S, C, h, w)` of the noises of one picture."""
        return (1 + len(self.random), *self.backbone.latent_shape)

    @property
    def cost(self) -> int:
        """Network evaluations of one picture."""
        return len(self.sampler.schedule) * branches(self.backbone, self.told.unconditional is not None)

    def facts(self) -> dict[str, Any]:
        """What a record says of the sampler."""
        kernel = self.sampler.kernel
        facts = {"solver": self.solver, "exact": self.exact, "own_sampler": self.own}
        return {**facts, "kernel": kernel.name, "noise": kernel.level}

    def start(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal noises `[B, S, C, h, w]` in float32 on the CPU, as the pipeline draws them from seeds.

        The pipeline draws in the number format of its text encoders, one generator per picture. A model's noise
        adapters have changed the first ones; their two evaluations are not counted.
        """
        noises = torch.stack([self._drawn(seed) for seed in seeds])
        with torch.no_grad():
            noises[:, 0] = adapted(self.backbone, noises[:, 0], self.told, self.steps).cpu()
        return noises

    def __call__(self, noises: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Media `[N, 3, H, W]` in [0, 1] of noises `[N, S, C, h, w]`, with gradients if they are enabled.

        Args:
            rows: the prompt of each of the N; None: one each, in order.
        """
        return self.decode(self.latents(noises, rows))

    def media(self, noises: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """As calling it, without gradients, on the CPU, `sampler.batch_size` pictures at once."""
        rows = self._rows(noises, rows)
        parts = []
        with torch.no_grad():
            for part in chunks(len(noises), self.sampler.batch_size):
                span = slice(part.start, part.stop)
                parts.append(self(noises[span], rows[span]).cpu())
        return torch.cat(parts)

    def latents(self, noises: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Clean latents `[N, C, h, w]` of noises `[N, S, C, h, w]`."""
        rows = self._rows(noises, rows)
        noises = noises.to(self.backbone.device)
        x = noises[:, 0] * self.scale
        for step in range(len(self.sampler.schedule)):
            self.count(len(x))
            x = self._recomputed(self._step, x, step, rows, self.noise_of(noises, step))
        return x

    def decode(self, latents: Tensor) -> Tensor:
        """Media `[N, 3, H, W]` in [0, 1] of clean latents."""
        media: Tensor = self._recomputed(self.backbone.decode, latents)
        return media

    def noise_of(self, noises: Tensor, step: int) -> Tensor | None:
        """The noise `[N, C, h, w]` of a step, None where it draws none."""
        return noises[:, 1 + self.random.index(step)] if step in self.random else None

    def transition(self, x: Tensor, step: int, rows: Sequence[int]) -> Transition:
        """The distribution of the next latents after `x` `[N, C, h, w]` at a step; who calls it counts it."""
        t, t_prev = self.sampler.schedule.span(step, len(x), self.backbone.device)
        kernel, told = self.sampler.kernel_at(step), self.told.select(rows)
        return policy_transition(self.backbone, kernel, x, t, t_prev, told)

    def count(self, pictures: int, steps: int = 1) -> None:
        """Count evaluations that a method makes of its own."""
        self.evaluations += pictures * steps * self.cost // len(self.sampler.schedule)

    def _step(self, x: Tensor, step: int, rows: Sequence[int], noise: Tensor | None) -> Tensor:
        now = self.transition(x, step, rows)
        return now.mean if noise is None else now.sample(noise)

    def _recomputed(self, function: Any, x: Tensor, *rest: Any) -> Any:
        """A call whose inner activations are computed again in the backward pass."""
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return function(x, *rest)
        return checkpoint(function, x, *rest, use_reentrant=False, preserve_rng_state=False)

    def _use(self, own: OwnSampler, kernel: Kernel | None) -> None:
        self.scale, self.solver = own.scale, own.solver
        self.own, self.exact = kernel is None, own.exact and kernel is None
        self.sampler = own.sampler
        if kernel is not None:
            kernel.check(self.backbone.process)
            self.sampler = Sampler(own.sampler.schedule, kernel, batch_size=own.sampler.batch_size)
        self.random = self.sampler.stochastic(self.backbone.process)

    def _drawn(self, seed: int) -> Tensor:
        source, shape = torch.Generator("cpu").manual_seed(seed), (1, *self.backbone.latent_shape)
        dtype, count = noise_dtype(self.backbone), self.noise_shape[0]
        return torch.cat([torch.randn(shape, generator=source, dtype=dtype).float() for _ in range(count)])

    def _rows(self, noises: Tensor, rows: Sequence[int] | None) -> list[int]:
        rows = list(range(len(self))) if rows is None else list(rows)
        if tuple(noises.shape) != (len(rows), *self.noise_shape):
            raise DiffalignError(
                f"noises have shape {tuple(noises.shape)}; expected {(len(rows), *self.noise_shape)}: one set per "
                "picture, the initial noise and one for each step that draws noise."
            )
        return rows


def branches(backbone: Backbone, guided: bool) -> int:
    """Forwards of one picture at one step: two with classifier-free guidance, unless the network is told its scale."""
    told = is_told_guidance(backbone.core) or type(backbone).guided is not Backbone.guided
    return 2 if guided and not told else 1


@contextmanager
def ready(backbone: Backbone, checkpointing: Checkpointing = "none") -> Iterator[None]:
    """Inside the block no weight gets a gradient, there is no dropout, and blocks are recomputed if asked for."""
    trained = [p for p in backbone.core.parameters() if p.requires_grad]
    modules = [backbone.core, backbone.pipeline().vae] if checkpointing == "blocks" else []
    switched = [module for module in modules if not module.is_gradient_checkpointing]
    training = backbone.core.training
    backbone.core.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    for module in switched:
        module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for module in switched:
            module.disable_gradient_checkpointing()
        for parameter in trained:
            parameter.requires_grad_(True)
        backbone.core.train(training)


def _branch_scale(backbone: Backbone, guidance: float) -> float:
    """Guidance as `Backbone.guided` counts it; Z-Image's pipeline counts from 0."""
    return 1 + guidance if backbone.family == "z_image" and guidance > 0 else guidance
