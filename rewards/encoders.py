"""Encoders: pictures to feature vectors, in which set metrics measure. `load_encoder` names them all.

| specification | features |
|---|---|
| `clip:SOURCE` | CLIP embeddings of length 1; SOURCE as in `load_clip`: `ViT-B-32@laion2b_s34b_b79k`, a folder |
| `scenes-clip` | the same of the embedded world's CLIP |
| `dino:ID` | class token of a DINO-type transformer, from a hub id (`dino:facebook/dinov2-base`) or a folder |
| `inception`, `inception@FILE` | 2048 pooled features of torchvision's Inception v3 |
| `pixels:N` | pictures averaged over an N x N grid, 3 N^2 numbers; no weights |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import DiffalignError, did_you_mean
from diffalign.rewards.clip_model import ClipModel, load_clip
from diffalign.rewards.preprocess import ClipPreprocess, Interpolation, resize
from diffalign.rewards.weights import load_exactly, read_state_dict

KINDS = ("clip:", "scenes-clip", "dino:", "inception", "pixels:")
INCEPTION_SIDE = 299
# PIL's numbers for the two filters that preprocessors of vision transformers use.
FILTERS: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}


@runtime_checkable
class Encoder(Protocol):
    """Pictures to features. An encoder with weights is a frozen `torch.nn.Module`."""

    name: str

    def embed(self, images: Tensor) -> Tensor:
        """Features `[B, D]` float32 of pictures `[B, 3, H, W]` in [0, 1]; gradients flow to the pictures."""
        ...


@runtime_checkable
class TextEncoder(Encoder, Protocol):
    """An encoder that puts texts into the same space as pictures."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Features `[B, D]` float32 of texts."""
        ...


class PixelEncoder(nn.Module):
    """Average-pooled pixels: a baseline without weights that sees colour and layout only."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.name = f"pixels:{side}"
        self.side = side

    def embed(self, images: Tensor) -> Tensor:
        """Features `[B, 3 side^2]`."""
        return F.adaptive_avg_pool2d(images.float(), self.side).flatten(1)


class ClipEncoder(nn.Module):
    """Embeddings of a CLIP, length 1, of pictures and of texts."""

    def __init__(self, clip: ClipModel, name: str) -> None:
        super().__init__()
        self.name = name
        self.clip = clip

    def embed(self, images: Tensor) -> Tensor:
        """Features `[B, D]` of length 1."""
        return self.clip.embed_images(images).float()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Features `[B, D]` of length 1."""
        return self.clip.embed_texts(texts).float()


class DinoEncoder(nn.Module):
    """Class token, after the last normalisation, of a vision transformer of transformers (DINO, DINOv2, DINOv3).

    Args:
        path: hub id or folder, with `preprocessor_config.json`.

    Raises:
        DiffalignError: it cannot be loaded, or its preprocessing uses a filter that is not known here.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        self.name = f"dino:{path}"
        try:
            self.network: Any = AutoModel.from_pretrained(path, dtype=torch.float32)
            self.preprocess = _from_processor(AutoImageProcessor.from_pretrained(path))
        except (OSError, ValueError, RuntimeError) as error:
            raise DiffalignError(
                f"transformers cannot load the encoder {path!r}: {str(error).splitlines()[0]}. Expected a hub id, or "
                "a folder with config.json, preprocessor_config.json and weights"
            ) from error
        self.requires_grad_(False).eval()

    def embed(self, images: Tensor) -> Tensor:
        """Features `[B, D]`."""
        weight = next(self.network.parameters())
        pixels = self.preprocess(images.to(weight.device)).to(weight.dtype)
        return self.network(pixel_values=pixels).last_hidden_state[:, 0].float()


def _from_processor(settings: Any) -> ClipPreprocess:
    """The tensor form of an image processor's settings: shorter side and central crop, or a plain square."""
    if settings.resample not in FILTERS:
        raise DiffalignError(f"the image processor resizes with filter {settings.resample}; known: {FILTERS}")
    shorter = dict(settings.size).get("shortest_edge")
    square = settings.crop_size if shorter else settings.size
    return ClipPreprocess(
        size=square["height"],
        mean=tuple(settings.image_mean),
        std=tuple(settings.image_std),
        resize="shortest" if shorter else "squash",
        shorter=shorter,
        interpolation=FILTERS[int(settings.resample)],
        crop="floor",
    )


class InceptionEncoder(nn.Module):
    """Inception v3 of torchvision up to its last pooling, 2048 features; bilinear resize to 299 x 299.

    Not the network of published FID numbers: that is TensorFlow's, which has other weights, pools differently in some
    blocks and resizes without antialiasing. Distances here compare with each other only.

    Args:
        path: file of torchvision's state dict; None downloads torchvision's ImageNet weights.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        from torchvision.models import Inception_V3_Weights, inception_v3

        self.name = "inception"
        network = inception_v3(weights=None, init_weights=False, aux_logits=True, transform_input=False)
        state = (
            read_state_dict(path)
            if path
            else Inception_V3_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        )
        load_exactly(network, state, path or "torchvision's Inception v3")
        network.AuxLogits, network.fc = None, nn.Identity()
        self.network = network
        self.requires_grad_(False).eval()

    def embed(self, images: Tensor) -> Tensor:
        """Features `[B, 2048]`."""
        weight = self.network.Conv2d_1a_3x3.conv.weight
        pixels = resize(images.to(weight.device).float(), (INCEPTION_SIDE, INCEPTION_SIDE), "bilinear")
        return self.network((2 * pixels - 1).to(weight.dtype)).float()


def load_encoder(spec: str) -> PixelEncoder | ClipEncoder | DinoEncoder | InceptionEncoder:
    """A frozen encoder from its specification; the table is at the head of this module.

    Raises:
        DiffalignError: unknown kind (the nearest is named), or the encoder cannot be loaded.
    """
    kind, _, rest = spec.partition(":")
    if kind == "pixels" and rest.isdecimal() and int(rest) > 0:
        return PixelEncoder(int(rest))
    if kind == "clip" and rest:
        return ClipEncoder(load_clip(rest), spec)
    if spec == "scenes-clip":
        return ClipEncoder(load_clip(str(_scenes_clip())), spec)
    if kind == "dino" and rest:
        return DinoEncoder(rest)
    name, _, path = spec.partition("@")
    if name == "inception":
        return InceptionEncoder(path or None)
    raise DiffalignError(
        f"unknown encoder {spec!r}; expected clip:SOURCE, scenes-clip, dino:ID, inception, inception@FILE or pixels:N."
        + did_you_mean(spec, list(KINDS))
    )


def _scenes_clip() -> Path:
    from diffalign.samples import __path__ as folders

    return Path(folders[0]) / "scorers" / "clip"
