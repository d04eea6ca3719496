"""Reward models trained here (`diffalign train scenes/reward_model`), as rewards.

A finished run's `final/` holds `trainable.safetensors` (the heads, and the CLIP where it was trained too) and
`reward.json`: the head's spec, the CLIP it stands on, and what its members' scores are normalised by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffalign.data.judged import OVERALL
from diffalign.errors import DiffalignError, did_you_mean
from diffalign.rewards.base import Facts, RewardOutput
from diffalign.rewards.heads import PALHead, PALSpec, Scores, build_head, spec_from_dict
from diffalign.rewards.run_folders import DESCRIPTIONS, WEIGHTS, reward_folder

DESCRIPTION = DESCRIPTIONS["trained"]
SHIPPED = "scenes:"


class RewardNetwork(nn.Module):
    """A head, and under it a CLIP where pictures come in instead of embeddings.

    Fields:
        precision: number format of the CLIP's forward pass; the head and its scores are float32.
    """

    def __init__(
        self, head: nn.Module, clip: nn.Module | None = None, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.head, self.precision = head, precision
        self.clip: Any = clip

    def forward(self, images: Tensor, texts: Tensor | Sequence[str], users: Tensor | None = None) -> Scores:
        """Scores `[M, B, K]`, and the logarithm of their spread or None (see `rewards.heads`).

        Args:
            images, texts: embeddings `[B, D]`; with a CLIP, pictures `[B, 3, H, W]` in [0, 1] and captions.
        """
        if self.clip is not None:
            lower = self.precision != torch.float32
            with torch.autocast(images.device.type, self.precision, enabled=lower):
                images, texts = self.clip.embed_images(images), self.clip.embed_texts(texts)
        return self.head(images.float(), texts.float(), users)  # type: ignore[union-attr]


class TrainedReward(nn.Module):
    """The reward model of a run.

    The mean is that of the ensemble's members, each normalised to mean 0 and deviation 1 on held-out pictures;
    the deviation is theirs from each other, together with the spread they state themselves. Parts: every member
    and every dimension.

    Args:
        path: run folder, or its `final/`. clip: another place of the CLIP it was trained on.
        weights: of the dimensions; without them `overall` counts alone, or all alike where there is no `overall`.
        user: of a PAL model: a user's name or mixture weights; None stands for the population.
        normalise: False gives the raw scores.
    """

    modality: Literal["image", "audio"] = "image"
    differentiable = True
    kind: Literal["sample", "set"] = "sample"
    location: Tensor
    spread: Tensor
    shares: Tensor
    mixture: Tensor

    def __init__(
        self,
        path: str,
        clip: str | None = None,
        weights: Mapping[str, float] | None = None,
        user: str | Sequence[float] | None = None,
        normalise: bool = True,
    ) -> None:
        from diffalign.rewards.clip_model import load_clip

        super().__init__()
        folder = reward_folder(path, "trained")
        facts = _description(folder)
        self.spec = spec_from_dict(facts["head"])
        source = clip or facts["clip"]
        self.network: Any = RewardNetwork(build_head(self.spec), load_clip(clip_source(source)))
        _load(self.network, folder / WEIGHTS, bool(facts["trained_clip"]))
        self.name = f"trained:{facts['name']}"
        self.facts = Facts(
            "normalised to mean 0, deviation 1 on held-out pictures" if normalise else "logits",
            "of the CLIP and the data it was trained on",
            str(source),
            f"diffalign run {facts['name']}",
        )
        self.dimensions = tuple(facts["dimensions"])
        location, spread = torch.tensor(facts["location"]), torch.tensor(facts["spread"])
        self.register_buffer("location", location if normalise else torch.zeros_like(location))
        self.register_buffer("spread", spread if normalise else torch.ones_like(spread))
        self.register_buffer("shares", _shares(self.dimensions, weights))
        self.register_buffer("mixture", self._mixture(user))
        self.requires_grad_(False).eval()

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures `[B, 3, H, W]` in [0, 1]; gradients reach them.

        Raises:
            DiffalignError: no pictures.
        """
        if len(media) == 0:
            raise DiffalignError(f"{self.name} got no pictures; expected at least one")
        mean, log_std = self._scores(media.to(self.location.device), list(prompts))
        scores = (mean - self.location[:, None]) / self.spread[:, None]
        members = torch.einsum("mbk,k->mb", scores, self.shares)
        variance = members.var(0) if len(members) > 1 else None
        if log_std is not None:
            own = (log_std.exp() / self.spread[:, None]).square() @ self.shares.square()
            variance = own.mean(0) + (0.0 if variance is None else variance)
        parts = {f"member_{i}": row for i, row in enumerate(members)} if len(members) > 1 else {}
        if len(self.dimensions) > 1:
            parts |= {name: scores[..., i].mean(0) for i, name in enumerate(self.dimensions)}
        return RewardOutput(members.mean(0), None if variance is None else variance.sqrt(), parts)

    def _scores(self, media: Tensor, prompts: list[str]) -> Scores:
        if not isinstance(self.network.head, PALHead):
            return self.network(media, prompts)
        clip, head = self.network.clip, self.network.head
        weights = self.mixture.expand(len(media), -1)
        scores = head.scores(clip.embed_images(media), clip.embed_texts(prompts), weights)
        return scores[None, :, None], None

    def _mixture(self, user: str | Sequence[float] | None) -> Tensor:
        """Mixture weights `[1, K]` of the user whose eyes are borrowed."""
        head = self.network.head
        if not isinstance(head, PALHead):
            if user is not None:
                raise DiffalignError("the option user belongs to PAL models; this run has none")
            return torch.ones(1, 1)
        with torch.no_grad():
            return _user_weights(head, user)


def clip_source(path: str) -> str:
    """What `load_clip` takes, with `scenes:NAME` for a CLIP shipped with the package.

    Raises:
        DiffalignError: no such CLIP is shipped.
    """
    if not path.startswith(SHIPPED):
        return path
    folder = Path(str(files("diffalign.samples"))) / "scorers" / path.removeprefix(SHIPPED)
    if not (folder / "open_clip_config.json").is_file():
        raise DiffalignError(f"no CLIP {path!r} is shipped with this installation; try scenes:clip")
    return str(folder)


def _description(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        _ = facts["head"], facts["clip"], facts["location"]
    except (OSError, ValueError, KeyError) as error:
        raise DiffalignError(
            f"{folder / DESCRIPTION} is damaged ({type(error).__name__}: {error})"
        ) from error
    return facts


def _load(network: RewardNetwork, path: Path, trained_clip: bool) -> None:
    state = load_file(path)
    expected = {name for name in network.state_dict() if name.startswith("head.")}
    problems = sorted(expected ^ {name for name in state if name.startswith("head.")})
    if problems or any(name.startswith("clip.") for name in state) != trained_clip:
        raise DiffalignError(
            f"{path} does not fit its {DESCRIPTION}: {', '.join(problems[:3]) or 'the CLIP'} differs"
        )
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise DiffalignError(
            f"{path} does not fit this CLIP: {str(error).splitlines()[1].strip()}"
        ) from error


def _shares(dimensions: Sequence[str], weights: Mapping[str, float] | None) -> Tensor:
    """Weight of each dimension `[K]`."""
    if weights is None:
        weights = {OVERALL: 1.0} if OVERALL in dimensions else dict.fromkeys(dimensions, 1 / len(dimensions))
    for name in weights:
        if name not in dimensions:
            hint = did_you_mean(name, list(dimensions))
            raise DiffalignError(f"no dimension {name!r}; the model scores {', '.join(dimensions)}.{hint}")
    return torch.tensor([float(weights.get(name, 0.0)) for name in dimensions])


def _user_weights(head: PALHead, user: str | Sequence[float] | None) -> Tensor:
    if user is None:
        return head.weights(None, 1)
    spec: PALSpec = head.spec
    if isinstance(user, str):
        if user not in spec.users:
            hint = did_you_mean(user, list(spec.users))
            raise DiffalignError(
                f"no user {user!r} among the {len(spec.users)} of the run.{hint} Give mixture weights for others."
            )
        return head.weights(torch.tensor([spec.users.index(user)]), 1)
    given = torch.tensor([list(map(float, user))])
    if given.shape[1] != spec.prototypes or (given < 0).any() or abs(float(given.sum()) - 1) > 1e-3:
        raise DiffalignError(
            f"user {list(user)}: expected {spec.prototypes} mixture weights from 0 up that sum to 1"
        )
    return given
