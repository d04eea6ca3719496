"""Does an optimised noise still look like noise? Tests that a white Gaussian passes and structured noise does not.

The norm alone says little: a noise of the right norm can be smooth, correlated or heavy in one place, and few-step
models were never shown such. All statistics have known laws for d independent standard normals, at least for large d.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, stats
from torch import Tensor

SUSPICIOUS = 1e-3
"""A noise is called unusual when its smallest p-value times the number of tests is below this."""
LOW = 4
"""The lowest 1 / LOW of the frequencies along each side count as low."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussianity:
    """Statistics of one noise, and two-sided p-values under independent standard normals.

    Fields:
        norm: Euclidean. expected: the mean norm of noise. quantile: of the norm under the chi law with d degrees of
            freedom. mean, std, skewness, kurtosis: of the elements (kurtosis of a Gaussian is 0).
        neighbours: correlation of elements next to each other. low_power: mean power of the low spatial frequencies,
            1 in noise. p: p-values by test. usual: whether all of them together are unsuspicious.
    """

    norm: float
    expected: float
    quantile: float
    mean: float
    std: float
    skewness: float
    kurtosis: float
    neighbours: float
    low_power: float
    p: dict[str, float]
    usual: bool


def gaussianity(noise: Tensor) -> Gaussianity:
    """Statistics of a noise `[..., h, w]` of d elements; leading dimensions are channels and steps."""
    planes = noise.detach().double().cpu().numpy().reshape(-1, *noise.shape[-2:])
    z, d = planes.ravel(), planes.size
    square = float((z**2).sum())
    spread = z.std() if z.std() > 0 else 1.0
    skewness = float((((z - z.mean()) / spread) ** 3).mean())
    kurtosis = float((((z - z.mean()) / spread) ** 4).mean() - 3)
    neighbours, pairs = _neighbours(planes)
    low, count = _low_power(planes)
    p = {
        "norm": _two_sided(stats.chi2.cdf(square, d), stats.chi2.sf(square, d)),
        "mean": _normal(z.mean() * np.sqrt(d)),
        "skewness": _normal(skewness * np.sqrt(d / 6)),
        "kurtosis": _normal(kurtosis * np.sqrt(d / 24)),
        "neighbours": _normal(neighbours * np.sqrt(pairs)),
        "low_power": _two_sided(stats.chi2.cdf(low * count, count), stats.chi2.sf(low * count, count)),
    }
    return Gaussianity(
        norm=float(np.sqrt(square)),
        expected=float(stats.chi.mean(d)),
        quantile=float(stats.chi2.cdf(square, d)),
        mean=float(z.mean()),
        std=float(z.std()),
        skewness=skewness,
        kurtosis=kurtosis,
        neighbours=neighbours,
        low_power=low,
        p=p,
        usual=min(p.values()) * len(p) >= SUSPICIOUS,
    )


def _neighbours(planes: Array) -> tuple[float, int]:
    """Mean product of horizontal and vertical neighbours of unit variance, and how many pairs there are."""
    products = [(planes[:, :, 1:] * planes[:, :, :-1]).ravel(), (planes[:, 1:] * planes[:, :-1]).ravel()]
    both = np.concatenate(products)
    power = float((planes**2).mean())
    return (float(both.mean() / power) if power else 0.0), len(both)


def _low_power(planes: Array) -> tuple[float, int]:
    """Mean power of low frequencies, and their number: an orthonormal cosine transform of noise is noise again."""
    spectrum = fft.dctn(planes, axes=(1, 2), norm="ortho")
    height, width = (max(1, side // LOW) for side in planes.shape[1:])
    low = spectrum[:, :height, :width]
    return float((low**2).mean()), low.size


def _normal(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def _two_sided(below: float, above: float) -> float:
    return float(min(1.0, 2 * min(below, above)))
