"""A reward of noisy latents: Bradley-Terry on a frozen generator's hidden states, noise and time shared by a pair.

Flow-NRG's time-dependent reward `r(x_t, t, y)` (Liu et al. 2025, arXiv 2501.13918, section 4.3) and LPO's latent reward
model (Zhang et al. 2025, arXiv 2502.01051, section 4.1), with the network frozen:

    x_t = alpha(t) x_0 + sigma(t) eps      eps and t the same for both pictures of a pair
    L = -log sigmoid(r(x_t^chosen, t, y) - r(x_t^rejected, t, y))

The finished run is a reward: `method.scorer` of guidance, `trainer.reward` of SPO and LPO.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.data.batch import PairBatch
from diffalign.elbo import NoisedPairs, noise_pairs
from diffalign.objectives.reward_model import bradley_terry_loss, credit, smoothed
from diffalign.randomness import Draw
from diffalign.sampling.latent_scorer import LatentScorer
from diffalign.trainers.pairs import Forwards, Losses, PairOptions, PairTrainer, averaged


class LatentRewardConfig(PairOptions):
    """Rewards of noisy latents."""

    method: Literal["latent_reward"] = "latent_reward"
    layer: str | None = None
    """Module of the generator's network whose hidden states are read; later ones cost more. null: `mid_block` of a
    UNet, the middle one of `transformer_blocks` of SD3 and FLUX."""
    guidance: float = Field(default=7.5, ge=0)
    """What the caption changes in the states is multiplied by this, as in guided sampling (LPO: 7.5). 1 halves the
    cost."""
    hidden: int = Field(default=64, ge=1)
    """Units of the head."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout in the head."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of wrong labels; 0 trusts every label, and margins then grow without end."""


class LatentRewardTrainer(PairTrainer):
    """The loss of a head on noised pairs."""

    Config = LatentRewardConfig
    tunes: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(self, config: LatentRewardConfig, backbone: LatentScorer, seed: int = 0) -> None:
        super().__init__(config, backbone.generator, seed)
        self.scorer = backbone

    @classmethod
    def forwards(cls, config: LatentRewardConfig) -> Forwards:
        """All without gradients in the network, and only up to the layer."""
        return Forwards(0.0, 0.0, config.times_per_pair * (1.0 if config.guidance == 1 else 2.0))

    def loss(self, batch: PairBatch) -> Losses:
        """Losses `[B]`, means over the draws of a pair, and metrics `[B]`."""
        times = self.config.times_per_pair
        margin = self.margins(self._noised(batch, times))
        preference = batch.preference.to(margin.device).repeat(times)
        losses = bradley_terry_loss(margin, smoothed(preference, self.config.label_smoothing))
        weight = batch.weight.to(margin.device)
        metrics = {"accuracy": credit(margin, preference), "margin": margin}
        return averaged(losses, times) * weight, {k: averaged(v.detach(), times) for k, v in metrics.items()}

    def margins(self, noised: NoisedPairs) -> Tensor:
        """Score of chosen minus rejected `[B]`: log-odds of the choice."""
        chosen, rejected = self.scorer(noised.x_t, noised.t, noised.conditioning).chunk(2)
        return chosen - rejected

    @torch.no_grad()
    def margins_between(self, batch: PairBatch, draw: Draw, low: float, high: float) -> Tensor:
        """Margins `[B]` without dropout, at times of a draw between two shares of the schedule (0 is clean)."""
        uniform = low + (high - low) * draw.uniform("time", stratified=True)
        noise = draw.normal(tuple(batch.chosen.shape[1:]), "noise")
        noised = noise_pairs(self.backbone, batch, self.backbone.process.times(uniform), noise)
        training = self.scorer.network.training
        self.scorer.network.eval()
        margins = self.margins(noised)
        self.scorer.network.train(training)
        return margins
