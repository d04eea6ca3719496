"""How far a tuned model has moved from its base, in nats, without a reward: a proxy for the KL divergence.

Both models' reverse processes are diffusions with the same noise, so by Girsanov's theorem the divergence of their
paths is an integral of squared differences of their noise predictions (the difference of the evidence lower bounds
of Kingma et al. 2021, "Variational Diffusion Models", eq. 13, when the base's samples are the data):

    KL = 1/2 int (-d lambda / dt) E || eps_tuned(x_t, t) - eps_base(x_t, t) ||^2 dt,   lambda = log(alpha^2 / sigma^2)

with x_t = alpha x_0 + sigma eps and x_0 a latent of a picture of the base model. It is a proxy because x_t is noised
from finished pictures rather than met on the way, because guidance is left out, and because a few times stand for
the integral. It is 0 exactly when both models predict the same. Its square root is the distance d in which
Gao et al. 2023 (arXiv 2210.10760) draw over-optimisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.conditioning import Conditioning
from diffalign.evaluation.prompts import EvalPrompt
from diffalign.evaluation.scoring import Images
from diffalign.evaluation.statistics import Interval, cluster_bootstrap
from diffalign.process import Process
from diffalign.randomness import generator

TIMES = 8
MAX_LOG_SNR = 12.0  # beyond this a picture is noise or clean to every number format; flows reach infinity


@dataclass(frozen=True)
class Drift:
    """Distance of a tuned model from its base.

    Fields:
        kl: nats per picture, with its 95 % interval over prompts. per_element: the same per latent element.
        rms: root mean square change of the predicted noise (1 is as large as the noise itself).
        pictures, times: how many base pictures and noise levels stand behind it.
    """

    kl: float
    interval: Interval
    per_element: float
    rms: float
    pictures: int
    times: int

    def as_json(self) -> dict[str, Any]:
        """The entry `drift` of `evaluation.json`; `distance` is the square root of `kl`."""
        return {
            "kl": self.kl,
            "interval": list(self.interval),
            "distance": self.kl**0.5,
            "per_element": self.per_element,
            "rms": self.rms,
            "pictures": self.pictures,
            "times": self.times,
        }


@dataclass(frozen=True)
class Probe:
    """Noised pictures of the base model that both models are asked about.

    Fields:
        latents: `[N, C, h, w]` float32. noise: `[K, N, C, h, w]`. times: `[K]`. conditioning: of `N` rows.
    """

    latents: Tensor
    noise: Tensor
    times: Tensor
    conditioning: Conditioning


def quadrature(process: Process, count: int = TIMES) -> tuple[Tensor, Tensor]:
    """Times `[K]` in the middle of `count` equal intervals of the schedule, and their weights `[K]` in the KL.

    A weight is half the fall of lambda = log(alpha^2 / sigma^2), clipped to +-12, over its interval.
    """
    edges = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    if not process.is_flow:
        last = process.num_timesteps - 1
        edges, middles = (edges * last).round().long(), (middles * last).round().long()
    log_snr = process.snr(edges).double().log().clamp(-MAX_LOG_SNR, MAX_LOG_SNR)
    times = middles.float() if process.is_flow else middles
    return times, (log_snr[:-1] - log_snr[1:]) / 2


def path_kl(difference: Tensor, weights: Tensor) -> Tensor:
    """KL proxy of each sample in nats, `[B]` float64.

    Args:
        difference: noise predicted by the tuned minus that by the base model, `[K, B, ...]`.
        weights: `[K]`, as from `quadrature`.
    """
    squares = difference.double().square().flatten(2).sum(2)
    return (weights.double()[:, None].to(squares.device) * squares).sum(0)


def make_probe(
    backbone: Backbone, images: Images, prompts: Sequence[EvalPrompt], times: Tensor, batch_size: int = 8
) -> Probe:
    """Encode base pictures `[N, 3, H, W]` in [0, 1] and draw their noise, which belongs to prompt and seed."""
    parts = []
    for start in range(0, len(prompts), batch_size):
        pixels = images[start : start + batch_size].float() * 2 - 1
        parts.append(backbone.encode(pixels)[0].cpu())
    latents = torch.cat(parts)
    draws = [generator("drift", prompt.text, prompt.seed) for prompt in prompts]
    noise = torch.stack([torch.randn(len(times), *latents.shape[1:], generator=g) for g in draws], 1)
    return Probe(latents, noise, times, _conditioning(backbone, prompts))


def predicted_noise(backbone: Backbone, probe: Probe, batch_size: int = 8) -> Tensor:
    """The noise `[K, N, C, h, w]` that a model sees in the probe: float32, on the CPU, without guidance.

    Inside `backbone.reference()` it is the frozen model's.
    """
    process, device = backbone.process, backbone.device
    found = torch.empty_like(probe.noise)
    with backbone.inference():
        for k, time in enumerate(probe.times):
            for start in range(0, len(probe.latents), batch_size):
                rows = slice(start, start + batch_size)
                x0, eps = probe.latents[rows].to(device), probe.noise[k, rows].to(device)
                t = time.expand(len(x0)).to(device)
                x_t = process.noise(x0, eps, t)
                cond = probe.conditioning.select(range(*rows.indices(len(probe.latents)))).to(device)
                found[k, rows] = process.to_eps(backbone.predict(x_t, t, cond), x_t, t).cpu()
    return found


def drift(
    process: Process, probe: Probe, base: Tensor, tuned: Tensor, prompts: Sequence[EvalPrompt]
) -> Drift:
    """Distance of two models from what they predict for the same probe, `[K, N, C, h, w]` each."""
    difference = tuned.double() - base.double()
    _, weights = quadrature(process, len(probe.times))
    per_picture = path_kl(difference, weights).numpy()
    labels = [prompt.text for prompt in prompts]
    elements = difference[0, 0].numel()
    low, high = cluster_bootstrap(per_picture, labels)
    kl = float(per_picture.mean())
    rms = float(difference.square().mean().sqrt())
    return Drift(kl, (low, high), kl / elements, rms, len(prompts), len(probe.times))


def _conditioning(backbone: Backbone, prompts: Sequence[EvalPrompt]) -> Conditioning:
    """Text conditioning with the sizes that the pipeline uses: the picture's own, without a crop."""
    cond = backbone.encode_prompts([prompt.text for prompt in prompts])
    size = torch.tensor([backbone.resolution] * len(prompts))
    return backbone.with_sizes(cond, size, torch.zeros_like(size), size)
