"""Tiny random few-step models and rewards without weights, for the tests of this room."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from tiny import build_few_step

from diffalign.backbones import Backbone, open_backbone
from diffalign.config import ModelConfig
from diffalign.rewards import FunctionReward, RewardOutput

PROMPTS = ["a red circle", "two blue squares"]


@lru_cache
def folder(sampler: str, width: int | None = None) -> Path:
    """A random SDXL-type pipeline with a scheduler of `tiny.FEW_STEPS`."""
    return build_few_step(Path(mkdtemp()) / sampler, sampler, width, sdxl=True)


def fresh_turbo() -> Backbone:
    """A random SDXL-Turbo, opened anew, for tests that change it."""
    return open_backbone(ModelConfig(path=str(folder("sdxl-turbo")), precision="fp32"), device="cpu")


@lru_cache
def turbo() -> Backbone:
    """The same one for all other tests."""
    return fresh_turbo()


@lru_cache
def consistency() -> Backbone:
    """A random consistency model that is told its guidance."""
    return open_backbone(ModelConfig(path=str(folder("lcm", 8)), precision="fp32"), device="cpu")


class Redness:
    """Red less blue of the mean pixel; has gradients, and may give NaN to prompts with a word."""

    name, modality, differentiable, kind = "redness", "image", True, "sample"

    def __init__(self, nan_for: str | None = None, after: int = 0, gradient_only: bool = False) -> None:
        self.nan_for, self.after, self.gradient_only, self.calls = nan_for, after, gradient_only, 0

    def score(self, media, prompts):
        self.calls += 1
        mean = media.mean((2, 3))
        score = mean[:, 0] - mean[:, 2]
        bad = [self.nan_for is not None and self.nan_for in p and self.calls > self.after for p in prompts]
        if self.gradient_only and score.requires_grad:
            score.register_hook(lambda gradient: torch.where(torch.tensor(bad), torch.nan, gradient))
        elif not self.gradient_only:
            score = torch.where(torch.tensor(bad), torch.nan, score)
        return RewardOutput(score)


def mean_of_red(images, prompts):
    """A black box."""
    return images[:, 0].mean((1, 2))


RED = FunctionReward(mean_of_red, "red")
