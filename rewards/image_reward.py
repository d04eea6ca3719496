"""ImageReward-v1.0: human preference of a picture for a prompt (Xu et al., NeurIPS 2023, arXiv:2304.05977).

A BLIP text encoder reads the prompt while attending to all image tokens; an affine head maps its first token to a
score `r`, reported as `(r - 0.16717) / 1.03334`, which is about N(0, 1) on the authors' training pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Facts, RewardOutput
from diffalign.rewards.blip import TextEncoder, VisionTransformer
from diffalign.rewards.preprocess import ClipPreprocess, check_batch
from diffalign.rewards.tokenizers import load_tokenizer
from diffalign.rewards.weights import load_exactly, read_state_dict, resolve_file

REPOSITORY = "THUDM/ImageReward"
FILENAME = "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
HEAD_WIDTH = 64  # of every attention head, in ViT-L/16 (1024 / 16) and in BERT-base (768 / 12)

# In the official checkpoint and not part of the score: heads of BLIP's contrastive pretraining, and a counter.
UNUSED = frozenset(
    {
        "blip.vision_proj.weight",
        "blip.vision_proj.bias",
        "blip.text_proj.weight",
        "blip.text_proj.bias",
        "blip.text_encoder.embeddings.position_ids",
    }
)


class ImageReward(nn.Module):
    """ImageReward as a frozen, differentiable reward.

    Preprocessing is the official one: shorter side to 224 (bicubic), centre crop, CLIP normalisation; prompts are cut
    after 35 tokens. The three dropouts of the head are kept, for uncertainty by dropout; they are off by default.

    Args:
        path: hub id, folder with `ImageReward.pt`, or a file (`.pt` is read with `weights_only=True`, or
            `.safetensors`); None for the official weights. Sizes of the network are read from the weights.
        tokenizer: hub id or folder of the BERT tokenizer.

    Raises:
        DiffalignError: the weights or the tokenizer cannot be had or do not fit.
    """

    name = "image-reward"
    modality: Literal["image", "audio"] = "image"
    differentiable = True
    kind: Literal["sample", "set"] = "sample"
    facts = Facts(
        scale="about N(0, 1); SD 1.5 -0.2 to 0.2, SDXL 0.5 to 0.9, FLUX about 1.1",
        licence="Apache-2.0",
        backbone="BLIP ViT-L/16 + BERT-base",
        source="arXiv:2304.05977, https://github.com/zai-org/ImageReward",
    )

    def __init__(self, path: str | None = None, tokenizer: str = TOKENIZER) -> None:
        super().__init__()
        file = resolve_file(path, REPOSITORY, FILENAME)
        state = {key: value for key, value in read_state_dict(file).items() if key not in UNUSED}
        with torch.device("meta"):
            self.network = ImageRewardNetwork(**network_sizes(state, str(file)))
        load_exactly(self.network, state, file)
        self.preprocess = ClipPreprocess(size=self.network.image_size)
        self.tokenizer = load_tokenizer(tokenizer, option="tokenizer")
        self.eval().requires_grad_(False)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures `[B, 3, H, W]` in [0, 1] for `B` prompts.

        Raises:
            DiffalignError: the batch is empty, has another shape, or another number of prompts.
        """
        check_batch(self.name, media, prompts)
        weight = next(self.parameters())
        pixels = self.preprocess(media.to(weight.device)).to(weight.dtype)
        ids, mask = self.tokenize(prompts)
        raw = self.network(pixels, ids.to(weight.device), mask.to(weight.device))
        return RewardOutput((raw.float() - MEAN) / STD)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both `[B, 35]`: `[CLS] prompt [SEP]`, cut or padded."""
        batch = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return batch["input_ids"], batch["attention_mask"]


class ImageRewardNetwork(nn.Module):
    """Image tokens, text tokens that attend to them, and the head; names as in the official checkpoint.

    Args:
        vision: of `VisionTransformer`. text: of `TextEncoder`.
    """

    def __init__(self, vision: Mapping[str, int], text: Mapping[str, int]) -> None:
        super().__init__()
        self.image_size = vision["size"]
        self.blip = nn.ModuleDict(
            {"visual_encoder": VisionTransformer(**vision), "text_encoder": TextEncoder(**text)}
        )
        self.mlp = Head(text["width"])

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Raw scores `[B]` of normalised pixels `[B, 3, size, size]` for tokens and mask `[B, L]`."""
        image = self.blip["visual_encoder"](pixels)
        return self.mlp(self.blip["text_encoder"](ids, mask, image)[:, 0]).squeeze(-1)


class Head(nn.Module):
    """Five linear maps without activations between them: affine, unless dropout is on. `[B, width]` to `[B, 1]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Raw score of the first text token."""
        return self.layers(feature)


def network_sizes(state: Mapping[str, Tensor], origin: str) -> dict[str, dict[str, int]]:
    """Sizes of `ImageRewardNetwork`, from the shapes of its weights and the head width that the family shares.

    Raises:
        DiffalignError: weights that tell the sizes are missing.
    """
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    try:
        width, _, patch, _ = state[vision + "patch_embed.proj.weight"].shape
        side = round((state[vision + "pos_embed"].shape[1] - 1) ** 0.5)
        vocabulary, text_width = state[text + "embeddings.word_embeddings.weight"].shape
        positions = state[text + "embeddings.position_embeddings.weight"].shape[0]
        hidden = state[text + "encoder.layer.0.intermediate.dense.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise DiffalignError(
            f"{origin!r} holds no ImageReward weights ({error} is missing or has another shape); expected the names of "
            f"the official {FILENAME}"
        ) from error
    return {
        "vision": {
            "size": side * patch,
            "patch": patch,
            "width": width,
            "depth": count_layers(state, vision + "blocks."),
            "heads": width // HEAD_WIDTH,
        },
        "text": {
            "vocabulary": vocabulary,
            "positions": positions,
            "width": text_width,
            "depth": count_layers(state, text + "encoder.layer."),
            "heads": text_width // HEAD_WIDTH,
            "hidden": hidden,
            "image_width": width,
        },
    }


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many different numbers follow `prefix` in the names."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})
