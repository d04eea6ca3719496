"""Reading a network up to a layer: the states of a whole forward pass, nothing run after it, gradients, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffalign.backbones import open_backbone
from diffalign.backbones.early import default_layer, early_states, read_only, states_of
from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError
from diffalign.sampling.collection import tell

FAMILIES = {"tiny_sd": "mid_block", "tiny_sdxl": "mid_block", "tiny_sd3": "transformer_blocks.0"}
FAMILIES |= {"tiny_flux": "transformer_blocks.0"}


def opened(path: Any, **options: Any) -> Any:
    config = ModelConfig(path=str(path), precision="fp32", **options)
    return open_backbone(config, device="cpu", resolution=64)


def inputs(backbone: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    torch.manual_seed(0)
    t = backbone.process.times(torch.tensor([0.3, 0.8]))
    told = tell(backbone, ["a red circle", "two stars"], 1.0).conditioning
    return torch.randn(2, *backbone.latent_shape), t, told


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any) -> Any:
    return opened(request.getfixturevalue(request.param)), FAMILIES[request.param]


def test_states_are_those_of_a_whole_pass_and_nothing_runs_after_the_layer(family: Any) -> None:
    backbone, layer = family
    assert default_layer(backbone.core) == layer
    whole: list[Any] = []
    handle = backbone.core.get_submodule(layer).register_forward_hook(lambda m, i, o: whole.append(o))
    last = [module for module in backbone.core.children() if any(True for _ in module.parameters())][-1]
    ran: list[int] = []
    end = last.register_forward_hook(lambda m, i, o: ran.append(1))
    x, t, told = inputs(backbone)
    with backbone.reference(), torch.no_grad():
        backbone.predict(x, t, told)
    assert (len(whole), len(ran)) == (1, 1)
    found = early_states(backbone, x, t, told, layer)
    handle.remove()
    assert ran == [1]
    assert torch.equal(found, states_of(whole[0]))
    end.remove()
    # 16 latents a side: halved by a UNet with one step down, patches of 2 in transformers; 8 of SD.
    assert found.shape[:2] == (2, {8: 16, 16: 64}[backbone.latent_shape[1]])
    with backbone.inference():
        again = backbone.predict(x, t, told)
    assert again.shape == x.shape


def test_gradients_reach_the_latents_and_no_weight(family: Any) -> None:
    backbone, layer = family
    x, t, told = inputs(backbone)
    x.requires_grad_()
    early_states(backbone, x, t, told, layer).square().mean().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) > 0
    assert all(p.grad is None for p in backbone.core.parameters())


def test_the_untuned_network_is_read_whatever_the_adapters_learned(tiny_sdxl: Any) -> None:
    backbone = opened(tiny_sdxl)
    x, t, told = inputs(backbone)
    before = early_states(backbone, x, t, told, "mid_block")
    with torch.no_grad():
        for _, weight in backbone.trainable_parameters():
            weight += 0.1
    assert torch.equal(early_states(backbone, x, t, told, "mid_block"), before)


def test_recomputation_is_left_alone(tiny_sd3: Any) -> None:
    """A block that is recomputed in the backward pass would be cut off there once more."""
    backbone = opened(tiny_sd3)
    x, t, told = inputs(backbone)
    expected = early_states(backbone, x, t, told, "transformer_blocks.0")
    backbone.core.enable_gradient_checkpointing()
    x.requires_grad_()
    found = early_states(backbone, x, t, told, "transformer_blocks.0")
    found.sum().backward()
    torch.testing.assert_close(found.detach(), expected)
    assert backbone.core.is_gradient_checkpointing


def test_states_of_what_layers_give() -> None:
    maps, text, picture = torch.arange(8.0).reshape(1, 2, 2, 2), torch.zeros(1, 3, 2), torch.ones(1, 4, 2)
    assert states_of(maps).tolist() == [[[0, 4], [1, 5], [2, 6], [3, 7]]]
    assert torch.equal(states_of((maps, (maps, maps))), states_of(maps))
    assert torch.equal(states_of((text, picture)), picture)
    assert torch.equal(states_of((None, picture)), picture)
    assert states_of(picture.bfloat16()).dtype == torch.float32


def test_layers_that_cannot_be_read_are_named(tiny_sdxl: Any, tiny_z_image: Any) -> None:
    backbone = opened(tiny_sdxl)
    x, t, told = inputs(backbone)
    with pytest.raises(DiffalignError, match=r"no layer 'midblock'. Did you mean 'mid_block'"):
        early_states(backbone, x, t, told, "midblock")
    backbone.core.idle = torch.nn.Identity()
    with pytest.raises(DiffalignError, match="never came to its layer 'idle'"):
        early_states(backbone, x, t, told, "idle")
    with pytest.raises(DiffalignError, match="ZImageTransformer2DModel"):
        default_layer(opened(tiny_z_image).core)


def test_a_model_that_is_only_read_has_the_smallest_adapters(tiny_sdxl: Any) -> None:
    config = ModelConfig(path=str(tiny_sdxl), tune="head")
    backbone = open_backbone(read_only(config), device="cpu", resolution=64)
    assert isinstance(backbone.core, UNet2DConditionModel)
    assert {min(p.shape) for _, p in backbone.trainable_parameters()} == {1}
