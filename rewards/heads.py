"""Heads that turn image and text embeddings into scores: ensembles in one pass, and PAL's ideal points.

Every head is called as `head(images [B, D], texts [B, D], users [B] | None)` with L2-normalised embeddings and gives
`(mean, log_std)`: scores `[M, B, K]` of M ensemble members in K dimensions, and the logarithm of the spread each
member states, or None. A head is rebuilt from its `spec`, which is plain data.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.data.judged import ANYBODY
from diffalign.objectives.reward_model import angle_reward, bounded, distance_reward, ideal_points
from diffalign.randomness import generator

Scores = tuple[Tensor, Tensor | None]
# Spreads outside e^-5..e^5 say nothing more and make the loss stiff.
LOG_STD = 5.0
# CLIP's own bound on its temperature.
LARGEST_SCALE = 100.0


@dataclass(frozen=True)
class PreferenceSpec:
    """A preference head.

    Fields:
        width: size D of the embeddings. scale: the CLIP's logit scale, where `bilinear` starts.
        head: bilinear or mlp. members: ensemble size M. dimensions: what is scored, K names.
        uncertain: whether each score has a spread. hidden: units of the mlp. dropout: on the features.
        seed: of the initial weights; each member has its own.
    """

    width: int
    scale: float
    head: str = "bilinear"
    members: int = 1
    dimensions: tuple[str, ...] = ("overall",)
    uncertain: bool = False
    hidden: int = 256
    dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class PALSpec:
    """A PAL head.

    Fields:
        width, scale, seed: as in `PreferenceSpec`. form: distance (PAL-A) or angle (PAL-B).
        prototypes: number K of ideal points. size: their dimension. hidden: units of the map to it; 0 makes it linear.
        users: known users, in order of their weights. rate: how much faster users (and points) learn than the rest.
    """

    width: int
    scale: float
    form: str = "distance"
    prototypes: int = 2
    size: int = 64
    hidden: int = 0
    users: tuple[str, ...] = ()
    rate: float = 10.0
    seed: int = 0


class BilinearHead(nn.Module):
    """`scale <W_image image, W_text text>` per member and dimension; at first the CLIP's own score (PickScore-like)."""

    def __init__(self, spec: PreferenceSpec) -> None:
        super().__init__()
        self.spec = spec
        members, kinds, width = spec.members, len(spec.dimensions), spec.width
        identity = torch.eye(width).repeat(members, kinds, 1, 1)
        self.image_map, self.text_map = nn.Parameter(identity), nn.Parameter(identity.clone())
        self.log_scale = nn.Parameter(torch.full((members, kinds), math.log(spec.scale)))
        self.dropout = nn.Dropout(spec.dropout)
        self.spread = nn.Parameter(torch.zeros(members, kinds, 3 * width + 1)) if spec.uncertain else None

    def forward(self, images: Tensor, texts: Tensor, users: Tensor | None = None) -> Scores:
        """Scores `[M, B, K]` and the logarithm of their spread."""
        members = self.spec.members
        image = torch.einsum("mkij,mbj->mbki", self.image_map, self.dropout(_each(images, members)))
        text = torch.einsum("mkij,mbj->mbki", self.text_map, self.dropout(_each(texts, members)))
        mean = (image * text).sum(-1) * self.log_scale.exp()[:, None]
        if self.spread is None:
            return mean, None
        features = joint_features(images, texts)
        log_std = torch.einsum("mkf,bf->mbk", self.spread[..., :-1], features) + self.spread[:, None, :, -1]
        return mean, log_std.clamp(-LOG_STD, LOG_STD)


class MLPHead(nn.Module):
    """Two layers on image, text and their product, all members at once."""

    def __init__(self, spec: PreferenceSpec) -> None:
        super().__init__()
        self.spec = spec
        outputs = len(spec.dimensions) * (2 if spec.uncertain else 1)
        self.first = nn.Parameter(_drawn(spec, "first", spec.hidden, 3 * spec.width))
        self.first_bias = nn.Parameter(torch.zeros(spec.members, spec.hidden))
        self.second = nn.Parameter(0.1 * _drawn(spec, "second", outputs, spec.hidden))
        self.second_bias = nn.Parameter(torch.zeros(spec.members, outputs))
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, images: Tensor, texts: Tensor, users: Tensor | None = None) -> Scores:
        """Scores `[M, B, K]` and the logarithm of their spread."""
        features = self.dropout(_each(joint_features(images, texts), self.spec.members))
        hidden = torch.einsum("mhf,mbf->mbh", self.first, features) + self.first_bias[:, None]
        hidden = self.dropout(nn.functional.gelu(hidden))
        out = torch.einsum("moh,mbh->mbo", self.second, hidden) + self.second_bias[:, None]
        if not self.spec.uncertain:
            return out, None
        mean, log_std = out.chunk(2, -1)
        return mean, log_std.clamp(-LOG_STD, LOG_STD)


class PALHead(nn.Module):
    """A reward for each user: how near an item is to the user's mixture of prototypes (arXiv 2406.08469).

    distance (PAL-A): the item is a map of image, text and their product, prototypes are points of its space.
    angle (PAL-B): the item is a linear map of the image, prototypes are linear maps of the prompt.
    """

    def __init__(self, spec: PALSpec) -> None:
        super().__init__()
        self.spec = spec
        draws = generator(spec.seed, "pal")

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draws)

        if spec.form == "distance":
            self.item: nn.Module = _item_map(3 * spec.width, spec.hidden, spec.size)
            self.prototypes = nn.Parameter(normal(spec.prototypes, spec.size) / spec.rate)
        else:
            self.item = nn.Linear(spec.width, spec.size, bias=False)
            shape = (spec.prototypes, spec.size, spec.width)
            self.prototypes = nn.Parameter(normal(*shape) / math.sqrt(spec.width))
        with torch.no_grad():
            for name, weight in self.item.named_parameters():
                weight.copy_(
                    normal(*weight.shape) / math.sqrt(weight.shape[-1]) if "bias" not in name else 0 * weight
                )
        self.log_scale = nn.Parameter(torch.tensor(math.log(1.0 if spec.form == "distance" else 10.0)))
        self.user_logits = nn.Parameter(0.01 * normal(max(1, len(spec.users)), spec.prototypes))

    def forward(self, images: Tensor, texts: Tensor, users: Tensor | None = None) -> Scores:
        """Scores `[1, B, 1]` in the eyes of users `[B]`, by index; `ANYBODY` (and None) is the population's mean."""
        weights = self.weights(users, len(images))
        return self.scores(images, texts, weights)[None, :, None], None

    def scores(self, images: Tensor, texts: Tensor, weights: Tensor) -> Tensor:
        """Scores `[B]` for users with mixture weights `[B, K]`."""
        if self.spec.form == "distance":
            items = self.item(joint_features(images, texts))
            prototypes = bounded(self.spec.rate * self.prototypes)
            scores = distance_reward(items, ideal_points(weights, prototypes))
        else:
            points = torch.einsum("ksd,bd->bks", self.prototypes, texts)
            scores = angle_reward(self.item(images), ideal_points(weights, points))
        return scores * self.log_scale.exp().clamp(max=LARGEST_SCALE)

    def weights(self, users: Tensor | None, count: int) -> Tensor:
        """Mixture weights `[B, K]` of users by index."""
        mixtures = torch.softmax(self.spec.rate * self.user_logits, -1)
        anybody = mixtures.mean(0)
        if users is None:
            return anybody.expand(count, -1)
        return torch.where((users == ANYBODY)[:, None], anybody, mixtures[users.clamp(min=0)])


def _item_map(inputs: int, hidden: int, outputs: int) -> nn.Module:
    if hidden == 0:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def joint_features(images: Tensor, texts: Tensor) -> Tensor:
    """Image, text and their product `[B, 3 D]`, scaled so that entries are of size one for embeddings of length one."""
    width = images.shape[-1]
    return torch.cat([images * math.sqrt(width), texts * math.sqrt(width), images * texts * width], -1)


HEADS: dict[str, type[nn.Module]] = {"bilinear": BilinearHead, "mlp": MLPHead}


def build_head(spec: PreferenceSpec | PALSpec) -> nn.Module:
    """The head of a spec with its initial weights."""
    return PALHead(spec) if isinstance(spec, PALSpec) else HEADS[spec.head](spec)


def spec_to_dict(spec: PreferenceSpec | PALSpec) -> dict[str, Any]:
    """A spec as JSON-able data."""
    return {"kind": "pal" if isinstance(spec, PALSpec) else "preference", **asdict(spec)}


def spec_from_dict(values: dict[str, Any]) -> PreferenceSpec | PALSpec:
    """The spec that `spec_to_dict` wrote."""
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    kind = options.pop("kind")
    return PALSpec(**options) if kind == "pal" else PreferenceSpec(**options)


def _each(features: Tensor, members: int) -> Tensor:
    """The same features for every member `[M, B, F]`: their dropout differs."""
    return features.expand(members, *features.shape)


def _drawn(spec: PreferenceSpec, name: str, outputs: int, inputs: int) -> Tensor:
    """Normal weights `[M, outputs, inputs]` of variance 1 / inputs, each member's from a seed of its own."""
    draws = [
        torch.randn(outputs, inputs, generator=generator(spec.seed, "head", name, member))
        for member in range(spec.members)
    ]
    return torch.stack(draws) / math.sqrt(inputs)
