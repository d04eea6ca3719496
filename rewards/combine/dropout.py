"""Uncertainty of one scorer from its dropout (Gal and Ghahramani 2016)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Reward, RewardOutput
from diffalign.rewards.combine.members import check_batch, prefixed
from diffalign.rewards.combine.passes import spread_over_passes
from diffalign.rewards.combine.wrapper import Of, Wrapper, only


class MCDropout(Wrapper):
    """Mean and std over passes with dropout switched on; everything else stays in evaluation mode.

    Only dropout layers count: a scorer without them (CLIP towers have none) is refused, and where only a head has
    them, only the head's uncertainty is seen.

    Args:
        of: a reward with dropout layers. passes: stochastic passes, each as dear as a score.
        seed: of the masks, the same at every call; None draws new ones each time.
    """

    def __init__(self, of: Of, passes: int = 8, seed: int | None = 0) -> None:
        inner = only(of, "mc-dropout")
        super().__init__(inner, f"mc-dropout({getattr(inner, 'name', inner)})")
        if passes < 2:
            raise DiffalignError(f"reward {self.name!r}: passes is {passes}; a std needs at least 2")
        self.passes, self.seed = passes, seed
        self.layers = [m for m in _modules(inner) if isinstance(m, _DropoutNd) and m.p > 0]
        if not self.layers:
            raise DiffalignError(
                f"reward {inner.name!r} has no dropout layers, so mc-dropout would see no uncertainty; "
                "use 'augmented' or an ensemble instead"
            )

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`; parts hold those of the plain pass under the reward's name."""
        check_batch(self.name, media, prompts)
        inner = self.of[0]
        with torch.no_grad():
            plain = inner.score(media, prompts)
        with _seeded(self.seed, _cuda_devices(inner)), _switched_on(self.layers):
            outputs = [inner.score(media, prompts) for _ in range(self.passes)]
        mean, std = spread_over_passes(outputs)
        return RewardOutput(mean, std, prefixed(inner.name, plain))


@contextmanager
def _switched_on(layers: Sequence[nn.Module]) -> Iterator[None]:
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.train()
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.train(mode)


@contextmanager
def _seeded(seed: int | None, devices: Sequence[int]) -> Iterator[None]:
    """The global random streams of the CPU and of some GPUs set to a seed, and put back afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def _cuda_devices(reward: Reward) -> list[int]:
    """GPUs that hold weights of the reward."""
    devices = {p.device for module in _modules(reward) for p in module.parameters(recurse=False)}
    return sorted(device.index for device in devices if device.type == "cuda")


def _modules(reward: Reward) -> Iterator[nn.Module]:
    """Modules of a reward: its own, those it keeps as attributes, and those of the rewards it wraps."""
    if isinstance(reward, nn.Module):
        yield from reward.modules()
    elif isinstance(reward, Wrapper):
        for inner in reward.of:
            yield from _modules(inner)
    else:
        for thing in vars(reward).values():
            if isinstance(thing, nn.Module):
                yield from thing.modules()
