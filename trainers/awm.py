"""Advantage-weighted matching (Xue et al. 2025, arXiv 2509.25050): a policy gradient on the matching error.

Minus a function of a noised sample's matching error takes the place of its log-probability. What follows is PPO: the
ratio to the old policy at the same noise, clipped, times the advantage. Any solver may draw the samples, and with one
update per round the gradient is that of the pre-training loss, each sample weighted by its signed advantage.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.objectives.forms import Form
from diffalign.objectives.pairwise import squared_error
from diffalign.objectives.policy import linear_bound
from diffalign.objectives.weighted import Weighting, clipped_policy_loss, matching_log_prob
from diffalign.trainers.forward_online import (
    Noised,
    OldPolicy,
    RelativeOptions,
    RelativeTrainer,
    Retained,
)
from diffalign.trainers.online import Losses
from diffalign.trainers.online_rows import CleanRows


class AWMConfig(RelativeOptions):
    """Advantage-weighted matching."""

    method: Literal["awm"] = "awm"
    weighting: Weighting = "ghuber"
    """What the log-probability is made of the error e: uniform -e, sigma -sigma e, sigma2 -sigma^2 e, huber a root of
    e, ghuber its power `power`; the last two also weigh by sigma, and hardly listen to large errors."""
    power: float = Field(default=0.25, gt=0, le=1)
    """Exponent of ghuber."""
    surrogate: Literal["clip", "bound"] = "clip"
    """clip: PPO's, of the ratio at each draw. bound: BGPO's bound of the ratio of a sample's mean over its
    `noise_levels` draws, without a clip; `trust` and `kl` hold it."""
    clip_range: float = Field(default=1.0, gt=0)
    """Ratios beyond 1 - clip_range and 1 + clip_range have no gradient. It belongs to `weighting` and to errors that
    are means over elements: 1 (the authors') with ghuber hardly ever acts; Flow-Factory uses 1e-5."""
    form: Form = "velocity"
    """What errors are taken of. output: what the network predicts, which for eps models does not blow up at high
    noise."""
    retention: Retained = "copy"
    """Share of itself that the old policy, which draws the samples, keeps when a round begins; as for nft."""
    trust: float = Field(default=1.0, ge=0)
    """Weight of the squared distance to the old policy's output."""


class AWMTrainer(RelativeTrainer):
    """Ratios of matching errors, times advantages."""

    Config = AWMConfig

    def __init__(self, config: AWMConfig, backbone: Backbone, seed: int = 0) -> None:
        super().__init__(config, backbone, seed)
        self.old = OldPolicy(backbone, config.retention)
        self._advantage = Tensor()

    def _judge(self, advantages: Tensor) -> None:
        self._advantage = advantages / self.config.clip

    def loss(self, batch: CleanRows) -> Losses:
        """Losses and metrics `[B]`."""
        config, noised = self.config, self._noised(batch)
        policy = self._predict(noised)
        old = self._old(noised, policy)
        log_prob, old_log_prob = self._log_prob(policy, noised), self._log_prob(old, noised)
        advantage = self._advantage[batch.sample.cpu()].to(policy.device)
        if config.surrogate == "clip":
            losses = clipped_policy_loss(log_prob, old_log_prob, advantage, config.clip_range)
        else:
            losses = linear_bound(log_prob - old_log_prob, advantage)
        ratio = (log_prob.detach() - old_log_prob).exp()
        distance = squared_error(policy, old)
        metrics = {
            "ratio": ratio,
            "clipped_high": (ratio > 1 + config.clip_range).float(),
            "clipped_low": (ratio < 1 - config.clip_range).float(),
            "log_prob": log_prob.detach(),
            "old_distance": distance.detach(),
        }
        if config.trust:
            losses = losses + config.trust * distance
        if config.kl:
            reference = squared_error(policy, self._reference(noised))
            losses, metrics["reference_distance"] = losses + config.kl * reference, reference.detach()
        return losses, metrics

    def _log_prob(self, output: Tensor, noised: Noised) -> Tensor:
        """What stands for the log-probability `[B]`."""
        form, config = self.config.form, self.config
        error = squared_error(self._in_form(form, output, noised), self._in_form(form, noised.target, noised))
        sigma = self.backbone.process.alpha_sigma(noised.t)[1]
        return matching_log_prob(error, sigma, config.weighting, config.power)
