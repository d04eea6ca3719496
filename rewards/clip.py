"""CLIP score: how well a picture fits its prompt.

Hessel et al., CLIPScore, EMNLP 2021. Tables usually report 100 times the cosine; Hessel's CLIPScore is
`2.5 max(cosine, 0)`, torchmetrics' is `max(100 cosine, 0)`. Here it is the plain cosine, which has gradients
everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from diffalign.rewards.base import Facts, RewardOutput
from diffalign.rewards.clip_model import backbone_name, load_clip
from diffalign.rewards.preprocess import check_batch


class ClipScore(nn.Module):
    """Cosine between the CLIP embeddings of picture and prompt: 0.20 to 0.35 for matching pairs.

    Options:
        path: folder or hub id of a CLIP, instead of `model`; or a file of weights for the open_clip architecture
            `model`.
        model: what `load_clip` accepts: a transformers hub id, an open_clip architecture, a folder.
        pretrained: tag of open_clip or file of weights, for architectures.
    """

    name = "clip"
    modality: Literal["image", "audio"] = "image"
    differentiable = True
    kind: Literal["sample", "set"] = "sample"
    facts = Facts(
        scale="cosine, -1 to 1; typically 0.20 to 0.35 (tables: times 100)",
        licence="MIT (OpenAI and LAION weights)",
        backbone="CLIP ViT-L/14 (openai) unless `model` says otherwise",
        source="Hessel et al. 2021, arXiv:2104.08718; Radford et al. 2021, arXiv:2103.00020",
    )

    def __init__(
        self,
        path: str | None = None,
        model: str = "openai/clip-vit-large-patch14",
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        source, weights = model, pretrained
        if path is not None:
            source, weights = (model, path) if Path(path).is_file() else (path, None)
        self.clip = load_clip(source, weights)
        self.facts = replace(type(self).facts, backbone=backbone_name(source, weights))
        self.eval()

    def forward(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines `[B]`; float64 for a float64 network."""
        return self.clip.similarity(media, prompts)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures `[B, 3, H, W]` in [0, 1].

        Raises:
            DiffalignError: an empty batch, or other than one prompt per picture.
        """
        check_batch(self.name, media, prompts)
        return RewardOutput(self(media, prompts).float())
