"""PickScore: CLIP ViT-H/14 fine-tuned on human choices between two pictures of one prompt.

Kirstain et al., Pick-a-Pic, NeurIPS 2023, arXiv:2305.01569. The score is `exp(logit_scale) * cosine`, and the softmax
of two scores is the predicted probability that a user picks the one over the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from diffalign.rewards.base import Facts, RewardOutput
from diffalign.rewards.clip_model import load_clip
from diffalign.rewards.preprocess import check_batch

OFFICIAL = "yuvalkirstain/PickScore_v1"
OFFICIAL_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(nn.Module):
    """Human preference; the difference of two scores is the log-odds of the choice. The part `cosine` is unscaled.

    Options:
        path: folder or hub id of a CLIP (transformers or open_clip layout); None for the official one.
        processor: folder or hub id of tokenizer and preprocessing, where `path` has none; None for the official one.
    """

    name = "pickscore"
    modality: Literal["image", "audio"] = "image"
    differentiable = True
    kind: Literal["sample", "set"] = "sample"
    facts = Facts(
        scale="18 to 25; one point is log-odds 1 of being preferred (some papers report it divided by 100 or by 26)",
        licence="MIT",
        backbone="CLIP ViT-H/14 (laion2b)",
        source="Kirstain et al. 2023, arXiv:2305.01569; weights yuvalkirstain/PickScore_v1",
    )

    def __init__(self, path: str | None = None, processor: str | None = None) -> None:
        super().__init__()
        source = path or OFFICIAL
        self.clip = load_clip(source, processor=processor or _processor_of(source))
        self.eval()

    def forward(self, media: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Scores and cosines, each `[B]`; float64 for a float64 network."""
        cosine = self.clip.similarity(media, prompts)
        return self.clip.logit_scale.to(cosine.dtype).exp() * cosine, cosine

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures `[B, 3, H, W]` in [0, 1].

        Raises:
            DiffalignError: an empty batch, or other than one prompt per picture.
        """
        check_batch(self.name, media, prompts)
        scores, cosine = self(media, prompts)
        return RewardOutput(scores.float(), parts={"cosine": cosine.float()})


def _processor_of(source: str) -> str:
    """The folder itself when it has a tokenizer, else what the authors use with their weights."""
    folder = Path(source)
    own = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return source if own else OFFICIAL_PROCESSOR
