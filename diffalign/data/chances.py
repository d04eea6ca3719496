"""From score margins to the chance that an image is better: a temperature, and the noise of the labels, are fitted.

A pair's margin is the score of its first image minus that of its second. Bradley and Terry (1952) turn it into
`sigmoid(margin / T)`. T is found on the given labels by maximum likelihood, as in Platt (1999) and Guo et al. (2017,
arXiv 1706.04599). Labels that are wrong at a rate e agree with a perfect reward in 1 - e of the pairs only, so that
a temperature alone would be too high: the likelihood of a label is `e + (1 - 2 e) chance`, and e is fitted as well.

A reward that knows nothing and labels that are half wrong look alike. Two weak priors make the fit choose the first
reading, and say too little rather than too much where the labels do not decide: log T has a half-normal one (deviation
1) below half of the typical margin, where even small margins are called certain; e has the density 1 - 2 e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, ndtr

from diffalign.data.records import TIE
from diffalign.errors import DiffalignError

Array = NDArray[np.float64]
Link = Literal["members", "normal"]

FITTED = 50_000  # pairs that a fit looks at; more do not change its third digit
SPAN = 7.0  # a temperature lies within e^-7 to e^7 of the typical margin
NOISES = np.linspace(0.0, 0.45, 10)


@dataclass(frozen=True)
class Margins:
    """Score margins of N pairs.

    Fields:
        members: `[K, N]`, one row per member of an ensemble; NaN for pairs without scores.
        own_std: `[N]` standard deviation of the margin by a single member's own account, None without one.
    """

    members: Array
    own_std: Array | None = None

    @property
    def mean(self) -> Array:
        """`[N]`."""
        return self.members.mean(0)

    @property
    def std(self) -> Array | None:
        """`[N]` over members (unbiased), or a single member's own; None when there is neither."""
        return self.members.std(0, ddof=1) if len(self.members) > 1 else self.own_std

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Margins:
        """The margins of some pairs."""
        return Margins(self.members[:, rows], None if self.own_std is None else self.own_std[rows])

    def scaled(self, units: Array) -> Margins:
        """The margins in other units `[K]`, one per member."""
        own = None if self.own_std is None else self.own_std / units[0]
        return Margins(self.members / units[:, None], own)


@dataclass(frozen=True)
class Calibration:
    """How margins become chances.

    Fields:
        temperature: T. label_noise: rate e at which labels are taken to be wrong.
        pairs: decided pairs behind the fit, 0 when both numbers were given.
    """

    temperature: float
    label_noise: float = 0.0
    pairs: int = 0


def chances(margins: Margins, temperature: float, link: Link = "members") -> Array:
    """Chance `[N]` that the first image is better; NaN for pairs without scores.

    `members`: the mean over members of `sigmoid(margin / T)`. `normal`: `Phi(margin / sqrt(std^2 + 8 T^2 / pi))`, the
    mean of that sigmoid over a normally distributed margin (MacKay 1992), which is `Phi(margin / std)` for T = 0.

    Raises:
        DiffalignError: T is negative, or 0 where nothing else gives a scale.
    """
    if not temperature >= 0 or (temperature == 0 and (link == "members" or margins.std is None)):
        raise DiffalignError(
            f"the temperature is {temperature:g}; expected a positive number (0 only for the normal link with a std)"
        )
    if link == "members":
        return expit(margins.members / temperature).mean(0)
    std = 0.0 if margins.std is None else margins.std
    spread = np.sqrt(np.square(std) + 8 / np.pi * temperature**2)
    mean = margins.mean
    # Members that agree to the bit are certain: the limit of spread -> 0.
    safe = np.where(spread > 0, spread, 1.0)
    return np.where(spread > 0, ndtr(mean / safe), (1 + np.sign(mean)) / 2)


def uncertainty(margins: Margins, temperature: float) -> Array | None:
    """How much the chance itself is in doubt, `[N]` in [0, 1]; None when neither members nor a std say.

    Twice the standard deviation of the members' chances (dividing by K, so 1 is an even split of certain members), or
    the change of the chance from one standard deviation below the margin to one above.
    """
    scale = max(temperature, np.finfo(np.float64).tiny)
    if len(margins.members) > 1:
        return 2 * expit(margins.members / scale).std(0)
    if margins.own_std is None:
        return None
    mean = margins.mean
    return expit((mean + margins.own_std) / scale) - expit((mean - margins.own_std) / scale)


def calibrate(
    margins: Margins,
    given: Array,
    link: Link = "members",
    temperature: float | None = None,
    label_noise: float | None = 0.0,
) -> Calibration:
    """Fit what is None of temperature and label noise on the decided labels.

    Args:
        given: labels `[N]` of the first image; ties and pairs without scores are left out.
        label_noise: a rate in [0, 0.5).

    Raises:
        DiffalignError: something is to be fitted and no decided pair has a score with a margin, or a bad rate.
    """
    if label_noise is not None and not 0 <= label_noise < 0.5:
        raise DiffalignError(f"the label noise is {label_noise}; expected a rate from 0 to below 0.5, or fit")
    if temperature is not None and label_noise is not None:
        return Calibration(temperature, label_noise)
    usable = np.flatnonzero((given != TIE) & np.isfinite(margins.mean))
    rows = usable[:: max(1, -(-len(usable) // FITTED))]
    found = margins.take(rows)
    scale = _typical(found)
    if scale == 0 and temperature is not None:  # no pair says anything about the labels' noise
        return Calibration(temperature, label_noise or 0.0)
    if scale == 0:
        raise DiffalignError(
            f"a temperature cannot be fitted: none of {len(given)} pairs has a decided label and two different scores. "
            "Give a temperature, or pairs with labels."
        )
    target = _target(given[rows])

    def fit(noise: float) -> tuple[float, float, float]:
        return (*_fit(found, target, link, scale, temperature, noise), noise)

    if label_noise is not None:
        best = fit(label_noise)
    else:
        best = min(fit(noise) for noise in NOISES.tolist())
        around = (max(0.0, best[2] - NOISES[1]), min(0.49, best[2] + NOISES[1]))
        refined = minimize_scalar(
            lambda e: fit(float(e))[0], bounds=around, method="bounded", options={"xatol": 1e-3}
        )
        best = min(best, fit(float(refined.x)))
    return Calibration(best[1], best[2], len(usable))


def label_chances(chance: Array, label_noise: float) -> Array:
    """Chance `[N]` that a label says so: what calibration against given labels must be measured on."""
    return label_noise + (1 - 2 * label_noise) * chance


def _fit(
    margins: Margins, target: Array, link: Link, scale: float, temperature: float | None, noise: float
) -> tuple[float, float]:
    """Mean negative log posterior, and the temperature of its minimum (or the given one), at a label noise."""

    def loss(value: float) -> float:
        p = np.clip(label_chances(chances(margins, value, link), noise), 1e-12, 1 - 1e-12)
        likelihood = (target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
        below = min(0.0, float(np.log(value / (scale / 2)))) if value > 0 else 0.0
        return float(-likelihood + (below**2 / 2 - np.log1p(-2 * noise)) / len(target))

    if temperature is not None:
        return loss(temperature), temperature
    middle = float(np.log(scale))
    found = minimize_scalar(
        lambda x: loss(float(np.exp(x))),
        bounds=(middle - SPAN, middle + SPAN),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(found.fun), float(np.exp(found.x))


def _target(given: Array) -> Array:
    """Labels, none more certain than Platt's (n + 1) / (n + 2): separable pairs would have temperature 0."""
    limit = (len(given) + 1) / (len(given) + 2)
    return np.clip(given, 1 - limit, limit)


def _typical(margins: Margins) -> float:
    """Median size of a margin that is not 0; 0 when all are."""
    size = np.abs(margins.mean)
    size = size[size > 0]
    return float(np.median(size)) if len(size) else 0.0
