"""LAION's aesthetic predictors: how much people like a picture, whatever its prompt.

v1 (LAION-AI/aesthetic-predictor, MIT): one linear layer on the unit CLIP embedding. v2 (christophschuhmann/
improved-aesthetic-predictor, Apache-2.0): five linear layers with dropout between them and no activations, so in
evaluation one affine map `w . e + b`. The gradient then has one direction in embedding space for every picture, which
is why both are easy to over-optimise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Facts, RewardOutput
from diffalign.rewards.clip_model import backbone_name, load_clip
from diffalign.rewards.preprocess import check_batch
from diffalign.rewards.weights import StateDict, load_exactly, read_state_dict, resolve_file

V1_URL = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/"
V1_VARIANTS = {
    "l14": ("sa_0_4_vit_l_14_linear.pth", "openai/clip-vit-large-patch14"),
    "b32": ("sa_0_4_vit_b_32_linear.pth", "openai/clip-vit-base-patch32"),
    "b16": ("sa_0_4_vit_b_16_linear.pth", "openai/clip-vit-base-patch16"),
}
V2_REPOSITORY = "trl-lib/ddpo-aesthetic-predictor"
V2_FILE = "aesthetic-model.pth"
LINEAR_LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
DROPOUT = (0.2, 0.2, 0.1)


class AestheticHead(nn.Module):
    """The head of v2: `layers` under their official names, `[B, D]` unit embeddings to `[B]` scores.

    In evaluation it computes the affine map that the layers amount to. With dropout switched on (`head.train()`, or
    any of its dropout layers) it goes through the layers, which makes it a source of uncertainty.

    Args:
        sizes: width of the embedding and of the five layers; the official ones are 768, 1024, 128, 64, 16, 1.
    """

    def __init__(self, sizes: Sequence[int] = (768, 1024, 128, 64, 16, 1)) -> None:
        super().__init__()
        linear = [nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes)]
        drop = [nn.Dropout(rate) for rate in DROPOUT]
        self.width = sizes[0]
        self.layers = nn.Sequential(
            linear[0], drop[0], linear[1], drop[1], linear[2], drop[2], linear[3], linear[4]
        )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], origin: str = "state dict") -> AestheticHead:
        """A head of the sizes that official keys (`layers.0.weight`, `layers.2.weight`, ...) have.

        Raises:
            DiffalignError: other keys or shapes.
        """
        absent = [f"{layer}.weight" for layer in LINEAR_LAYERS if f"{layer}.weight" not in state]
        if absent:
            raise DiffalignError(
                f"{origin!r} is no head of aesthetic-v2: {absent[0]!r} is missing; expected weights and biases of "
                f"{', '.join(LINEAR_LAYERS)}"
            )
        weights = [state[f"{layer}.weight"] for layer in LINEAR_LAYERS]
        head = cls((weights[0].shape[1], *(weight.shape[0] for weight in weights)))
        load_exactly(head, state, origin)
        return head

    def affine(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Weight `[1, D]` and bias `[1]` of the whole head without dropout."""
        *earlier, last = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        weight, bias = last.weight.to(dtype), last.bias.to(dtype)
        for layer in reversed(earlier):
            bias = bias + weight @ layer.bias.to(dtype)
            weight = weight @ layer.weight.to(dtype)
        return weight, bias

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores `[B]` in the precision of the embeddings."""
        if not any(layer.training for layer in self.layers if isinstance(layer, nn.Dropout)):
            return F.linear(embeddings, *self.affine(embeddings.dtype)).squeeze(-1)
        for layer in self.layers:
            embeddings = _linear(layer, embeddings) if isinstance(layer, nn.Linear) else layer(embeddings)
        return embeddings.squeeze(-1)


class LinearHead(nn.Linear):
    """The head of v1, under its official names `weight` `[1, D]` and `bias` `[1]`."""

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], origin: str = "state dict") -> LinearHead:
        """A head of the width that the official keys have.

        Raises:
            DiffalignError: other keys or shapes.
        """
        weight = state.get("weight")
        head = cls(weight.shape[-1] if weight is not None else 768, 1)
        load_exactly(head, state, origin)
        return head

    @property
    def width(self) -> int:
        """Width of the embeddings it takes."""
        return self.in_features

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores `[B]` in the precision of the embeddings."""
        return _linear(self, embeddings).squeeze(-1)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the precision of `x`, so that a half-precision scorer still adds up in float32."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


class Aesthetic(nn.Module):
    """A head on the unit CLIP embedding of a picture; prompts play no part."""

    name = "aesthetic"
    facts = Facts()
    modality: Literal["image", "audio"] = "image"
    differentiable = True
    kind: Literal["sample", "set"] = "sample"

    def __init__(self, head: AestheticHead | LinearHead, clip: str) -> None:
        super().__init__()
        self.head = head
        self.clip = load_clip(clip)
        if self.clip.width != head.width:
            raise DiffalignError(
                f"{self.name}: the head takes embeddings of width {head.width}, CLIP {clip!r} makes {self.clip.width}; "
                "give the CLIP that the head was trained on"
            )
        self.facts = replace(type(self).facts, backbone=backbone_name(clip))
        self.requires_grad_(False).eval()

    def forward(self, media: Tensor) -> Tensor:
        """Scores `[B]`; float64 for a float64 network."""
        return self.head(self.clip.embed_images(media))

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures `[B, 3, H, W]` in [0, 1].

        Raises:
            DiffalignError: an empty batch, or other than one prompt per picture.
        """
        check_batch(self.name, media, prompts)
        return RewardOutput(self(media).float())


class AestheticV2(Aesthetic):
    """LAION aesthetic score v2 (sac+logos+ava1), about 1 to 10.

    Options:
        path: file of the head's weights, or folder or hub repository that holds `aesthetic-model.pth`; None for the
            hub copy of the official file.
        clip: what `load_clip` accepts; its embedding must have the width of the head.
    """

    name = "aesthetic-v2"
    facts = Facts(
        scale="about 1 to 10; SD 1.5 about 5.4, SDXL 5.6 to 6.1",
        licence="Apache-2.0",
        backbone="CLIP ViT-L/14 (openai)",
        source="github.com/christophschuhmann/improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE)",
    )

    def __init__(self, path: str | None = None, clip: str = "openai/clip-vit-large-patch14") -> None:
        file = resolve_file(path, V2_REPOSITORY, V2_FILE)
        super().__init__(AestheticHead.from_state_dict(_floats(read_state_dict(file)), str(file)), clip)


class AestheticV1(Aesthetic):
    """LAION aesthetic score v1: one linear layer, about 1 to 10.

    Options:
        path: file of the head's weights (keys `weight` [1, D] and `bias` [1]); None downloads the official file.
        variant: `l14`, `b32` or `b16`: which official head and CLIP.
        clip: what `load_clip` accepts; None for the variant's CLIP.
    """

    name = "aesthetic-v1"
    facts = Facts(
        scale="about 1 to 10",
        licence="MIT",
        backbone="CLIP ViT-L/14 (openai) unless `variant` says otherwise",
        source="github.com/LAION-AI/aesthetic-predictor",
    )

    def __init__(self, path: str | None = None, variant: str = "l14", clip: str | None = None) -> None:
        if variant not in V1_VARIANTS:
            raise DiffalignError(
                f"aesthetic-v1: variant {variant!r}; expected one of {', '.join(V1_VARIANTS)}"
            )
        filename, official_clip = V1_VARIANTS[variant]
        file = path or _download(filename)
        super().__init__(
            LinearHead.from_state_dict(_floats(read_state_dict(file)), str(file)), clip or official_clip
        )


def _floats(state: StateDict) -> StateDict:
    return {name: value.float() for name, value in state.items()}


def _download(filename: str) -> Path:
    """The official file of v1, which no model hub carries, kept in torch's hub cache."""
    target = Path(torch.hub.get_dir()) / "checkpoints" / filename
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(V1_URL + filename, str(target), progress=False)
        except OSError as error:
            raise DiffalignError(
                f"cannot download {V1_URL}{filename}: {error}. Get the file elsewhere and give it as `path`"
            ) from error
    return target
