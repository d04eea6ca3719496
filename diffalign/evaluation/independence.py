"""Warnings about scorers that are not independent: of one another, or of what the model was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

from diffalign.rewards import REWARDS, Facts, Reward, Spec, facts_of
from diffalign.yamls import parse_yaml

REWARD_FILES = (".yaml", ".yml", ".json")


def independence_warnings(
    rewards: Sequence[Reward], specs: Sequence[Spec], trainer: Mapping[str, Any]
) -> list[str]:
    """What a reader must know before counting the rewards as separate evidence.

    Args:
        rewards: the scorers of an evaluation; `specs`: what they were loaded from.
        trainer: the run's `trainer` section; rewards are looked for under `reward` and `rewards`.
    """
    return shared_backbones(rewards) + trained_on(rewards, specs, trainer)


def shared_backbones(rewards: Sequence[Reward]) -> list[str]:
    """A warning for each pair of scorers that stand on the same pretrained network."""
    known = [(reward.name, _backbones(reward)) for reward in rewards]
    return [
        f"{one} and {other} share the backbone {', '.join(sorted(common.values()))}: they are wrong about the "
        "same pictures, so count them as one opinion"
        for (one, first), (other, second) in combinations(known, 2)
        if (common := {key: first[key] for key in first.keys() & second.keys()})
    ]


def trained_on(rewards: Sequence[Reward], specs: Sequence[Spec], trainer: Mapping[str, Any]) -> list[str]:
    """A warning for each scorer that the run was optimised for, or that shares a backbone with such a one."""
    used = [name for name in dict.fromkeys(_names(trainer)) if name]
    backbones: dict[str, str] = {}
    for name in used:
        backbones |= _keyed(catalogue_facts(name).backbone)
    found = []
    for reward, spec in zip(rewards, specs, strict=True):
        common = _backbones(reward).keys() & backbones.keys()
        if set(_names({"reward": spec})) & set(used):
            found.append(
                f"{reward.name} is what this run was trained on: its gain shows that training worked, not that "
                "pictures are better. Judge by the other scorers"
            )
        elif common:
            shared = ", ".join(backbones[key] for key in sorted(common))
            found.append(
                f"{reward.name} shares the backbone {shared} with a reward this run was trained on, so it is "
                "not independent of the training"
            )
    return found


def catalogue_facts(name: str) -> Facts:
    """Facts of a reward of the catalogue by its class, which is not instantiated; empty when there are none."""
    path = REWARDS.get(name)
    if path is None:
        return Facts()
    module, _, attribute = path.partition(":")
    try:
        facts = getattr(getattr(import_module(module), attribute), "facts", None)
    except (ImportError, AttributeError):
        return Facts()
    return facts if isinstance(facts, Facts) else Facts()


def _names(value: Mapping[str, Any]) -> Iterator[str]:
    """Names of all scorers in a configuration or specification; of a wrapper those of what it wraps."""
    for key in ("of",) if "of" in value else ("reward", "rewards"):
        yield from _spec_names(value.get(key))


def _spec_names(spec: Any) -> Iterator[str]:
    if isinstance(spec, str) and Path(spec).suffix in REWARD_FILES and Path(spec).is_file():
        yield from _names(parse_yaml(Path(spec).read_text(encoding="utf-8"), spec))
    elif isinstance(spec, str):
        yield spec.partition("@")[0]
    elif isinstance(spec, Mapping):
        yield from _names(spec)
    elif isinstance(spec, Sequence):
        for one in spec:
            yield from _spec_names(one)


def _backbones(reward: Reward) -> dict[str, str]:
    """Backbones of a reward, of a wrapper those of what it wraps: comparable key to the name as written."""
    inner = getattr(reward, "of", None)
    if inner is None:
        return _keyed(facts_of(reward).backbone)
    found: dict[str, str] = {}
    for one in inner if isinstance(inner, list | tuple) else [inner]:
        found |= _backbones(one)
    return found


def _keyed(backbone: str) -> dict[str, str]:
    """A stated backbone without its conditions (`... unless model says otherwise`); empty when none is stated."""
    text = backbone.partition(" unless ")[0]
    return {" ".join(text.lower().split()): text} if text else {}
