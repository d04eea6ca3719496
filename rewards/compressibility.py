"""Size of a picture as a JPEG file: the rewards of DDPO that need no model and cannot be argued with.

Black et al., Training Diffusion Models with Reinforcement Learning, 2023, arXiv:2305.13301, section 5.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Facts, RewardOutput
from diffalign.rewards.preprocess import check_batch


def jpeg_kilobytes(images: Tensor, quality: int = 95) -> Tensor:
    """Size `[B]` of each picture `[B, 3, H, W]` in [0, 1] as a JPEG in units of 1000 bytes (PIL's 4:2:0 chroma)."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return torch.tensor([_encoded_bytes(picture, quality) / 1000 for picture in pixels])


def _encoded_bytes(picture: np.ndarray, quality: int) -> int:
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()


class JpegIncompressibility:
    """Kilobytes as a JPEG: rewards detail. A 512x512 picture of SD 1.5 has about 100.

    Options:
        quality: of the JPEG, 1 to 95.
        divide_by: 1 gives kilobytes, as DDPO; 500 is the scale of Flow-GRPO.
    """

    name = "jpeg-incompressibility"
    modality: Literal["image", "audio"] = "image"
    differentiable = False
    kind: Literal["sample", "set"] = "sample"
    facts = Facts(scale="kilobytes (of 1000 bytes), at least 0", source="Black et al. 2023, arXiv:2305.13301")
    sign: ClassVar[int] = 1

    def __init__(self, quality: int = 95, divide_by: float = 1.0) -> None:
        if not 1 <= quality <= 95:
            raise DiffalignError(f"{self.name}: quality {quality}; expected 1 to 95")
        if divide_by <= 0:
            raise DiffalignError(f"{self.name}: divide_by {divide_by}; expected a positive number")
        self.quality = quality
        self.divide_by = divide_by

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures `[B, 3, H, W]` in [0, 1].

        Raises:
            DiffalignError: an empty batch, or other than one prompt per picture.
        """
        check_batch(self.name, media, prompts)
        return RewardOutput(self.sign * jpeg_kilobytes(media, self.quality) / self.divide_by)


class JpegCompressibility(JpegIncompressibility):
    """Minus the kilobytes as a JPEG: rewards smooth pictures; see `JpegIncompressibility` for the options."""

    name = "jpeg-compressibility"
    facts = Facts(scale="minus kilobytes, at most 0", source="Black et al. 2023, arXiv:2305.13301")
    sign = -1
