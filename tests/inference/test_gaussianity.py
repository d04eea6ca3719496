import math

import pytest
import torch
from scipy import stats

from diffalign.inference.gaussianity import gaussianity


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    """d = 4: |z|^2 = 4, and two rows (1, -1), (-1, 1): all neighbours are opposite."""
    look = gaussianity(torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]))
    assert look.norm == pytest.approx(2.0)
    assert look.expected == pytest.approx(math.sqrt(2) * math.gamma(2.5) / math.gamma(2.0))
    assert look.quantile == pytest.approx(stats.chi2.cdf(4, 4))
    assert (look.mean, look.std, look.skewness) == (0.0, 1.0, 0.0)
    assert look.kurtosis == pytest.approx(-2.0)
    assert look.neighbours == pytest.approx(-1.0)
    assert look.low_power == pytest.approx(0.0, abs=1e-12)


def test_p_values_of_noise_are_uniform():
    """Of 200 noises about a tenth of each test's p-values are below 0.1; Kolmogorov and Smirnov see no difference."""
    looks = [gaussianity(noise(4, 16, 16, seed=seed)) for seed in range(200)]
    for name in looks[0].p:
        assert stats.kstest([look.p[name] for look in looks], "uniform").pvalue > 1e-3, name
    assert sum(not look.usual for look in looks) <= 2


@pytest.mark.parametrize(
    ("change", "test"),
    [
        (lambda z: 1.1 * z, "norm"),
        (lambda z: z + 0.15, "mean"),
        (lambda z: (z + z.roll(1, -1)) / math.sqrt(2), "neighbours"),
        (lambda z: z + 0.7 * torch.linspace(-1, 1, 16), "low_power"),
        (lambda z: z.abs() - math.sqrt(2 / math.pi), "skewness"),
        (lambda z: z * torch.where(torch.arange(16) < 4, 1.8, 0.5), "kurtosis"),
    ],
)
def test_each_fault_is_seen_by_its_test(change, test):
    look = gaussianity(change(noise(4, 16, 16)))
    assert look.p[test] < 1e-4
    assert not look.usual


def test_correlated_noise_of_the_right_norm_is_seen():
    """What the norm alone, ReNO's regulariser, does not see."""
    rough = noise(4, 16, 16)
    smooth = rough + 0.5 * (rough.roll(1, 1) + rough.roll(1, 2))
    look = gaussianity(smooth / smooth.norm() * 32)
    assert look.p["norm"] > 0.9
    assert look.p["low_power"] < 1e-6
    assert not look.usual


def test_no_noise_at_all_is_unusual():
    assert not gaussianity(torch.zeros(4, 8, 8)).usual
