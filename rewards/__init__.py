"""Scorers of generated media, by name."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError, did_you_mean
from diffalign.rewards.base import FunctionReward, Reward, RewardOutput

REWARDS: dict[str, str] = {
    "scenes-judge": "diffalign.rewards.scenes_judge:ScenesJudge",
}

__all__ = ["REWARDS", "FunctionReward", "Reward", "RewardOutput", "load_reward"]


def load_reward(name: str) -> Reward:
    """A reward by its name in `REWARDS`, or from your own code as `module:Name`.

    `Name` may be a reward, a class that gives one when called without arguments, or a plain function
    `f(images [B, 3, H, W] in [0, 1], prompts) -> B numbers`. Modules in the working folder are found too.

    Raises:
        DiffalignError: unknown name (the nearest is named), or `module:Name` does not lead to a reward.
    """
    if name in REWARDS:
        return _as_reward(_imported(REWARDS[name]), name)
    if ":" in name:
        return _as_reward(_imported(name), name)
    hint = did_you_mean(name, list(REWARDS))
    known = ", ".join(sorted(REWARDS))
    raise DiffalignError(
        f"unknown reward {name!r}; expected one of: {known}; or `module:Name` from your code.{hint}"
    )


def _imported(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise DiffalignError(
            f"reward {path!r}: no module named {error.name!r}; expected `module:Name` of an importable module"
        ) from error
    except AttributeError as error:
        raise DiffalignError(f"reward {path!r}: {error}") from error


def _as_reward(thing: Any, origin: str) -> Reward:
    if isinstance(thing, type):
        thing = thing()
    if isinstance(thing, Reward):
        return thing
    if callable(thing):
        return FunctionReward(thing)
    raise DiffalignError(
        f"{origin!r} is a {type(thing).__name__}; expected a reward (name, modality, differentiable, kind, "
        "score) or a function f(images, prompts)"
    )
