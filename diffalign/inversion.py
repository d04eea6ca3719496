"""DDIM inversion: the noise that a model itself would have turned into a given latent.

`x0` is carried up the model's own deterministic path to a time t; `(x_t - alpha x0) / sigma` is then the noise to
train on. Every row has its own t: the grid of a row ends exactly at it, so a batch may hold any mix of times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.conditioning import Conditioning
from diffalign.process import Process, expand_as


@dataclass(frozen=True)
class Span:
    """One step of some rows: times `start`, `end` `[B]`, and whether it is a row's `first` `[B, 1, ...]`."""

    start: Tensor
    end: Tensor
    first: Tensor

    def clean(self, process: Process, z: Tensor, eps: Tensor) -> Tensor:
        """The clean latent that `z` at `start` holds under the noise `eps`; `z` itself on a row's first step."""
        alpha, sigma = (expand_as(level, z) for level in process.alpha_sigma(self.start))
        return torch.where(self.first, z, (z - sigma * eps) / alpha.clamp(min=1e-6))


@dataclass(frozen=True)
class Inverter:
    """How a latent is carried up.

    Fields:
        steps: steps for the whole schedule; a row at time t takes the share t / T of them, rounded up.
        refinements: extra network calls per step that average the noise at both ends of it (ReNoise, Garibi et al.
            2024, arXiv 2403.14602, with one refinement as in SmPO's release).
        eta: scale of the random part of each step, in units of the DDIM step's standard deviation.
        reference: whether the frozen model is followed instead of the policy.
    """

    steps: int = 10
    refinements: int = 0
    eta: float = 0.0
    reference: bool = False

    def __call__(
        self, backbone: Backbone, x0: Tensor, t: Tensor, cond: Conditioning, noise: Tensor | None = None
    ) -> Tensor:
        """The latents at `t` `[B]` of `x0` `[B, C, h, w]`, without gradients and without dropout.

        Args:
            noise: standard normal `[steps, B, C, h, w]`, needed when `eta` is not 0.

        Raises:
            ValueError: `eta` is not 0 and there is no noise.
        """
        if self.eta and noise is None:
            raise ValueError("an Inverter with eta above 0 needs noise")
        process, z = backbone.process, x0.clone()
        stride = (1.0 if process.is_flow else process.num_timesteps) / self.steps
        left = torch.ceil(t.double() / stride).long().clamp(1, self.steps)
        with backbone.inference():
            for i in range(self.steps):
                rows = torch.nonzero(left >= self.steps - i).squeeze(1)
                if len(rows) == 0:
                    continue
                end = self._time(process, (t[rows] - (self.steps - i - 1) * stride).clamp(min=0))
                start = self._time(process, (t[rows] - (self.steps - i) * stride).clamp(min=0))
                first = expand_as(left[rows] == self.steps - i, z)
                z[rows] = self._step(backbone, z[rows], Span(start, end, first), cond.select(rows))
                if self.eta and noise is not None:
                    deviation = expand_as(self.eta * step_deviation(process, start, end), z)
                    z[rows] += deviation * noise[i][rows]
        return z

    def _step(self, backbone: Backbone, z: Tensor, span: Span, cond: Conditioning) -> Tensor:
        """From start to end along the direction that the network sees at the end."""
        process = backbone.process

        def look(seen: Tensor) -> Tensor:
            pred = backbone.predict(seen, span.end, cond, reference=self.reference)
            return process.to_eps(pred, z, span.start)

        eps = look(z)
        for _ in range(self.refinements):
            eps = (eps + look(process.noise(span.clean(process, z, eps), eps, span.end))) / 2
        return process.noise(span.clean(process, z, eps), eps, span.end)

    @staticmethod
    def _time(process: Process, t: Tensor) -> Tensor:
        return t.float() if process.is_flow else t.round().long()


def implied_noise(process: Process, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The noise that turns `x0` into `x_t`: `(x_t - alpha x0) / sigma`."""
    alpha, sigma = (expand_as(level, x0) for level in process.alpha_sigma(t))
    return (x_t - alpha * x0) / sigma.clamp(min=1e-6)


def step_deviation(process: Process, low: Tensor, high: Tensor) -> Tensor:
    """Standard deviation `[B]` of the DDIM step with eta 1 between two noise levels (Song et al. 2021, eq. 16)."""
    alpha_low, sigma_low = process.alpha_sigma(low)
    alpha_high, sigma_high = process.alpha_sigma(high)
    ratio = (alpha_high / alpha_low.clamp(min=1e-6)).square()
    return sigma_low / sigma_high.clamp(min=1e-6) * (1 - ratio).clamp(min=0).sqrt()
