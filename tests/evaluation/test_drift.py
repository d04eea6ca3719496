"""Drift: literal numbers of the quadrature and the KL, and both models of a tiny pipeline."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from diffalign.backbones import open_backbone
from diffalign.config import ModelConfig
from diffalign.evaluation.drift import drift, make_probe, path_kl, predicted_noise, quadrature
from diffalign.evaluation.prompts import EvalPrompt
from diffalign.process import Process


def test_flow_quadrature_by_hand() -> None:
    # lambda(t) = 2 log((1 - t) / t): 12 (clipped) at 0, 0 at 1/2, -12 at 1; half the fall is 6 each.
    times, weights = quadrature(Process("flow"), 2)
    assert times.tolist() == [0.25, 0.75]
    assert weights.tolist() == pytest.approx([6.0, 6.0])
    # Four intervals: lambda(1/4) = 2 log 3.
    _, weights = quadrature(Process("flow"), 4)
    inner = math.log(3)
    assert weights.tolist() == pytest.approx([6 - inner, inner, inner, 6 - inner])


def test_discrete_weights_telescope() -> None:
    abar = torch.linspace(0.99, 0.01, 100, dtype=torch.float64)
    times, weights = quadrature(Process("epsilon", abar), 7)
    total = (math.log(0.99 / 0.01) - math.log(0.01 / 0.99)) / 2
    assert float(weights.sum()) == pytest.approx(total, rel=1e-5)
    assert times.dtype == torch.int64
    assert bool((times[1:] > times[:-1]).all())
    assert int(times[0]) >= 0
    assert int(times[-1]) <= 99


def test_path_kl_by_hand() -> None:
    # Two times, one picture of three elements: 0.5 (1 + 4 + 0) + 2 (0 + 0 + 9).
    difference = torch.tensor([[[1.0, 2.0, 0.0]], [[0.0, 0.0, 3.0]]])
    assert path_kl(difference, torch.tensor([0.5, 2.0])).tolist() == [20.5]


def test_path_kl_is_that_of_two_gaussians() -> None:
    """Data at one point m: the exact eps is (x_t - alpha m) / sigma; models of two points differ by alpha dm / sigma.

    The integral 1/2 int -lambda' alpha^2 / sigma^2 dm^2 dt = 1/2 dm^2 (snr_max - snr_min) is their KL at the end.
    """
    process, count = Process("flow"), 4000
    times, weights = quadrature(process, count)
    inside = (times > 0.2) & (times < 0.8)
    alpha, sigma = process.alpha_sigma(times)
    difference = (0.3 * alpha / sigma)[:, None, None]
    found = float(path_kl(difference[inside], weights[inside]))
    assert found == pytest.approx(0.5 * 0.09 * (16 - 1 / 16), rel=5e-3)


@pytest.fixture(scope="module")
def rows() -> list[EvalPrompt]:
    return [EvalPrompt(f"p{i}", seed=i) for i in range(3)]


def test_drift_is_zero_for_equal_weights_and_grows_with_the_adapters(
    tiny_sdxl: Path, rows: list[EvalPrompt]
) -> None:
    config = ModelConfig.model_validate({"path": str(tiny_sdxl), "lora": {"rank": 2}, "precision": "fp32"})
    backbone = open_backbone(config, device="cpu", resolution=64, parts="all")
    times, _ = quadrature(backbone.process, 3)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    probe = make_probe(backbone, images, rows, times, batch_size=2)
    with backbone.reference():
        base = predicted_noise(backbone, probe, batch_size=2)
    fresh = backbone.trainable_state()
    noise = torch.Generator().manual_seed(1)
    direction = {k: torch.randn(v.shape, generator=noise) for k, v in fresh.items()}
    found = []
    for amount in (0.0, 0.1, 0.3):
        backbone.load_trainable_state({k: amount * direction[k] for k in fresh})
        found.append(
            drift(backbone.process, probe, base, predicted_noise(backbone, probe, batch_size=2), rows)
        )
    assert found[0].kl == 0.0
    assert found[0].interval == (0.0, 0.0)
    assert 0 < found[1].kl < found[2].kl
    low, high = found[2].interval
    assert low <= found[2].kl <= high
    elements = base[0, 0].numel()
    assert found[2].per_element == pytest.approx(found[2].kl / elements)
    assert found[2].as_json()["distance"] == pytest.approx(math.sqrt(found[2].kl))
    assert found[2].rms == pytest.approx(
        float((predicted_noise(backbone, probe, batch_size=2) - base).square().mean().sqrt())
    )


def test_noise_belongs_to_the_prompt_not_to_its_batch(tiny_sdxl: Path, rows: list[EvalPrompt]) -> None:
    config = ModelConfig.model_validate({"path": str(tiny_sdxl), "precision": "fp32", "lora": {"rank": 2}})
    backbone = open_backbone(config, device="cpu", resolution=64)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    times, _ = quadrature(backbone.process, 2)
    whole = make_probe(backbone, images, rows, times)
    last = make_probe(backbone, images[2:], rows[2:], times)
    assert torch.equal(whole.noise[:, 2:], last.noise)
    assert torch.allclose(whole.latents[2:], last.latents, atol=1e-5)
    assert whole.conditioning.time_ids is not None
    assert whole.conditioning.time_ids[0].tolist() == [64, 64, 0, 0, 64, 64]
