"""Reward models: scores of pictures for prompts, learned from which of two pictures people preferred.

Bradley and Terry 1952 with soft labels, Rao and Kupper 1967 for ties, a Gaussian score with its own spread
(HPSv3, arXiv 2508.03789), on heads over a frozen CLIP (`model.tune: head`) or with the CLIP (`full`, as PickScore,
arXiv 2305.01569). An ensemble is trained in one pass, each member with its own initial weights and its own
resampling of the pairs (Coste et al. 2023, arXiv 2310.02743; online bootstrap, Oza and Russell 2001).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from diffalign.data.features import JudgedPairs
from diffalign.data.judged import OVERALL, JudgedBatch
from diffalign.objectives.reward_model import (
    bradley_terry_loss,
    credit,
    hpsv3_loss,
    probit_loss,
    sampled_loss,
    smoothed,
    ties_loss,
    win_probability,
)
from diffalign.randomness import Draw, generator
from diffalign.rewards.heads import PreferenceSpec, Scores
from diffalign.strict import StrictModel

Losses = tuple[Tensor, dict[str, Tensor]]
UNCERTAIN = ("probit", "monte_carlo", "hpsv3")


class RewardModelConfig(StrictModel):
    """Reward models on judged pairs."""

    method: Literal["reward_model"] = "reward_model"
    head: Literal["bilinear", "mlp"] = "bilinear"
    """bilinear starts as the CLIP's own score and turns both embeddings (PickScore-like); mlp sees image, text and
    their product, and starts from nothing."""
    loss: Literal["bradley_terry", "ties", "probit", "monte_carlo", "hpsv3"] = "bradley_terry"
    """ties: Rao-Kupper, where a tie says that two scores are close (set `data.ties` to half). probit, monte_carlo:
    each score has a spread of its own, by a closed form or by samples. hpsv3: as its authors', which pulls spreads
    to 0."""
    tie_factor: float = Field(default=5.0, gt=1)
    """k of the loss `ties`: scores within log k are likely to be called a tie. 5 in VideoReward."""
    samples: int = Field(default=100, ge=1)
    """Samples a pair of monte_carlo and hpsv3; HPSv3 takes 1000."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of wrong labels; 0 trusts every label, and margins then grow without end."""
    dimensions: list[str] = Field(default=[OVERALL], min_length=1)
    """What is scored: `overall` (a record's own label) and names of its `labels`; pairs teach those they have."""
    members: int = Field(default=1, ge=1)
    """Models in the ensemble; all are trained in one pass and cost little on a frozen CLIP."""
    resampling: Literal["bootstrap", "folds", "none"] = "bootstrap"
    """What makes members differ besides their seeds: Poisson weights on the pairs, a left-out fold each, or nothing."""
    hidden: int = Field(default=256, ge=1)
    """Units of the mlp."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the features; above 0 the reward can be sampled (MC-dropout)."""

    @field_validator("dimensions")
    @classmethod
    def _dimensions_differ(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("names should differ from each other")
        return value


class RewardModelTrainer:
    """The loss of a reward model on judged pairs."""

    Config = RewardModelConfig
    data_kinds = ("judgements",)
    tunes = ("head", "full")

    def __init__(self, config: RewardModelConfig, backbone: Any, seed: int = 0) -> None:
        self.config, self.backbone, self.seed = config, backbone, seed
        self._pairs: JudgedPairs | None = None
        self._resampled = torch.ones(0, config.members)

    @staticmethod
    def spec(
        config: RewardModelConfig, width: int, scale: float, names: tuple[str, ...], seed: int
    ) -> PreferenceSpec:
        """The head to train on embeddings of `width`, from a CLIP with logit scale `scale`."""
        return PreferenceSpec(
            width,
            scale,
            config.head,
            config.members,
            tuple(config.dimensions),
            config.loss in UNCERTAIN,
            config.hidden,
            config.dropout,
            seed,
        )

    @staticmethod
    def dimensions(config: RewardModelConfig) -> tuple[str, ...]:
        """What is scored."""
        return tuple(config.dimensions)

    def prepare(self, pairs: JudgedPairs) -> None:
        """Take the training pairs and draw each member's weights on them."""
        self._pairs = pairs
        single = self.config.members == 1
        how = "none" if single else self.config.resampling
        self._resampled = member_weights(len(pairs), self.config.members, how, self.seed)

    def fetch(self, draw: Draw) -> JudgedBatch:
        """The batch of a draw.

        Raises:
            RuntimeError: `prepare` was not called.
        """
        if self._pairs is None:
            raise RuntimeError("RewardModelTrainer.fetch needs data; call prepare(pairs) first")
        return self._pairs.fetch(draw)

    def loss(self, batch: JudgedBatch) -> Losses:
        """Losses `[B]`, means over members and judged dimensions, and metrics `[B]`."""
        mean, log_std = pair_scores(self.backbone.network, batch)
        margin = mean[:, :, 0] - mean[:, :, 1]
        variance = None if log_std is None else (2 * log_std).exp().sum(2)
        judged = batch.preference.isfinite()
        preference = torch.where(judged, batch.preference, 0.5)
        losses = self._losses(margin, variance, preference, batch.draw)
        each = (losses * judged).sum(-1) / judged.sum(-1).clamp(min=1)
        weights = self._resampled[torch.as_tensor(list(batch.draw.records))].T.to(each.device)
        first = margin[..., 0].mean(0)
        metrics = {"accuracy": credit(first, preference[:, 0]), "margin": first}
        if variance is not None:
            metrics["spread"] = variance[..., 0].mean(0).sqrt()
        total = (weights * each).mean(0) * batch.weight
        return total, {name: value.detach() for name, value in metrics.items()}

    def probability(self, margin: Tensor, variance: Tensor | None) -> Tensor:
        """Probability that the first image is labelled as preferred, given that the pair is decided; any shape."""
        k = self.config.tie_factor if self.config.loss == "ties" else 1.0
        return smoothed(win_probability(margin, variance, k), self.config.label_smoothing)

    def _losses(self, margin: Tensor, variance: Tensor | None, preference: Tensor, draw: Draw) -> Tensor:
        """Losses `[M, B, K]`."""
        target, loss = smoothed(preference, self.config.label_smoothing), self.config.loss
        if loss == "ties":
            return _ties_with_errors(margin, preference, self.config)
        if variance is None:
            return bradley_terry_loss(margin, target)
        if loss == "probit":
            return probit_loss(margin, variance, target)
        kinds = margin.shape[-1]
        noise = draw.normal((self.config.samples, kinds), "spread").to(margin.device).transpose(0, 1)
        by_samples = sampled_loss if loss == "monte_carlo" else hpsv3_loss
        return by_samples(margin, variance, target, noise[:, None])


def pair_scores(network: nn.Module, batch: JudgedBatch) -> Scores:
    """Scores `[M, B, 2, K]` of both images of each pair in one forward pass, and the logarithm of their spread."""
    texts = list(batch.prompts) if batch.texts is None else batch.texts.flatten(0, 1)
    mean, log_std = network(batch.images.flatten(0, 1), texts, batch.users.repeat_interleave(2))
    shape = (-1, 2)
    return mean.unflatten(1, shape), None if log_std is None else log_std.unflatten(1, shape)


def member_weights(count: int, members: int, how: str, seed: int) -> Tensor:
    """Weight `[N, M]` of each pair for each member, with mean 1 (in expectation for `bootstrap`).

    bootstrap: Poisson(1), the online bootstrap. folds: member m never sees fold m. none: all ones.
    """
    if how == "bootstrap":
        ones = torch.ones(count)
        columns = [torch.poisson(ones, generator(seed, "bootstrap", m)) for m in range(members)]
        return torch.stack(columns, 1)
    if how == "none":
        return torch.ones(count, members)
    fold = torch.randperm(count, generator=generator(seed, "folds")) % members
    return (fold[:, None] != torch.arange(members)).float() * (members / (members - 1))


def _ties_with_errors(margin: Tensor, preference: Tensor, config: RewardModelConfig) -> Tensor:
    """The loss with ties when a share of the decided labels is the wrong way round."""
    wrong = config.label_smoothing
    kept = ties_loss(margin, preference, config.tie_factor)
    return (1 - wrong) * kept + wrong * ties_loss(margin, 1 - preference, config.tie_factor)
