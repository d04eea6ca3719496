"""Optimisers, learning-rate schedules, loss scaling for fp16 and the averaged copy of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from diffalign.config import OptimConfig
from diffalign.errors import DiffalignError


def build_optimizer(config: OptimConfig, parameters: Sequence[Parameter]) -> torch.optim.Optimizer:
    """The optimiser a configuration names, over trainable parameters only.

    Raises:
        DiffalignError: nothing to train, or an optimiser that is not installed or not for this device.
    """
    if not parameters:
        raise DiffalignError(
            "nothing to train: the network has no trainable parameters; check model.lora.targets"
        )
    if any(p.dtype != torch.float32 for p in parameters):
        raise DiffalignError("trainable weights must be float32, or small updates would be rounded away")
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    cuda = parameters[0].is_cuda
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, betas=config.betas, eps=config.eps, fused=True, **common)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, **common)
    return _adamw8bit(config, parameters, cuda)


def _adamw8bit(config: OptimConfig, parameters: Sequence[Parameter], cuda: bool) -> torch.optim.Optimizer:
    advice = "install it with `pip install 'diffalign[bnb]'`, or choose optim.optimizer=adamw or adafactor"
    if not cuda:
        raise DiffalignError(
            "optim.optimizer is 'adamw8bit', which needs a CUDA GPU; choose adamw or adafactor"
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise DiffalignError(
            f"optim.optimizer is 'adamw8bit', but bitsandbytes is not installed: {advice}"
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    return optimizer


def learning_rate(config: OptimConfig, step: int) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then the schedule."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    if config.schedule == "linear":
        return config.lr * max(0.0, 1.0 - progress)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use `value` in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


@dataclass
class LossScale:
    """Dynamic loss scale for fp16: halved when gradients overflow, doubled after `interval` clean steps.

    Kept as plain numbers (not torch.amp.GradScaler) so that it is saved as JSON and needs no collective call:
    every process sees the same reduced gradient norm. Disabled (`value` 1, never changed) for fp32 and bf16.
    """

    enabled: bool
    value: float = 1.0
    clean: int = 0
    interval: int = 2000

    @classmethod
    def for_precision(cls, precision: torch.dtype) -> LossScale:
        """Scaling from 2^16 for float16, none for other dtypes."""
        enabled = precision == torch.float16
        return cls(enabled, 2.0**16 if enabled else 1.0)

    def update(self, finite: bool) -> None:
        """Adapt after a step."""
        if not self.enabled:
            return
        if not finite:
            self.value, self.clean = self.value / 2, 0
            return
        self.clean += 1
        if self.clean == self.interval:
            self.value, self.clean = self.value * 2, 0

    def can_shrink(self) -> bool:
        """Whether an overflow may be the scale's fault rather than the model's."""
        return self.enabled and self.value > 1.0

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        return asdict(self)


class WeightAverage:
    """Exponential moving average of the trainable weights in float32.

    The decay warms up as `(1 + n) / (10 + n)`, so that the initial weights do not dominate early averages.
    """

    def __init__(self, parameters: Sequence[Parameter], decay: float):
        self.parameters = list(parameters)
        self.decay = decay
        self.shadow: list[Tensor] = [p.detach().clone().float() for p in self.parameters]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the current weights; `updates` counts the updates before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        current = [p.detach().float() for p in self.parameters]
        torch._foreach_lerp_(self.shadow, current, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model carries the averaged weights."""
        kept = [p.detach().clone() for p in self.parameters]
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


def gradient_norm(parameters: Sequence[Parameter], scale: float = 1.0) -> Tensor:
    """2-norm of all gradients together (scalar, on the device) after division by the loss scale."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return full.float() / scale


@torch.no_grad()
def rescale_gradients(parameters: Sequence[Parameter], norm: float, clip: float, scale: float) -> None:
    """Undo the loss scale and clip to norm `clip` (0: no clipping), in one pass over the gradients."""
    factor = 1.0 if clip == 0 else min(1.0, clip / (norm + 1e-6))
    factor /= scale
    if factor != 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
