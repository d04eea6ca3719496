"""Set rewards: one number for a whole batch of pictures, against a reference or by their own diversity.

All of them measure in float64 whatever the encoder computes in, and all are differentiable: gradients reach the
pictures through the encoder, through singular values for `frechet` and `vendi`, through sums of kernels for the others.
Each depends on the size of the batch; compare batches of one size only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Facts, RewardOutput
from diffalign.rewards.encoders import Encoder, load_encoder
from diffalign.rewards.preprocess import check_batch
from diffalign.rewards.sets.diversity import diversity_per_prompt, pairwise_distance
from diffalign.rewards.sets.frechet import frechet_distance
from diffalign.rewards.sets.kernels import cmmd, kid
from diffalign.rewards.sets.reference import ReferenceSet, ReferenceSpec
from diffalign.rewards.sets.vendi import vendi_score


class SetReward(nn.Module):
    """What set rewards share: an encoder, and one score for all pictures of a batch.

    Options:
        encoder: as in `load_encoder`. batch_size: pictures that go through the encoder at once.
    """

    name = "set"
    modality: Literal["image", "audio"] = "image"
    differentiable = True
    kind: Literal["sample", "set"] = "set"
    facts = Facts()

    def __init__(self, encoder: str, batch_size: int = 32) -> None:
        super().__init__()
        self.encoder: Encoder = load_encoder(encoder)
        self.batch_size = batch_size

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score the pictures `[B, 3, H, W]` in [0, 1] as one set; `mean` repeats the score `B` times.

        Raises:
            DiffalignError: an empty batch, or too few pictures for the metric.
        """
        check_batch(self.name, media, prompts)
        return self.measured(self.features(media), prompts)

    def features(self, media: Tensor) -> Tensor:
        """Features `[B, D]` of pictures, with gradients where they are enabled."""
        return torch.cat([self.encoder.embed(part) for part in media.split(self.batch_size)])

    def measured(self, features: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """The score of a set of features `[B, D]`, repeated."""
        return RewardOutput(self.value(features).float().expand(len(features)))

    def value(self, features: Tensor) -> Tensor:
        """The score of a set of features `[B, D]`, a float64 scalar, higher is better."""
        raise NotImplementedError


class FrechetReward(SetReward):
    """Minus the squared Frechet distance to a reference.

    Options:
        reference: folder of pictures, file of features or statistics, or texts; see `load_reference`.
    """

    name = "frechet"
    facts = Facts(
        scale="0 and below, in squared units of the encoder; biased downwards for small batches",
        backbone="the encoder's",
        source="Heusel et al. 2017, arXiv:1706.08500",
    )

    def __init__(self, reference: ReferenceSpec, encoder: str = "inception", batch_size: int = 32) -> None:
        super().__init__(encoder, batch_size)
        self.reference = ReferenceSet(reference)

    def value(self, features: Tensor) -> Tensor:
        """Minus the distance of features `[B, D]`, B at least 2."""
        return -frechet_distance(features, self.reference.gaussian(self.encoder, features.device))


class KidReward(SetReward):
    """Minus the kernel inception distance, unbiased: can be above 0 for sets that agree.

    Options:
        reference: folder of pictures, file of features, or texts; see `load_reference`.
    """

    name = "kid"
    facts = Facts(
        scale="about 0 and below; unbiased",
        backbone="the encoder's",
        source="Binkowski et al. 2018, arXiv:1801.01401",
    )

    def __init__(self, reference: ReferenceSpec, encoder: str = "inception", batch_size: int = 32) -> None:
        super().__init__(encoder, batch_size)
        self.reference = ReferenceSet(reference)

    def value(self, features: Tensor) -> Tensor:
        """Minus the distance of features `[B, D]`, B at least 2."""
        return -kid(features, self.reference.features(self.encoder, features.device))


class CmmdReward(SetReward):
    """Minus the CLIP maximum mean discrepancy; the published one uses CLIP ViT-L/14 at 336 pixels.

    Options:
        reference: folder of pictures, file of features, or texts; see `load_reference`.
    """

    name = "cmmd"
    facts = Facts(
        scale="0 and below; -0.5 to -0.7 for good models against photographs",
        licence="MIT (OpenAI weights)",
        backbone="CLIP ViT-L/14-336 (openai) unless `encoder` says otherwise",
        source="Jayasumana et al. 2024, arXiv:2401.09603",
    )

    def __init__(
        self,
        reference: ReferenceSpec,
        encoder: str = "clip:openai/clip-vit-large-patch14-336",
        batch_size: int = 32,
    ) -> None:
        super().__init__(encoder, batch_size)
        self.reference = ReferenceSet(reference)

    def value(self, features: Tensor) -> Tensor:
        """Minus the distance of features `[B, D]`."""
        return -cmmd(features, self.reference.features(self.encoder, features.device))


class VendiReward(SetReward):
    """Vendi score: the effective number of different pictures, 1 to B.

    Options:
        order: q; above 0, `.inf` in YAML for the largest.
    """

    name = "vendi"
    facts = Facts(
        scale="1 to the number of pictures",
        backbone="the encoder's",
        source="Friedman and Dieng 2022, arXiv:2210.02410; Pasarkar and Dieng 2023, arXiv:2310.12952",
    )

    def __init__(
        self, encoder: str = "dino:facebook/dinov2-base", order: float = 1.0, batch_size: int = 32
    ) -> None:
        if not order > 0:
            raise DiffalignError(f"vendi got order {order}; expected a number above 0, or .inf")
        super().__init__(encoder, batch_size)
        self.order = order

    def value(self, features: Tensor) -> Tensor:
        """Score of features `[B, D]`."""
        return vendi_score(features, self.order)


class DiversityReward(SetReward):
    """Mean of `1 - cosine` over pairs of pictures.

    Options:
        per_prompt: average over the pairs of each prompt, then over prompts with at least two pictures, instead of over
            all pairs. The part `prompt` holds each picture's own prompt's value, NaN where it is alone.
    """

    name = "diversity"
    facts = Facts(scale="0 (all alike) to about 1", backbone="the encoder's")

    def __init__(
        self, encoder: str = "dino:facebook/dinov2-base", per_prompt: bool = False, batch_size: int = 32
    ) -> None:
        super().__init__(encoder, batch_size)
        self.per_prompt = per_prompt

    def value(self, features: Tensor) -> Tensor:
        """Diversity of features `[B, D]`, B at least 2, whatever their prompts."""
        return pairwise_distance(features)

    def measured(self, features: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """The score of a set of features `[B, D]`, repeated."""
        if not self.per_prompt:
            return super().measured(features, prompts)
        own = diversity_per_prompt(features, prompts)
        mean = torch.stack(list(own.values())).mean()
        alone = features.new_full((), torch.nan)
        part = torch.stack([own.get(prompt, alone).detach().float() for prompt in prompts])
        return RewardOutput(mean.float().expand(len(features)), parts={"prompt": part})
