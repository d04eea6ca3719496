"""Scoring a batch by several rewards, or by several parts of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import DiffalignError, did_you_mean
from diffalign.rewards.base import Reward, RewardOutput


@dataclass(frozen=True)
class Members:
    """What the members of a wrapper said about a batch.

    Fields:
        values: `[K, B]` float32. stds: `[K, B]`, 0 for a member without one; None when no member has one.
        parts: each member's score under its name, its own parts under `name/part`.
    """

    values: Tensor
    stds: Tensor | None
    parts: dict[str, Tensor]


def check_batch(name: str, media: Tensor, prompts: Sequence[str]) -> None:
    """Refuse an empty batch, and one with another number of prompts than media.

    Raises:
        DiffalignError: as said.
    """
    if len(media) == 0 or len(media) != len(prompts):
        raise DiffalignError(
            f"reward {name!r} got {len(media)} media and {len(prompts)} prompts; "
            "expected at least one sample and as many prompts as samples"
        )


def score_members(name: str, of: Sequence[Reward], media: Tensor, prompts: Sequence[str]) -> Members:
    """Score a batch by every reward.

    Raises:
        DiffalignError: empty batch, or as the members do.
    """
    check_batch(name, media, prompts)
    outputs = [reward.score(media, prompts) for reward in of]
    first = outputs[0].mean
    stds = None
    if any(output.std is not None for output in outputs):
        rows = [torch.zeros_like(o.mean) if o.std is None else o.std for o in outputs]
        stds = torch.stack([row.to(first.device) for row in rows]).float()
    parts: dict[str, Tensor] = {}
    for label, output in zip(labels(of), outputs, strict=True):
        parts |= prefixed(label, output)
    values = torch.stack([output.mean.to(first.device) for output in outputs]).float()
    return Members(values, stds, parts)


def labels(of: Sequence[Reward]) -> list[str]:
    """The rewards' names, numbered from the second of the same name on."""
    names: list[str] = []
    for reward in of:
        earlier = sum(1 for other in of[: len(names)] if other.name == reward.name)
        names.append(f"{reward.name}-{earlier + 1}" if earlier else reward.name)
    return names


def score_parts(
    name: str, reward: Reward, members: Sequence[str], media: Tensor, prompts: Sequence[str]
) -> Members:
    """Score a batch once and take named parts of the one reward as members: an ensemble of heads in one pass.

    Raises:
        DiffalignError: empty batch, or the reward gives no such part.
    """
    check_batch(name, media, prompts)
    output = reward.score(media, prompts)
    for member in members:
        if member not in output.parts:
            known = sorted(output.parts)
            raise DiffalignError(
                f"reward {name!r}: {reward.name!r} gives no part {member!r}; its parts: "
                f"{', '.join(known) or 'none'}.{did_you_mean(member, known)}"
            )
    values = torch.stack([output.parts[member] for member in members]).float()
    return Members(values, None, prefixed(reward.name, output))


def prefixed(label: str, output: RewardOutput) -> dict[str, Tensor]:
    """A reward's score under its label, its parts under `label/part`."""
    return {label: output.mean} | {f"{label}/{part}": value for part, value in output.parts.items()}
