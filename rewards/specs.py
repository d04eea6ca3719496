"""Rewards by name, from your own code, or composed in YAML: what a recipe or the command line may say.

A specification is

- a name of the catalogue, with `@PATH` for weights from another hub id, folder or file: `pickscore@models/pick`;
- `module:Name` for your own reward class, instance or plain function;
- a mapping with the key `reward` and the options of its constructor: `{reward: clip, model: ViT-H-14}`. The option
  `of` holds the specification, or the list of them, of what a wrapper wraps;
- a `.yaml` or `.json` file that holds such a mapping;
- the folder of a finished run that trained a reward: `runs/scenes-reward-model` is `trained@runs/scenes-reward-model`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from diffalign.errors import DiffalignError, did_you_mean
from diffalign.rewards.base import FunctionReward, Reward
from diffalign.rewards.run_folders import reward_of

Spec: TypeAlias = str | Mapping[str, Any]


def build_reward(spec: Spec, catalogue: Mapping[str, str]) -> Reward:
    """The reward that a specification describes.

    Args:
        catalogue: name to `module:Class`.

    Raises:
        DiffalignError: unknown name or option (the nearest is named), or the thing found is not a reward.
    """
    if isinstance(spec, Mapping):
        return _from_mapping(spec, catalogue)
    if Path(spec).suffix in (".yaml", ".yml", ".json"):
        return _from_file(Path(spec), catalogue)
    name, _, path = spec.partition("@")
    if name in catalogue:
        return _construct(_imported(catalogue[name]), name, {"path": path} if path else {})
    if Path(spec).is_dir():
        return build_reward(f"{reward_of(spec)}@{spec}", catalogue)
    if ":" in spec:
        return _construct(_imported(spec), spec, {})
    hint = did_you_mean(name, list(catalogue))
    known = ", ".join(sorted(catalogue))
    raise DiffalignError(
        f"unknown reward {name!r}; expected one of: {known}; `module:Name` from your code, or "
        f"the folder of a run that trained one.{hint}"
    )


def _from_mapping(spec: Mapping[str, Any], catalogue: Mapping[str, str]) -> Reward:
    options = dict(spec)
    name = options.pop("reward", None)
    if not isinstance(name, str):
        raise DiffalignError(
            f"a reward given as a mapping needs the key 'reward' with a name; got keys {sorted(map(str, spec))}"
        )
    if not options:
        return build_reward(name, catalogue)
    if "of" in options:
        inner = options["of"]
        nested = isinstance(inner, (list, tuple))
        options["of"] = (
            [build_reward(one, catalogue) for one in inner] if nested else build_reward(inner, catalogue)
        )
    if name not in catalogue and ":" not in name:
        return build_reward(name, catalogue)
    return _construct(_imported(catalogue.get(name, name)), name, options)


def _from_file(path: Path, catalogue: Mapping[str, str]) -> Reward:
    from diffalign.yamls import parse_yaml

    if not path.is_file():
        raise DiffalignError(f"no reward file {str(path)!r}; expected a YAML mapping with the key 'reward'")
    return _from_mapping(parse_yaml(path.read_text(encoding="utf-8"), str(path)), catalogue)


def _construct(thing: Any, origin: str, options: dict[str, Any]) -> Reward:
    """Call a class with options; take an instance or a function as it is."""
    if isinstance(thing, type):
        _check_options(thing, origin, options)
        return _as_reward(thing(**options), origin)
    if options:
        raise DiffalignError(f"reward {origin!r} takes no options; got {sorted(options)}")
    return _as_reward(thing, origin)


def _check_options(kind: type, origin: str, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(kind).parameters
    allowed = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in options:
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            raise DiffalignError(
                f"reward {origin!r} has no option {name!r}; its options: {known}.{did_you_mean(name, allowed)}"
            )
    missing = [n for n in allowed if parameters[n].default is inspect.Parameter.empty and n not in options]
    if missing:
        raise DiffalignError(f"reward {origin!r} needs {', '.join(missing)}; give it as a mapping in YAML")


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
    if isinstance(thing, Reward):
        return thing
    if callable(thing):
        return FunctionReward(thing)
    raise DiffalignError(
        f"{origin!r} is a {type(thing).__name__}; expected a reward (name, modality, differentiable, kind, "
        "score) or a function f(images, prompts)"
    )
