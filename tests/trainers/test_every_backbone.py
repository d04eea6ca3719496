"""Every method on pairs with every family of backbones: objectives are pure, backbones are adapters."""

from __future__ import annotations

from pathlib import Path

import preference_world as world
import pytest
import torch
from pair_world import whole_draw
from tiny import build_few_step

FAMILIES = ("tiny_sd", "tiny_sd_v", "tiny_lcm_sdxl", "tiny_sd3", "tiny_flux", "tiny_z_image")
METHODS = {
    "dpo": {},
    "dspo": {},
    "inpo": {"inversion_steps": 2},
    "kto": {},
    "mapo": {},
    "rpo": {},
    "sft": {},
    "simpo": {},
}
START_AT_LOG_2 = ("dpo", "inpo")


@pytest.fixture(scope="session")
def tiny_lcm_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random SDXL-type consistency model; read only."""
    return build_few_step(tmp_path_factory.mktemp("models") / "tiny-lcm-sdxl", "lcm-25", 8, True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where encoded scenes are kept for all tests of this file."""
    return tmp_path_factory.mktemp("pairs")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_trains_the_adapters(method, family, folder, request):
    trainer = world.make(method, request.getfixturevalue(family), folder / family, **METHODS[method])
    losses, metrics = trainer.loss(trainer.fetch(whole_draw()))
    if method in START_AT_LOG_2:
        torch.testing.assert_close(losses, torch.full((4,), 0.6931472), rtol=0, atol=1e-6)
        assert (metrics["margin"] == 0).all()
    before = world.weights(trainer)
    world.train(trainer, 0, 2)
    after = world.weights(trainer)
    assert all(value.isfinite().all() for value in after.values())
    # In the first step only the second factors move, since they start at zero.
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(moved) >= len(after) / 2
    deltas = trainer.deltas(trainer.fetch(whole_draw()), whole_draw())
    assert any(delta.abs().max() > 0 for delta in deltas)
