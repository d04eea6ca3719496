"""Human Preference Score v2 and v2.1: CLIP ViT-H/14 fine-tuned on rankings of pictures of one prompt.

Wu et al., Human Preference Score v2, 2023, arXiv:2306.09341. The score is the cosine; the benchmark reports 100 times
its mean. Compare pictures of the same prompt only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Facts, RewardOutput
from diffalign.rewards.clip_model import open_clip_from_file
from diffalign.rewards.preprocess import check_batch
from diffalign.rewards.weights import resolve_file

REPOSITORY = "xswu/HPSv2"
PREPROCESSING = {"official": "longest", "center-crop": "shortest"}


class HpsV2(nn.Module):
    """Human preference; cosine between picture and prompt.

    Options:
        path: checkpoint file, or folder or hub repository that holds it under its official name; None for the
            official repository.
        preprocessing: `official` scales the longer side and pads with black; `center-crop` scales the shorter side and
            crops, as ReNO does. They agree on square pictures.
        architecture: of open_clip, or `local-dir:FOLDER` with an `open_clip_config.json`.
    """

    name = "hpsv2"
    filename: ClassVar[str] = "HPS_v2_compressed.pt"
    modality: Literal["image", "audio"] = "image"
    differentiable = True
    kind: Literal["sample", "set"] = "sample"
    facts = Facts(
        scale="cosine; typically 0.25 to 0.29 (tables: times 100)",
        licence="Apache-2.0",
        backbone="CLIP ViT-H/14 (laion2b)",
        source="Wu et al. 2023, arXiv:2306.09341; weights xswu/HPSv2",
    )

    def __init__(
        self,
        path: str | None = None,
        preprocessing: str = "official",
        architecture: str = "ViT-H-14",
    ) -> None:
        super().__init__()
        if preprocessing not in PREPROCESSING:
            raise DiffalignError(
                f"{self.name}: preprocessing {preprocessing!r}; expected one of {', '.join(PREPROCESSING)}"
            )
        self.clip = open_clip_from_file(architecture, resolve_file(path, REPOSITORY, self.filename))
        resize: Literal["longest", "shortest"] = "longest" if preprocessing == "official" else "shortest"
        self.clip.preprocess = replace(self.clip.preprocess, resize=resize)
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


class HpsV21(HpsV2):
    """HPSv2.1: the same network trained on more and cleaner rankings; see `HpsV2` for the options."""

    name = "hpsv2.1"
    filename = "HPS_v2.1_compressed.pt"
    facts = replace(HpsV2.facts, scale="cosine; typically 0.22 to 0.34 (tables: times 100)")
