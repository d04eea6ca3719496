import copy

import pytest
import torch

from diffalign.backbones import open_backbone
from diffalign.backbones.fused_lora import _AdaptedLinear
from diffalign.config import LoRAConfig, ModelConfig


def opened(folder, precision="fp32", **lora):
    lora = LoRAConfig(rank=4, **{"alpha": 6.0, "targets": "attention+conv", **lora})
    config = ModelConfig(path=str(folder), precision=precision, lora=lora)
    return open_backbone(config, device="cpu", resolution=64)


def trained(backbone):
    """The backbone with adapters that do something."""
    with torch.no_grad():
        for name, parameter in backbone.trainable_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return backbone


def output(backbone):
    """Output of a fixed input."""
    torch.manual_seed(3)
    x, t = torch.randn(2, *backbone.latent_shape), torch.tensor([10, 900])
    return backbone.predict(x, t, backbone.unconditional(2))


def gradients(backbone):
    """Gradients by parameter name."""
    output(backbone).square().sum().backward()
    return {name: p.grad for name, p in backbone.trainable_parameters()}


def is_fused(layer):
    return "forward" in vars(layer)


def test_numbers_worked_by_hand():
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weight, bias = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([10.0, 20.0])
    a = torch.tensor([[1.0, -1.0]], requires_grad=True)
    b = torch.tensor([[2.0], [5.0]], requires_grad=True)
    out = _AdaptedLinear.apply(x, weight, bias, a, b, 0.5)
    # W x + b = (21, 22); A x = -1; 0.5 * -1 * (2, 5) = (-1, -2.5)
    assert out.tolist() == [[20.0, 19.5]]
    out.backward(torch.tensor([[1.0, 2.0]]))
    # 0.5 B^T g = 6: on x through A (6, -6), besides W^T g = (3, 6); on A times x; on B 0.5 * -1 * g
    assert x.grad.tolist() == [[9.0, 0.0]]
    assert a.grad.tolist() == [[6.0, 12.0]]
    assert b.grad.tolist() == [[-0.5], [-1.0]]


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_agree_with_differences_and_so_do_theirs(with_bias, check):
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (2, 5), (4, 2)))
    weight = torch.randn(4, 5, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64) if with_bias else None
    assert check(lambda x, a, b: _AdaptedLinear.apply(x, weight, bias, a, b, 0.7), (x, a, b))


def test_a_network_gives_what_peft_gives(tiny_sd):
    torch.manual_seed(1)
    fused = trained(opened(tiny_sd))
    plain = opened(tiny_sd)
    plain.load_trainable_state(fused.trainable_state())
    assert sum(map(is_fused, plain._lora_layers)) > 20
    for layer in plain._lora_layers:
        vars(layer).pop("forward", None)
    torch.testing.assert_close(output(fused), output(plain), rtol=1e-5, atol=1e-5)
    expected = gradients(plain)
    for name, gradient in gradients(fused).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_new_adapters_give_the_bits_of_the_base(tiny_sd, precision):
    backbone = opened(tiny_sd, precision)
    with backbone.reference():
        base = output(backbone)
    assert torch.equal(output(backbone), base)


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"dora": True}])
def test_dropout_and_dora_stay_with_peft(tiny_sd, options):
    assert not any(map(is_fused, opened(tiny_sd, **options)._lora_layers))


def test_merged_adapters_are_not_added_twice(tiny_sd):
    backbone = trained(opened(tiny_sd))
    expected = output(backbone)
    for layer in backbone._lora_layers:
        layer.merge()
    torch.testing.assert_close(output(backbone), expected, rtol=1e-3, atol=1e-4)


def test_a_copy_of_a_network_uses_its_own_weights(tiny_sd):
    backbone = trained(opened(tiny_sd))
    expected = output(backbone)
    twin = copy.deepcopy(backbone.core)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(output(backbone), expected)
    inputs = torch.ones(1, *backbone.latent_shape), torch.tensor([1]), torch.ones(1, 16, 16)
    assert (twin(*inputs, return_dict=False)[0] == 0).all()
