"""Configuration of `diffalign optimize`: strict pydantic models, filled from a recipe and dotted overrides.

No tensor library is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from diffalign.config import ModelConfig
from diffalign.recipes import optimize_text
from diffalign.strict import StrictModel
from diffalign.validation import validate_section
from diffalign.yamls import apply_override, parse_yaml


class GenerationConfig(StrictModel):
    """How a picture is made of its noises."""

    steps: int | None = Field(default=None, ge=1)
    """Denoising steps; null: 1 for models that are known to be made for few, else 25. Time grows with it, and memory of
    gradient methods unless `checkpointing` is on."""
    guidance: float | None = Field(default=None, ge=0)
    """As the model's pipeline means it; null: 0 for Turbo and schnell models, 8 for consistency models, else 5."""
    resolution: int | None = Field(default=None, ge=8, multiple_of=8)
    """Pixels; null: the model's own."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts that are optimised at once, and pictures that are made at once; memory grows with it."""
    checkpointing: Literal["none", "steps", "blocks"] = "none"
    """What the backward pass of gradient methods computes again instead of keeping it: nothing; each network call and
    the decoding as a whole (a third slower, and memory no longer grows with the steps); or the blocks inside, too."""
    kernel: Literal["ddim", "ancestral", "lcm", "flow_sde", "dance", "cps"] | None = None
    """Another stochastic sampler than the model's own (see docs/online.md); null: its own, so that
    `diffalign generate` makes the same pictures."""
    noise: float | None = Field(default=None, ge=0)
    """How much noise that kernel draws; null: the paper's value."""
    variables: Literal["initial", "all"] | None = None
    """Which noises are changed: the initial one, or also those of the steps, of samplers that draw some; null: all for
    dno, the initial one for other methods."""
    distilled: bool | None = None
    """Whether the model makes pictures in one to four steps; null: what its configuration tells."""


class BudgetConfig(StrictModel):
    """What a picture may cost; null is no limit. Without any, a method does what its own options say."""

    evaluations: int | None = Field(default=None, ge=1)
    """Network evaluations per picture: one per step, two with classifier-free guidance. Backward passes are reported
    apart; each costs about two."""
    seconds: float | None = Field(default=None, gt=0)
    """Seconds per picture; pictures that are worked on together share their sum."""


class OptimizeConfig(StrictModel):
    """One run of `diffalign optimize`."""

    name: str = Field(default="optimised", min_length=1, pattern=r"^\w[^/\\]*$")
    """Name of the folder that is written, in `output_dir`."""
    output_dir: str = "optimised"
    """Folder that holds it."""
    seed: int = Field(default=0, ge=0)
    """First seed; each prompt's own is derived from it as in `diffalign generate`."""
    model: ModelConfig
    """The generator; a run folder as `model.path` is its tuned model."""
    prompts: str | list[str] | None = None
    """`scenes:held-out`, a file, a public set, or a list of texts."""
    num_prompts: int | None = Field(default=None, ge=1)
    """Use the first so many; null: all."""
    generation: GenerationConfig = GenerationConfig()
    """How pictures are made."""
    reward: str | dict[str, Any] | None = None
    """What is to be high: a name, `name@PATH`, `module:Name`, a file, or a mapping with the key `reward`."""
    labels: Literal["reward", "person"] = "reward"
    """Who says which pictures are better: the reward, or a person in the terminal, who ranks candidates. A reward that
    is named beside a person is only measured."""
    caution: float = Field(default=0.0, ge=0)
    """Optimise `mean - caution std` of the reward, a lower confidence bound; needs one that knows its uncertainty."""
    held_out: list[str | dict[str, Any]] = Field(default_factory=list)
    """Rewards that are measured before and after and never optimised: where these fall, the reward was exploited."""
    method: dict[str, Any] = Field(default_factory=lambda: {"method": "reno"})
    """The method: `method` and that method's own options."""
    budget: BudgetConfig = BudgetConfig()
    """When to stop."""
    baseline: Literal["both", "evaluations", "none"] = "both"
    """Best-of-N that is run for comparison: at equal network evaluations and at equal seconds, which doubles the time;
    at equal evaluations; or not at all."""
    shown: int = Field(default=8, ge=0)
    """Of how many prompts the way from noise to noise is kept as an animation."""


def load_optimize_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> OptimizeConfig:
    """Read a recipe (a file or a shipped name such as `optimize/tiny_lcm`) and apply `key.path=value` overrides.

    Raises:
        DiffalignError: no such recipe, broken YAML, an unknown key (the nearest one is named) or a bad value.
    """
    text, origin = optimize_text(path_or_name)
    return optimize_config(parse_yaml(text, origin), overrides, origin)


def optimize_config(values: dict[str, Any], overrides: Sequence[str], origin: str) -> OptimizeConfig:
    """A checked configuration of values and overrides. Naming another method drops the options of the first.

    Raises:
        DiffalignError: an unknown key or a bad value.
    """
    method = values.get("method")
    for override in overrides:
        name = override.partition("=")[2] if override.startswith("method.method=") else None
        if name and isinstance(method, dict) and method.get("method") != name:
            values["method"] = {}
        apply_override(values, override)
    config: OptimizeConfig = validate_section(OptimizeConfig, values, origin=origin)
    return config
