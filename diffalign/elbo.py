"""The likelihood back-end of offline objectives: errors of policy and reference on one noised batch of pairs.

The evidence lower bound of a diffusion model is, up to constants and time weights, minus its squared prediction
error; a log-ratio of two models is a difference of such errors at shared noise and time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.conditioning import Conditioning
from diffalign.data.batch import PairBatch
from diffalign.objectives.pairwise import error_delta, error_overlap, squared_error


@dataclass(frozen=True)
class NoisedPairs:
    """Chosen rows, then rejected rows, noised alike: `x_t`, `target` `[2B, C, H, W]`, `t` `[2B]`."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    conditioning: Conditioning


@dataclass(frozen=True)
class PairErrors:
    """Per pair `[B]`, float32: the policy's errors and its errors minus the reference's.

    `overlap` is the mean product of the chosen and the rejected error vector, without gradient: how far a step
    that makes the rejected one worse makes the chosen one worse, too.
    """

    chosen_error: Tensor
    rejected_error: Tensor
    chosen_delta: Tensor
    rejected_delta: Tensor
    overlap: Tensor

    def averaged(self, weight: Tensor | float, draws: int) -> PairErrors:
        """Errors of `draws` x B rows times `weight`, averaged over the draws of each pair to `[B]`."""
        values = {f.name: getattr(self, f.name) * weight for f in fields(self)}
        return PairErrors(**{name: value.reshape(draws, -1).mean(0) for name, value in values.items()})


def noise_pairs(backbone: Backbone, batch: PairBatch, t: Tensor, noise: Tensor) -> NoisedPairs:
    """Noise both images of each pair with the same `noise` `[B, C, H, W]` at the same time `t` `[B]`."""
    device = backbone.device
    x0 = torch.cat([batch.chosen, batch.rejected]).to(device, torch.float32)
    eps = torch.cat([noise, noise]).to(device)
    times = torch.cat([t, t]).to(device)
    conditioning = Conditioning.concat([batch.conditioning_chosen, batch.conditioning_rejected]).to(device)
    process = backbone.process
    return NoisedPairs(process.noise(x0, eps, times), times, process.target(x0, eps, times), conditioning)


def reference_errors(backbone: Backbone, pairs: NoisedPairs) -> Tensor:
    """The reference's errors `[2B]`, chosen rows first; to be called before the first training step.

    Under full fine-tuning the network itself is asked: until then it is the reference, and needs no copy.
    """
    frozen = backbone.config.tune != "full"
    with backbone.inference():
        return squared_error(
            backbone.predict(pairs.x_t, pairs.t, pairs.conditioning, reference=frozen), pairs.target
        )


def pair_errors(backbone: Backbone, pairs: NoisedPairs, stored: Tensor | None = None) -> PairErrors:
    """Errors of policy and reference, chosen and rejected in one forward each.

    `stored` `[2B]` replaces the reference forward by errors computed earlier for the same draws.
    """
    if stored is None:
        reference = backbone.predict(pairs.x_t, pairs.t, pairs.conditioning, reference=True)
        policy = backbone.predict(pairs.x_t, pairs.t, pairs.conditioning)
        error = squared_error(policy.detach(), pairs.target)
        delta = error_delta(policy, reference, pairs.target)
    else:
        policy = backbone.predict(pairs.x_t, pairs.t, pairs.conditioning)
        loss = squared_error(policy, pairs.target)
        error, delta = loss.detach(), loss - stored.to(loss.device)
    chosen_error, rejected_error = error.chunk(2)
    chosen_delta, rejected_delta = delta.chunk(2)
    overlap = error_overlap(policy, pairs.target)
    return PairErrors(chosen_error, rejected_error, chosen_delta, rejected_delta, overlap)


def policy_errors(backbone: Backbone, pairs: NoisedPairs) -> tuple[Tensor, Tensor]:
    """The policy's errors `[B]` of chosen and rejected with gradients, in one forward; no reference is asked."""
    chosen, rejected = squared_error(
        backbone.predict(pairs.x_t, pairs.t, pairs.conditioning), pairs.target
    ).chunk(2)
    return chosen, rejected
