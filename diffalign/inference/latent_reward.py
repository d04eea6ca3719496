"""Rewards of noisy latents that were trained here (`diffalign train scenes/latent_reward`), as scorers.

A finished run's `final/` holds `trainable.safetensors` (the head) and `latent_reward.json`: the generator whose network
it reads, at which layer, and the head's spec. The scorer reads through the generator that it is attached to, which is
the one that is guided or learns; unattached it opens its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.backbones import Backbone, model_fingerprint, open_backbone
from diffalign.backbones.early import read_only
from diffalign.conditioning import Conditioning
from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError
from diffalign.rewards.base import Facts, RewardOutput
from diffalign.rewards.run_folders import DESCRIPTIONS, WEIGHTS, reward_folder
from diffalign.rewards.weights import load_exactly, read_state_dict
from diffalign.samples import FOLDER
from diffalign.sampling.collection import tell
from diffalign.sampling.latent_scorer import HeadSpec, LatentHead, LatentScorer

DESCRIPTION = DESCRIPTIONS["latent"]
MODEL_KEYS = ("path", "revision", "variant", "vae", "text_encoder_3", "guidance_embedding")
"""What of `model` decides on the network that is read."""
KEYS = ("name", "head", "model", "layer", "guidance", "latent_shape", "resolution", "fingerprint")
"""What a description says."""
KEPT_PROMPTS = 256


class LatentReward:
    """A trained reward of noisy latents; of pictures it scores the clean latents.

    Options:
        path: run folder of `trainer.method: latent_reward`, or its `final/`.
    """

    modality: Literal["image", "audio"] = "image"
    differentiable = False
    kind: Literal["sample", "set"] = "sample"
    name = "latent"
    facts = Facts(
        scale="log-odds: a lead of 1 is preferred in 73 of 100 cases, at the noise level it is scored at",
        licence="of the generator and the data it was trained on",
        backbone="the generator's own network",
        source="Liu et al. 2025, arXiv:2501.13918; Zhang et al. 2025, arXiv:2502.01051",
    )

    def __init__(self, path: str) -> None:
        folder = reward_folder(path, "latent")
        self.described = _description(folder)
        self.name = f"latent:{self.described['name']}"
        self.head = LatentHead(HeadSpec(**self.described["head"]))
        state = {name: value.float() for name, value in read_state_dict(folder / WEIGHTS).items()}
        load_exactly(self.head, state, folder / WEIGHTS)
        self.head.requires_grad_(False).eval()
        self.model = ModelConfig(**self.described["model"])
        self.device = torch.device("cpu")
        self._generator: Backbone | None = None
        self._told: dict[str, Conditioning] = {}

    def to(self, device: torch.device | str) -> LatentReward:
        """Move the head, and the place of a generator that is not open yet."""
        self.device = torch.device(device)
        self.head.to(self.device)
        return self

    def attach(self, backbone: Backbone) -> None:
        """Read through this generator's untuned network from here on, if it still has that.

        Raises:
            DiffalignError: it is not the generator that the reward was trained on, or of another resolution.
        """
        self._check(backbone)
        self._told.clear()
        self._generator = None if backbone.config.tune == "full" else backbone
        self.to(backbone.device)

    def score_step(self, latents: Tensor, times: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores `[B]` of latents `[B, C, h, w]` at times `[B]` of the process; gradients reach the latents."""
        generator = self._opened()
        scorer = LatentScorer(generator, self.head, self.described["layer"], self.described["guidance"])
        x, t = latents.to(generator.device), times.to(generator.device)
        return scorer(x, t, self._conditioning(generator, prompts))

    @torch.no_grad()
    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Scores of the clean latents of pictures `[B, 3, H, W]` in [0, 1], without gradients.

        Raises:
            DiffalignError: pictures of another size than the generator's.
        """
        generator = self._opened()
        if tuple(media.shape[2:]) != generator.resolution:
            height, width = generator.resolution
            raise DiffalignError(
                f"{self.name} scores pictures of {height}x{width} pixels, as its generator makes them; got "
                f"{media.shape[2]}x{media.shape[3]}"
            )
        latents, _ = generator.encode(media * 2 - 1)
        times = torch.zeros(len(media), dtype=torch.float32 if generator.process.is_flow else torch.long)
        return RewardOutput(self.score_step(latents, times, prompts).float())

    def _opened(self) -> Backbone:
        if self._generator is None:
            size = self.described["resolution"]
            self._generator = open_backbone(read_only(self.model), device=self.device, resolution=size)
            self._generator.core.eval()
            self._check(self._generator)
        return self._generator

    def _check(self, backbone: Backbone) -> None:
        own, shape = self.model, tuple(self.described["latent_shape"])
        if shape != backbone.latent_shape:
            raise DiffalignError(
                f"{self.name} reads latents of shape {shape} of {own.path}, but {backbone.config.path} has "
                f"{backbone.latent_shape}. Guide {own.path} at {self.described['resolution']} pixels, or train a "
                "latent_reward on this generator."
            )
        if model_fingerprint(backbone.config, network=True) != self.described["fingerprint"]:
            raise DiffalignError(
                f"{self.name} reads the network of {own.path} as it was in training, and {backbone.config.path} is "
                "another one. Take that generator (runs with adapters on it fit, too), or train a latent_reward on "
                "this one."
            )

    def _conditioning(self, generator: Backbone, prompts: Sequence[str]) -> Conditioning:
        """What the network is told for prompts; each is encoded once as long as it is remembered."""
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._told]
        if fresh:
            told = tell(generator, fresh, 1.0).conditioning
            self._told |= {prompt: told.select([row]) for row, prompt in enumerate(fresh)}
        found = Conditioning.concat([self._told[prompt] for prompt in prompts])
        for prompt in list(self._told)[: max(0, len(self._told) - KEPT_PROMPTS)]:
            del self._told[prompt]
        return found


class ScenesLatent(LatentReward):
    """A tiny reward of noisy latents of `scenes:tiny-sdxl`, trained on the noisy pairs by `scenes/latent_reward`.

    Options:
        path: folder of another one; None for the shipped one.
    """

    name = "scenes-latent"
    facts = Facts(
        scale=LatentReward.facts.scale,
        licence="Apache-2.0",
        backbone="scenes:tiny-sdxl (UNet of 4.1 M parameters, up to its middle)",
        source=f"configs/scenes/latent_reward.yaml; {LatentReward.facts.source}",
    )

    def __init__(self, path: str | None = None) -> None:
        super().__init__(path or str(FOLDER / "scorers" / "latent"))
        self.name = ScenesLatent.name


def _description(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        _ = [facts[key] for key in KEYS]
    except (OSError, ValueError, KeyError) as error:
        raise DiffalignError(
            f"{folder / DESCRIPTION} is damaged ({type(error).__name__}: {error})"
        ) from error
    return facts
