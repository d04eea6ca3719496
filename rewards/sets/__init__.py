"""Metrics and rewards of whole sets: Frechet distance, KID, CMMD, precision and recall, Vendi, diversity.

Metrics take features `[N, D]`, which `diffalign.rewards.encoders` makes of pictures. The `...Exchange` classes answer
what a metric would be after replacing elements, for greedy construction of sets.
"""

from __future__ import annotations

from diffalign.rewards.sets.diversity import diversity_per_prompt, pairwise_distance
from diffalign.rewards.sets.frechet import (
    FrechetExchange,
    FrechetStats,
    Gaussian,
    frechet_distance,
    frechet_infinity,
    gaussian_distance,
    gaussian_of,
)
from diffalign.rewards.sets.kernels import (
    MMDExchange,
    cmmd,
    gaussian_kernel,
    kid,
    kid_subsets,
    mmd2,
    polynomial_kernel,
)
from diffalign.rewards.sets.precision_recall import NeighbourMetrics, neighbour_metrics
from diffalign.rewards.sets.vendi import VendiExchange, vendi_from_kernel, vendi_score

__all__ = [
    "FrechetExchange",
    "FrechetStats",
    "Gaussian",
    "MMDExchange",
    "NeighbourMetrics",
    "VendiExchange",
    "cmmd",
    "diversity_per_prompt",
    "frechet_distance",
    "frechet_infinity",
    "gaussian_distance",
    "gaussian_kernel",
    "gaussian_of",
    "kid",
    "kid_subsets",
    "mmd2",
    "neighbour_metrics",
    "pairwise_distance",
    "polynomial_kernel",
    "vendi_from_kernel",
    "vendi_score",
]
