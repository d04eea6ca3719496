"""Problems for steering methods: tiny random models, and a world in which everything is known.

In that world data are independent Gaussians with mean `MEAN` and deviation `DEVIATION`, the network is exact, decoding
takes the first three channels, and the reward is one pixel. The density `p(x) exp(s r(x))` is then the same Gaussian
with the pixel's mean raised by `s DEVIATION^2`.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from diffalign.backbones import open_backbone
from diffalign.config import ModelConfig
from diffalign.inference.budget import Budget, Meter
from diffalign.inference.generation import Generation
from diffalign.inference.objective import Objective
from diffalign.inference.problem import Problem
from diffalign.inference.trace import begun
from diffalign.process import expand_as
from diffalign.rewards import RewardOutput
from diffalign.sampling.transition import Kernel

MEAN, DEVIATION = 0.5, 0.8


class Pixel:
    """The value of one pixel of one channel."""

    name, modality, differentiable, kind = "pixel", "image", True, "sample"

    def score(self, media, prompts):
        return RewardOutput(media[:, 0, 1, 2])


class SeenPixel(Pixel):
    """What is to be expected of that pixel, told of noisy latents without a network."""

    name = "seen-pixel"

    def __init__(self, process):
        self.process = process

    def score_step(self, latents, times, prompts):
        return expected(self.process, latents, times)[:, 0, 1, 2]


def expected(process, x, t):
    """E[x_0 | x_t] of the Gaussian data."""
    alpha, sigma = (expand_as(level, x) for level in process.alpha_sigma(t))
    share = alpha * DEVIATION**2 / (alpha.square() * DEVIATION**2 + sigma.square())
    return MEAN + share * (x - alpha * MEAN)


@lru_cache
def gaussian(path):
    """A model whose network and decoder are those of the Gaussian world; nothing of it changes."""
    backbone = open_backbone(ModelConfig(path=str(path), precision="fp32"), device="cpu")
    process = backbone.process
    backbone.predict = lambda x, t, cond, reference=False: process.from_x0(expected(process, x, t), x, t)
    backbone.decode = lambda latents: latents[:, :3]
    return backbone


def problem(backbone, reward, prompts, steps, *, kernel=None, batch_size=64, evaluations=None):
    """A problem with the seeds 0, 1, ... and a trace that has seen its first pictures."""
    generation = Generation(
        backbone, prompts, steps=steps, guidance=1.0, kernel=kernel, batch_size=batch_size
    )
    seeds = list(range(len(prompts)))
    start, objective = generation.start(seeds), Objective(reward)
    media = generation.media(start)
    with torch.no_grad():
        rewards = objective(media, prompts)
    meter = Meter(Budget(evaluations=evaluations), len(prompts))
    found = Problem(generation, objective, meter, start, seeds, "all")
    generation.evaluations = 0
    return found, begun(meter, start, rewards, media, shown=0)


def ran(path, method, steps=4, evaluations=None):
    """The problem and the trace after a method's run on two prompts of the Gaussian world."""
    found, trace = problem(
        gaussian(path), Pixel(), ["x", "y"], steps, kernel=noise(), evaluations=evaluations
    )
    method.run(found, trace)
    return found, trace


def noise(kind="ddim", level=1.0):
    """A kernel that draws noise."""
    return Kernel(kind, level)
