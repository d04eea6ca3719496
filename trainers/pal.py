"""PAL: one reward for many tastes. Each user is a mixture of a few prototypes (Chen et al. 2024, arXiv 2406.08469).

PAL-A, eq. 3: `r_u(x) = -|f(x) - a_u|` with the ideal point `a_u = sum_k w_uk p_k`. PAL-B: `r_u(x) = cos(f(x),
sum_k w_uk g_k(prompt))`. The mixture weights `w_u` are a softmax; a new user is fitted by them alone.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from diffalign.data.features import JudgedPairs
from diffalign.data.judged import OVERALL, JudgedBatch
from diffalign.objectives.reward_model import bradley_terry_loss, credit, smoothed
from diffalign.randomness import Draw
from diffalign.rewards.heads import PALHead, PALSpec
from diffalign.strict import StrictModel
from diffalign.trainers.reward_model import Losses, pair_scores

FIT_STEPS, FIT_RATE = 200, 0.1


class PALConfig(StrictModel):
    """PAL."""

    method: Literal["pal"] = "pal"
    form: Literal["distance", "angle"] = "distance"
    """distance (PAL-A): users are points among the pictures. angle (PAL-B): users are directions that follow the
    prompt, compared with the picture's embedding."""
    prototypes: int = Field(default=2, ge=1)
    """Kinds of taste; 1 is an ordinary reward model for everybody. The paper finds 2 enough for Pick-a-Pic."""
    loss: Literal["logistic", "hinge"] = "logistic"
    """logistic gives probabilities; hinge asks for a margin of one."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of wrong labels, for the logistic loss."""
    size: int = Field(default=64, ge=1)
    """Dimension of the space of ideal points; the paper uses 512."""
    hidden: int = Field(default=0, ge=0)
    """Units of the map to it (distance only); 0 makes it linear, which fewer pairs can teach."""
    user_rate: float = Field(default=10.0, gt=0)
    """How much faster users' weights and ideal points learn than the rest; the authors use 5e-3 against 1e-4."""


class PALTrainer:
    """The loss of PAL on judged pairs with users; pairs without one are judged by the population's mean."""

    Config = PALConfig
    data_kinds = ("judgements",)
    needs: ClassVar[dict[str, tuple[str, ...]]] = {"judgements": ("user",)}
    tunes = ("head", "full")

    def __init__(self, config: PALConfig, backbone: Any, seed: int = 0) -> None:
        self.config, self.backbone, self.seed = config, backbone, seed
        self._pairs: JudgedPairs | None = None

    @staticmethod
    def spec(config: PALConfig, width: int, scale: float, names: tuple[str, ...], seed: int) -> PALSpec:
        """The head to train on embeddings of `width` for the users `names`."""
        return PALSpec(
            width,
            scale,
            config.form,
            config.prototypes,
            config.size,
            config.hidden,
            names,
            config.user_rate,
            seed,
        )

    @staticmethod
    def dimensions(config: PALConfig) -> tuple[str, ...]:
        """What is scored."""
        return (OVERALL,)

    def prepare(self, pairs: JudgedPairs) -> None:
        """Take the training pairs."""
        self._pairs = pairs

    def fetch(self, draw: Draw) -> JudgedBatch:
        """The batch of a draw.

        Raises:
            RuntimeError: `prepare` was not called.
        """
        if self._pairs is None:
            raise RuntimeError("PALTrainer.fetch needs data; call prepare(pairs) first")
        return self._pairs.fetch(draw)

    def loss(self, batch: JudgedBatch) -> Losses:
        """Losses and metrics, each `[B]`."""
        mean, _ = pair_scores(self.backbone.network, batch)
        margin, preference = (mean[:, :, 0] - mean[:, :, 1])[0, :, 0], batch.preference[:, 0]
        losses = self._losses(margin, preference) * batch.weight
        return losses, {"accuracy": credit(margin.detach(), preference), "margin": margin.detach()}

    def probability(self, margin: Tensor, variance: Tensor | None) -> Tensor:
        """Probability that the first image is labelled as preferred; any shape."""
        return smoothed(torch.sigmoid(margin), self.config.label_smoothing)

    def _losses(self, margin: Tensor, preference: Tensor) -> Tensor:
        if self.config.loss == "hinge":
            return preference * F.relu(1 - margin) + (1 - preference) * F.relu(1 + margin)
        return bradley_terry_loss(margin, smoothed(preference, self.config.label_smoothing))


def fit_users(
    head: PALHead,
    images: Tensor,
    texts: Tensor,
    preference: Tensor | None = None,
    pull: float = 0.05,
    steps: int = FIT_STEPS,
) -> Tensor:
    """Mixture weights `[U, K]` of new users, each from a few of their pairs; nothing else of the model changes.

    Args:
        images, texts: embeddings `[U, N, 2, D]` of the pairs, the chosen image first. preference: `[U, N]`, 1 if not
            given.
        pull: strength of the pull towards the population's mean mixture, as its cross-entropy: with 8 pairs a user
            who contradicts nobody stays near the middle instead of running to a corner.
    """
    users, pairs = images.shape[:2]
    target = torch.ones(users, pairs) if preference is None else preference
    with torch.no_grad():
        prior = head.weights(None, users)
    logits = prior.clamp(min=1e-6).log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=FIT_RATE)
    for _ in range(steps):
        weights = torch.softmax(logits, -1)
        each = weights.repeat_interleave(2 * pairs, 0)
        scores = head.scores(images.flatten(0, 2), texts.flatten(0, 2), each).view(users, pairs, 2)
        losses = bradley_terry_loss(scores[..., 0] - scores[..., 1], target).mean(1)
        # Users do not share a weight, so the sum fits each of them as if alone.
        total = (losses - pull * (prior * weights.log()).sum(1)).sum()
        (logits.grad,) = torch.autograd.grad(total, [logits])
        optimizer.step()
    return torch.softmax(logits, -1).detach()
