"""Forward processes: one object says how a model noises data and what its network predicts.

Every process is `x_t = alpha(t) x0 + sigma(t) eps`. DDPM-type models (eps, sample and v prediction,
integer timesteps 0..T-1) and rectified flow (velocity prediction, t in [0, 1], t = 1 is noise) differ
only in `alpha`, `sigma` and in the algebra between the network's output, x0 and eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]


def expand_as(values: Tensor, like: Tensor) -> Tensor:
    """View per-sample values `[B]` as `[B, 1, ...]` so that they broadcast over `like` `[B, ...]`."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


@dataclass(frozen=True)
class Process:
    """A forward process with its network parameterisation.

    Args:
        prediction: what the network returns: `epsilon`, `sample` (x0), `v_prediction` (alpha eps - sigma x0)
            or `flow` (eps - x0).
        alphas_cumprod: `[T]` float64 table of alpha^2 of a discrete process; None for rectified flow.
        time_scale: factor from a flow time in [0, 1] to what the network is given (1000 for SD3).
        grid: `[G]` the only times that a few-step model is trained and sampled at, ascending; None: all.
    """

    prediction: Prediction
    alphas_cumprod: Tensor | None = None
    time_scale: float = 1000.0
    grid: Tensor | None = None

    @classmethod
    def from_scheduler(cls, config: dict[str, Any]) -> Process:
        """Build the process from a diffusers scheduler config.

        Raises:
            ValueError: the config names a beta schedule or prediction type that is not known here.
        """
        if "FlowMatch" in str(config.get("_class_name", "")):
            return cls("flow", None, float(config.get("num_train_timesteps", 1000)))
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"prediction_type is {prediction!r}; expected epsilon, sample or v_prediction")
        return cls(prediction, _alphas_cumprod(config), grid=_distillation_grid(config))

    @property
    def is_flow(self) -> bool:
        """Whether times are continuous in [0, 1] instead of integers."""
        return self.alphas_cumprod is None

    @property
    def num_timesteps(self) -> int:
        """T of a discrete process; the time scale of a flow."""
        return int(self.time_scale) if self.alphas_cumprod is None else len(self.alphas_cumprod)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise level at times `t` `[B]`, each `[B]` in float32."""
        if self.alphas_cumprod is None:
            t = t.float()
            return 1.0 - t, t
        abar = self.alphas_cumprod.to(t.device)[t.long()]
        return abar.sqrt().float(), (1.0 - abar).sqrt().float()

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """`x_t = alpha x0 + sigma eps`; `x0`, `eps` `[B, ...]`, `t` `[B]`."""
        alpha, sigma = self._levels(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a perfect network would return for `x_t = noise(x0, eps, t)`."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "sample":
            return x0
        if self.prediction == "flow":
            return eps - x0
        alpha, sigma = self._levels(t, x0)
        return alpha * eps - sigma * x0

    def to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 implied by a network output at `x_t`. At sigma = 1 exactly, eps prediction does not determine x0."""
        alpha, sigma = self._levels(t, x_t)
        if self.prediction == "epsilon":
            return (x_t - sigma * pred) / alpha
        if self.prediction == "sample":
            return pred
        if self.prediction == "flow":
            return x_t - sigma * pred
        return alpha * x_t - sigma * pred

    def to_eps(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The eps implied by a network output at `x_t`. At sigma = 0 exactly, x0 prediction does not determine eps."""
        alpha, sigma = self._levels(t, x_t)
        if self.prediction == "epsilon":
            return pred
        if self.prediction == "sample":
            return (x_t - alpha * pred) / sigma
        if self.prediction == "flow":
            return x_t + alpha * pred
        return sigma * x_t + alpha * pred

    def from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network output that implies `x0` at `x_t` (inverse of `to_x0`)."""
        alpha, sigma = self._levels(t, x_t)
        return self.target(x0, (x_t - alpha * x0) / sigma, t)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio `alpha^2 / sigma^2` at `t` `[B]`."""
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma).square()

    def model_time(self, t: Tensor) -> Tensor:
        """The time as the network expects it: the integer timestep, or `t * time_scale` for a flow."""
        return t * self.time_scale if self.is_flow else t

    def times(self, uniform: Tensor, weighting: str = "uniform") -> Tensor:
        """Map uniform draws in [0, 1) `[B]` to training times `[B]`.

        Discrete processes return integers 0..T-1. `logit_normal` (Esser et al. 2024, eq. 19, location 0,
        scale 1) is meant for flows; on a discrete process it is quantised. With a `grid`, its times are drawn.

        Raises:
            ValueError: unknown weighting.
        """
        if weighting == "logit_normal":
            clipped = uniform.double().clamp(1e-6, 1 - 1e-6)
            uniform = torch.sigmoid(torch.special.ndtri(clipped)).float()
        elif weighting != "uniform":
            raise ValueError(f"time weighting is {weighting!r}; expected uniform or logit_normal")
        if self.grid is not None:
            index = (uniform * len(self.grid)).long().clamp(0, len(self.grid) - 1)
            return self.grid.to(uniform.device)[index]
        if self.is_flow:
            return uniform
        last = self.num_timesteps - 1
        return (uniform * self.num_timesteps).floor().long().clamp(0, last)

    def _levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t)
        return expand_as(alpha, like), expand_as(sigma, like)


def _distillation_grid(config: dict[str, Any]) -> Tensor | None:
    """The timesteps that a latent consistency model was distilled at (Luo et al. 2023), `[G]`."""
    if "LCM" not in str(config.get("_class_name", "")):
        return None
    steps = int(config.get("num_train_timesteps", 1000))
    count = int(config.get("original_inference_steps", 50))
    return torch.arange(1, count + 1) * (steps // count) - 1


def _alphas_cumprod(config: dict[str, Any]) -> Tensor:
    """The `[T]` table of alpha^2 that diffusers' schedulers derive from the same config, in float64."""
    steps = int(config.get("num_train_timesteps", 1000))
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    else:
        start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
        schedule = config.get("beta_schedule", "linear")
        if schedule == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        elif schedule == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
        elif schedule == "squaredcos_cap_v2":
            betas = _cosine_betas(steps)
        else:
            raise ValueError(
                f"beta_schedule is {schedule!r}; expected linear, scaled_linear or squaredcos_cap_v2"
            )
    abar = torch.cumprod(1.0 - betas, 0)
    return _zero_terminal_snr(abar) if config.get("rescale_betas_zero_snr") else abar


def _cosine_betas(steps: int) -> Tensor:
    """Cosine schedule (Nichol and Dhariwal 2021, eq. 17) with betas capped at 0.999."""
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    abar = torch.cos((grid + 0.008) / 1.008 * torch.pi / 2).square()
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def _zero_terminal_snr(abar: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha^2) so that the last step is pure noise (Lin et al. 2023, algorithm 1)."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
