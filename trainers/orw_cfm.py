"""ORW-CFM-W2 (Fan et al. 2025, arXiv 2502.06061): imitate the policy's own samples, the better the more, near the base.

Round after round the samples of the current policy are weighted by `exp(tau r)`; the loss is that of flow matching
(or denoising), plus alpha times the squared distance to the reference's output, a bound on the Wasserstein-2 distance.
Without it the policy collapses to the best sample it knows: each round multiplies the density by the weight once more.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.objectives.forms import Form
from diffalign.objectives.pairwise import squared_error
from diffalign.objectives.rewarded import exponential_weights
from diffalign.objectives.weighted import anchored_error
from diffalign.sampling.collection import Collected
from diffalign.trainers.forward_online import ForwardOptions, ForwardTrainer
from diffalign.trainers.online import Losses, WholeRound, sample_weights, whole_round
from diffalign.trainers.online_rows import CleanRows, Rows


class ORWConfig(ForwardOptions):
    """Online reward-weighted matching with a Wasserstein-2 anchor."""

    method: Literal["orw_cfm"] = "orw_cfm"
    times: Literal["sampling", "uniform", "logit_normal"] = "uniform"
    """Distribution of training times: all (the paper), those that the samples were drawn at, or for flows
    logit-normal."""
    tau: float = Field(default=0.5, gt=0)
    """Sharpness of the weights exp(tau r), in units of `scale`."""
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the squared distance to the reference. The authors advise at least 1; 0 collapses in the end."""
    scale: Literal["deviation", "raw"] = "deviation"
    """Unit of rewards: their standard deviation over the round, or as they are (the release)."""
    within: Literal["group", "round"] = "group"
    """Among which samples weights have mean 1. group: those of one prompt, so that easy prompts do not outweigh hard
    ones."""
    max_weight: float = Field(default=20.0, gt=1)
    """Larger weights are cut to this."""
    form: Form = "output"
    """What errors and distances are taken of: the network's output, the velocity (for flows the same), or x0."""


class ORWTrainer(ForwardTrainer):
    """Weighted matching errors of noised samples, and the distance to the reference."""

    Config = ORWConfig

    def __init__(self, config: ORWConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self._weight = Tensor()

    @classmethod
    def needs_frozen_copy(cls, config: Any, tune: str) -> bool:
        """Whether a second network has to be loaded: none is with alpha 0."""
        return config.alpha > 0 and super().needs_frozen_copy(config, tune)

    def learn(self, collected: Collected) -> tuple[Rows, dict[str, float]]:
        """A weight for every sample that has a reward."""
        certainty = sample_weights(collected, self.config.uncertainty)
        self._weight = round_weights(whole_round(self.gather, collected), self.config) * certainty
        known = collected.rewards.isfinite()
        weight = self._weight[known]
        return self._rows(collected, known), {
            "used": float(known.float().mean()),
            "largest_weight": float(weight.max()) if len(weight) else 0.0,
            "effective_share": effective_share(weight),
        }

    def loss(self, batch: CleanRows) -> Losses:
        """Losses and metrics `[B]`."""
        noised, form = self._noised(batch), self.config.form
        output, target = self._predict(noised), noised.target
        policy, target = self._in_form(form, output, noised), self._in_form(form, target, noised)
        weight = self._weight[batch.sample.cpu()].to(policy.device)
        metrics = {"weight": weight}
        if not self.config.alpha:
            error = squared_error(policy, target)
            return weight * error, metrics | {"error": error.detach()}
        reference = self._in_form(form, self._reference(noised), noised)
        losses, distance = anchored_error(policy, reference, target, weight, self.config.alpha)
        error = squared_error(policy.detach(), target)
        return losses, metrics | {"error": error, "reference_distance": distance}


def round_weights(whole: WholeRound, config: ORWConfig) -> Tensor:
    """Weights `[N]` of this process's samples: `exp(tau r)` over its mean, in the round or in each group; 0 where r is
    unknown.
    """
    known = whole.rewards.isfinite()
    rewards = whole.rewards[known].double()
    deviation = float(rewards.std(correction=0)) if len(rewards) else 0.0
    if config.scale == "deviation" and deviation > 0:
        rewards = rewards / deviation
    groups = whole.places[known] if config.within == "group" else torch.zeros(len(rewards)).long()
    weights = torch.zeros_like(rewards)
    for group in groups.unique():
        rows = groups == group
        weights[rows] = exponential_weights(rewards[rows], 1 / config.tau)
    everyone = torch.zeros(len(whole.rewards))
    everyone[known] = weights.clamp(max=config.max_weight).float()
    return everyone[whole.own]


def effective_share(weights: Tensor) -> float:
    """`(sum w)^2 / (n sum w^2)`: the share of samples that would say as much if all weighed the same."""
    squares = float(weights.double().square().sum())
    return float(weights.double().sum()) ** 2 / (len(weights) * squares) if squares else 0.0
