"""The tiny trained scorers of the embedded world: CLIP, aesthetic head, preference model, ensemble.

All of them stand on one CLIP of 1.6 M parameters, which is loaded once per folder and shared. They are proxies with
known faults, to be compared with `scenes-judge`; agreement and training are described in `samples/README.md`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.rewards.aesthetic import AestheticHead
from diffalign.rewards.base import Facts, RewardOutput
from diffalign.rewards.clip_model import ClipModel, load_clip
from diffalign.rewards.heads import build_head, spec_from_dict
from diffalign.rewards.preprocess import check_batch
from diffalign.rewards.weights import load_exactly, read_state_dict
from diffalign.samples import FOLDER

CLIP, AESTHETIC, PREFERENCE = "clip", "aesthetic.safetensors", "preference.safetensors"
SCALE = (
    "about -4 to 4, 0 for a picture of middling quality; a lead of 1.6 is preferred half of the time or more"
)
BACKBONE = "scenes CLIP (64 px, 1.6 M parameters)"


class OnScenesClip(nn.Module):
    """What the tiny scorers share: the frozen CLIP of a scorers folder, and a head on it.

    The network is the same object in all scorers of one folder: `to` moves it for all of them.
    """

    modality: Literal["image", "audio"] = "image"
    differentiable = True
    kind: Literal["sample", "set"] = "sample"

    def __init__(self, path: str | None) -> None:
        super().__init__()
        self.folder = Path(path) if path else FOLDER / "scorers"
        self.clip = shared_clip(self.folder / CLIP)
        self.eval()


class ScenesClip(OnScenesClip):
    """Cosine between the CLIP embeddings of picture and prompt.

    Options:
        path: folder of the scorers; None for the shipped one.
    """

    name = "scenes-clip"
    facts = Facts(
        scale="cosine, -1 to 1; about 0.9 for a picture that fits its caption, 0.1 for an unrelated one",
        licence="Apache-2.0",
        backbone=BACKBONE,
        source="diffalign.samples.train_scorers",
    )

    def __init__(self, path: str | None = None) -> None:
        super().__init__(path)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures `[B, 3, H, W]` in [0, 1].

        Raises:
            DiffalignError: an empty batch, or other than one prompt per picture.
        """
        check_batch(self.name, media, prompts)
        return RewardOutput(self.clip.similarity(media, prompts).float())


class ScenesAesthetic(OnScenesClip):
    """How clean, strong in contrast and well placed the shapes of a picture are, whatever its prompt.

    Options:
        path: folder of the scorers; None for the shipped one.
    """

    name = "scenes-aesthetic"
    facts = Facts(
        scale="1 to 10; clean scenes 6.8 to 9.4",
        licence="Apache-2.0",
        backbone=BACKBONE,
        source="diffalign.samples.train_scorers; the head is LAION's aesthetic-v2 in small",
    )

    def __init__(self, path: str | None = None) -> None:
        super().__init__(path)
        file = self.folder / AESTHETIC
        self.head = AestheticHead.from_state_dict(_floats(read_state_dict(file)), str(file))
        self.head.requires_grad_(False).eval()

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures `[B, 3, H, W]` in [0, 1].

        Raises:
            DiffalignError: an empty batch, or other than one prompt per picture.
        """
        check_batch(self.name, media, prompts)
        return RewardOutput(self.head(self.clip.embed_images(media)).float())


class ScenesPreference(OnScenesClip):
    """A preference model trained on the noisy pairs, by Bradley-Terry with ties.

    `win_probability(difference of scores, k=5)` of `diffalign.objectives.reward_model` is the chance of a choice.

    Options:
        path: folder of the scorers; None for the shipped one.
        member: which member of the ensemble; `scenes-ensemble` has them all in one pass.
    """

    name = "scenes-preference"
    facts = Facts(
        scale=SCALE,
        licence="Apache-2.0",
        backbone=BACKBONE,
        source="diffalign.samples.train_scorers; Kirstain et al. 2023, arXiv:2305.01569",
    )

    def __init__(self, path: str | None = None, member: int = 0) -> None:
        super().__init__(path)
        self.head: Any = shared_heads(self.folder / PREFERENCE)
        count = self.head.spec.members
        if not 0 <= member < count:
            raise DiffalignError(
                f"{self.name}: member {member}; the ensemble of {str(self.folder)!r} has members 0 to {count - 1}"
            )
        self.member = member

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures `[B, 3, H, W]` in [0, 1].

        Raises:
            DiffalignError: an empty batch, or other than one prompt per picture.
        """
        check_batch(self.name, media, prompts)
        return RewardOutput(member_scores(self.clip, self.head, media, prompts)[self.member])


class ScenesEnsemble(OnScenesClip):
    """The preference models of other seeds and other samples of the pairs, in one pass.

    `mean` and `std` (unbiased) are over members; each is a part: `member-0`, `member-1`, and so on. For another
    aggregation give them to a wrapper: `{reward: uwo, of: scenes-ensemble, members: [member-0, member-1]}`.

    Options:
        path: folder of the scorers; None for the shipped one.
    """

    name = "scenes-ensemble"
    facts = Facts(
        scale=SCALE,
        licence="Apache-2.0",
        backbone=BACKBONE,
        source="diffalign.samples.train_scorers; Coste et al. 2024, arXiv:2310.02743",
    )

    def __init__(self, path: str | None = None) -> None:
        super().__init__(path)
        self.head: Any = shared_heads(self.folder / PREFERENCE)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures `[B, 3, H, W]` in [0, 1].

        Raises:
            DiffalignError: an empty batch, or other than one prompt per picture.
        """
        check_batch(self.name, media, prompts)
        scores = member_scores(self.clip, self.head, media, prompts)
        parts = {f"member-{i}": row for i, row in enumerate(scores)}
        return RewardOutput(scores.mean(0), scores.std(0), parts)


def member_scores(clip: ClipModel, head: nn.Module, media: Tensor, prompts: Sequence[str]) -> Tensor:
    """Scores `[M, B]` of the heads of a preference model, float32."""
    images, texts = clip.embed_images(media), clip.embed_texts(prompts)
    mean, _ = head(images.to(dtype_of(head)), texts.to(dtype_of(head)))
    return mean[..., 0].float()


def dtype_of(module: nn.Module) -> torch.dtype:
    """Precision of a module's parameters."""
    return next(module.parameters()).dtype


def shared_clip(folder: Path) -> ClipModel:
    """The frozen CLIP of a folder, loaded once as long as its files do not change.

    Raises:
        DiffalignError: the folder holds none.
    """
    return _clip_of(str(folder.resolve()), _changed(folder / "open_clip_model.safetensors"))


@lru_cache(maxsize=4)
def _clip_of(folder: str, changed: int) -> ClipModel:
    return load_clip(folder)


def shared_heads(file: Path) -> Any:
    """The frozen heads of a preference model, loaded once as long as the file does not change.

    Raises:
        DiffalignError: no such file, or its metadata do not say how the heads are built.
    """
    return _heads_of(str(file.resolve()), _changed(file))


@lru_cache(maxsize=4)
def _heads_of(file: str, changed: int) -> nn.Module:
    state = _floats(read_state_dict(file))
    with safe_open(file, "pt") as opened:
        spec = (opened.metadata() or {}).get("spec")
    if spec is None:
        raise DiffalignError(f"{file!r} is no preference model: its metadata have no 'spec'")
    head = build_head(spec_from_dict(json.loads(spec)))
    load_exactly(head, state, file)
    return head.requires_grad_(False).eval()


def _changed(file: Path) -> int:
    """Time of the last change; 0 for a missing file, about which the loader says more."""
    return file.stat().st_mtime_ns if file.is_file() else 0


def _floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in state.items()}
