"""What holds alike for FLUX and Z-Image: latents, the reference at the start, gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from flow_checks import gradients, noisy_inputs, opened, perturb


@pytest.fixture(params=["tiny_flux", "tiny_flux_schnell", "tiny_z_image"])
def model(request):
    """Folder of each of the three."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["tiny_flux", "tiny_z_image"])
def family(request):
    """Folder of one model of each family."""
    return request.getfixturevalue(request.param)


def test_latents_are_shifted_and_scaled_posteriors(family):
    backbone = opened(family)
    vae = AutoencoderKL.from_pretrained(family, subfolder="vae")
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = backbone.encode(images)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.0609) * 1.5305)
    torch.testing.assert_close(std, posterior.std * 1.5305)
    theirs = (vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(backbone.decode(mean), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "opening",
    [{}, {"frozen_copy": True}, {"tune": "full", "frozen_copy": True}],
    ids=["lora", "copy", "full"],
)
def test_policy_equals_reference_at_the_start_and_leaves_it_alone(model, precision, opening):
    backbone = opened(model, precision=precision, **opening)
    inputs = noisy_inputs(backbone)
    before = backbone.predict(*inputs, reference=True)
    policy = backbone.predict(*inputs)
    assert torch.equal(policy, before)
    assert policy.dtype == before.dtype == torch.float32
    assert policy.requires_grad
    perturb(backbone)
    assert torch.equal(backbone.predict(*inputs, reference=True), before)
    assert (backbone.predict(*inputs) - before).abs().max() > 1e-2


@pytest.mark.parametrize("tune", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_gradient_checkpointing_changes_no_gradient(family, tune):
    found = []
    for checkpointing in (False, True):
        backbone = opened(family, tune=tune, gradient_checkpointing=checkpointing)
        perturb(backbone)
        found.append(gradients(backbone))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == len(backbone.trainable_parameters())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)
