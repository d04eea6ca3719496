"""Options of the policy-gradient methods, and their authors' values as named forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.objectives.advantages import AdvantageForm
from diffalign.randomness import generator
from diffalign.sampling.transition import Reduction
from diffalign.strict import UnitRange
from diffalign.trainers.online import OnlineOptions

FormName = Literal[
    "ddpo",
    "dpok",
    "rlcm",
    "flow_grpo",
    "grpo_guard",
    "flow_dppo",
    "tempflow",
    "dance",
    "mix",
    "fast",
    "flash",
    "cps",
]

_FLOW = {"kernel": "flow_sde", "noise": 0.7, "steps": 10, "guidance": 4.5}
_FLOW_GRPO: dict[str, Any] = {
    "samples": 24,
    "advantage": "group_global_std",
    "last_step": "drawn",
    "guidance_gradient": "conditional",
}
FORMS: dict[str, dict[str, Any]] = {
    "ddpo": {
        "sampling": {"kernel": "ddim", "noise": 1.0, "steps": 50, "guidance": 5.0},
        "advantage": "per_prompt",
    },
    # The release multiplies the reward by 100 and its KL by 0.01; r - mean_g stands for its learned value function.
    "dpok": {
        "sampling": {"kernel": "ddim", "noise": 1.0, "steps": 50, "guidance": 7.5},
        "advantage": "no_std",
        "advantage_clip": None,
        "surrogate": "clamp",
        "kl": 1e-4,
        "kl_form": "prediction",
    },
    "rlcm": {
        "sampling": {"kernel": "lcm", "steps": 8, "guidance": 8.0},
        "advantage": "per_prompt",
        "advantage_clip": 10.0,
    },
    "flow_grpo": {"sampling": _FLOW, **_FLOW_GRPO, "kl": 0.04, "kl_form": "without_dt"},
    "grpo_guard": {"sampling": _FLOW, **_FLOW_GRPO, "correction": "guard", "clip_range": 2e-6},
    "flow_dppo": {"sampling": _FLOW, **_FLOW_GRPO, "surrogate": "divergence"},
    "tempflow": {
        "sampling": {**_FLOW, "same_start": True},
        **_FLOW_GRPO,
        "advantage": "group",
        "correction": "tempflow",
        "kl": 0.004,
    },
    "dance": {
        "sampling": {"kernel": "dance", "noise": 0.3, "steps": 16, "guidance": 1.0, "same_start": True},
        "samples": 12,
        "advantage": "group",
        "last_step": "deterministic",
        "fraction": 0.6,
    },
    "mix": {
        "sampling": {"kernel": "flow_sde", "noise": 0.7, "steps": 25, "guidance": 1.0, "same_start": True},
        "samples": 12,
        "advantage": "group",
        "last_step": "deterministic",
        "window_size": 4,
        "window_place": "moving",
    },
    "fast": {
        "sampling": {**_FLOW, "same_start": True},
        **_FLOW_GRPO,
        "clip_range": 1e-5,
        "window_size": 2,
        "window_place": "drawn",
        "window_range": (0.0, 0.5),
    },
    "flash": {
        "sampling": {**_FLOW, "steps": 20, "same_start": True},
        **_FLOW_GRPO,
        "correction": "flash",
        "clip_range": 1e-3,
        "window_size": 1,
        "window_place": "drawn",
        "window_range": (0.0, 0.5),
    },
    "cps": {
        "sampling": {"kernel": "cps", "noise": 0.8, "steps": 10, "guidance": 1.0, "same_start": True},
        **_FLOW_GRPO,
        "normalised": False,
        "clip_range": 1e-5,
        "window_size": 3,
        "window_place": "drawn",
        "window_range": (0.0, 0.5),
    },
}


class PolicyGradientConfig(OnlineOptions):
    """DDPO, DPOK, RLCM, Flow-GRPO and its relatives."""

    method: Literal["policy_gradient"] = "policy_gradient"
    form: FormName = "ddpo"
    """Whose values fill in what is not given, of these options, `samples` and `sampling`: those of DDPO, DPOK, RLCM
    (consistency models), or for flows Flow-GRPO, GRPO-Guard, Flow-DPPO, TempFlow, Dance, Mix, Flow-GRPO-Fast, Flash,
    Flow-CPS (docs/methods/policy_gradient.md has the table)."""
    advantage: AdvantageForm = "group"
    """What a reward is compared with: global, per_prompt (its prompt's last rewards), group, group_global_std, no_std,
    per_reward (components normalised apart, then their sum), per_reward_sum (not normalised again), win_rate."""
    advantage_clip: float | None = Field(default=5.0, gt=0)
    """Advantages are cut to plus and minus this. null: as they are."""
    parts: dict[str, float] = Field(default_factory=dict)
    """per_reward: weights of the reward's components by name. Empty: all with weight 1; without any, the reward."""
    buffer: int = Field(default=32, ge=1)
    """per_prompt: rewards remembered per prompt."""
    min_count: int = Field(default=16, ge=1)
    """per_prompt: prompts with fewer remembered rewards are compared with the whole round."""
    filter_flat: bool = True
    """Leave out groups whose rewards are all equal. false: they cost forwards, and only a KL term learns from them."""
    surrogate: Literal["clip", "clamp", "divergence", "none"] = "clip"
    """clip: PPO. clamp: no gradient outside of the band at all (DPOK). divergence: no clip; steps that have diverged by
    `max_divergence` and would go on to are left out (Flow-DPPO). none: bare importance sampling."""
    clip_range: float = Field(default=1e-4, gt=0)
    """How far a ratio may leave 1. Belongs to `log_prob_reduction`: with means over D elements it allows D times as
    much on the true log-ratio, so another model or resolution makes another trust region of it."""
    log_prob_reduction: Reduction = "mean"
    """Log-probabilities are means (all releases) or sums over latent elements; `clip_range` and `kl` belong to it."""
    normalised: bool = True
    """false: log-ratios are differences of -|x - mean|^2 without 1 / (2 std^2), Flow-GRPO's form for cps."""
    max_divergence: float = Field(default=1e-5, gt=0)
    """divergence: largest KL from the old policy's step, a mean over elements."""
    correction: Literal["none", "guard", "tempflow", "flash"] = "none"
    """Log-probabilities of steps differ in gradient by an order of magnitude. guard: centred log-ratios of equal
    spread, loss over -dt (GRPO-Guard, flows). tempflow: losses times std over its mean. flash: times 1 / gradient."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence of each step to the reference, in closed form; 0 asks no reference and saves its
    forward. Holds quality and diversity; governs speed on flows."""
    kl_form: Literal["exact", "without_dt", "prediction"] = "exact"
    """exact: the divergence. without_dt: times -dt (Flow-GRPO's code, flows). prediction: squared difference of
    predictions, without a weight over steps (DPOK's code)."""
    kl_share: float = Field(default=1.0, gt=0, le=1)
    """Share of a round's samples that the KL holds: those whose reward is most uncertain, by its std or else by the
    disagreement of its components with it (GARDO). 1: all."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the stochastic steps that a sample is trained on, drawn per sample: cost in proportion."""
    last_step: Literal["trained", "drawn", "deterministic"] = "trained"
    """The step to clean latents: trained, drawn with noise but not trained (Flow-GRPO), or without noise (Dance)."""
    window_size: int | None = Field(default=None, ge=1)
    """Number of neighbouring steps that draw noise and are trained in a round, the others being deterministic. null:
    those of `sampling.window`, or all."""
    window_place: Literal["moving", "drawn"] = "moving"
    """moving: from noisy to clean over the rounds, and from the start again (MixGRPO). drawn: anew every round
    (Flow-GRPO-Fast). Always one window for all groups."""
    window_every: int = Field(default=25, ge=1)
    """moving: rounds between moves."""
    window_stride: int = Field(default=1, ge=0)
    """moving: steps per move; 0 stays at the noisiest."""
    window_range: UnitRange = (0.0, 1.0)
    """Part of the steps that windows lie in, from noise (0) to clean (1)."""
    guidance_gradient: Literal["both", "conditional"] = "both"
    """Through which branches of guidance gradients flow. both: in one forward (DDPO). conditional: two thirds of the
    compute (Flow-GRPO); ratios then start at 1 up to rounding, since branches are run apart."""

    @model_validator(mode="after")
    def _values_of_the_form(self) -> PolicyGradientConfig:
        form = dict(FORMS[self.form])
        known = self.sampling.model_fields_set
        own = {name: value for name, value in form.pop("sampling").items() if name not in known}
        filled = {name: value for name, value in form.items() if name not in self.model_fields_set}
        filled["sampling"] = self.sampling.model_copy(update=own)
        for name, value in filled.items():
            setattr(self, name, value)
        return self

    @model_validator(mode="after")
    def _corrections_fit(self) -> PolicyGradientConfig:
        if self.correction == "guard" and not self.normalised:
            raise ValueError("correction guard has log-ratios of its own; expected normalised: true")
        return self


def window_range(config: PolicyGradientConfig, steps: int) -> tuple[int, int]:
    """Steps that windows lie in, from the first to before the second; the last step only if it is trained."""
    low, high = config.window_range
    last = steps if config.last_step == "trained" else steps - 1
    return int(low * steps), min(int(high * steps), last)


def round_window(config: PolicyGradientConfig, steps: int, number: int, seed: int) -> tuple[int, int]:
    """The stochastic steps of a round, `window_size` of them in every round.

    Raises:
        DiffalignError: the window is larger than its range.
    """
    (first, end), size = window_range(config, steps), config.window_size or 1
    places = end - first - size + 1
    if places < 1:
        raise DiffalignError(
            f"trainer.window_size is {size}, but trainer.window_range holds {max(0, end - first)} of {steps} steps; "
            "expected a smaller window, or a larger range."
        )
    if config.window_place == "moving":
        place = number // config.window_every * config.window_stride % places
    else:
        place = int(torch.randint(places, (), generator=generator(seed, "window", number)))
    return first + place, first + place + size


def drawn_steps(count: int, fraction: float, keys: Sequence[int]) -> Tensor:
    """Which of `count` steps `[count]` a sample is trained on, at least one; `keys` name the sample."""
    chosen = torch.ones(count, dtype=torch.bool)
    kept = max(1, int(count * fraction + 1e-9))
    if kept < count:
        chosen[torch.randperm(count, generator=generator("trained steps", *keys))[kept:]] = False
    return chosen
