"""A base in four bits: what is asked of diffusers, what is refused, and how adapters and fingerprints treat it.

No test here needs bitsandbytes or a GPU; with bitsandbytes installed, its layers are used on the CPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from diffalign.backbones import open_backbone
from diffalign.backbones.fused_lora import fuse_linear_layers
from diffalign.backbones.quantized import check_quantized, compute_in, quantization_arguments
from diffalign.config import LoRAConfig, ModelConfig
from diffalign.errors import DiffalignError
from diffalign.reference import frozen_fingerprint

GPU = torch.device("cuda")


@pytest.fixture
def installed(monkeypatch):
    """As if bitsandbytes were installed; diffusers asks for its version only."""
    known = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.45.0" if name == "bitsandbytes" else known(name)
    )


def nf4(**options):
    return ModelConfig(path="some/model", quantize="nf4", **options)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_linear_layers_are_asked_for_in_nf4_and_computed_in_the_precision_of_the_run(installed, compute):
    arguments = quantization_arguments(nf4(), compute)
    asked = arguments.pop("quantization_config").to_dict()
    assert arguments == {}
    assert asked["load_in_4bit"]
    assert not asked["load_in_8bit"]
    assert asked["bnb_4bit_quant_type"] == "nf4"
    assert asked["bnb_4bit_use_double_quant"]
    assert asked["bnb_4bit_compute_dtype"] == str(compute).removeprefix("torch.")
    assert quantization_arguments(ModelConfig(path="some/model"), compute) == {}


def test_the_network_is_loaded_so_and_nothing_else_is(tiny_sd, installed, monkeypatch):
    calls = []
    load = UNet2DConditionModel.from_pretrained.__func__

    def seen(cls, *args, **kwargs):
        calls.append(kwargs.pop("quantization_config", None))
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", classmethod(seen))
    monkeypatch.setattr("diffalign.backbones.check_quantized", lambda *args: None)
    config = nf4(precision="bf16").model_copy(update={"path": str(tiny_sd)})
    open_backbone(config, device="cpu", resolution=64, parts="all")
    assert [call.bnb_4bit_compute_dtype for call in calls] == [torch.bfloat16]


def test_what_is_missing_is_said_before_anything_is_loaded(monkeypatch):
    with pytest.raises(DiffalignError, match="needs a CUDA GPU, but the device is cpu; set"):
        open_backbone(nf4(), device="cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    check_quantized(nf4(), GPU, frozen_copy=False)
    with pytest.raises(DiffalignError, match=r"trainer\.reference=adapters_off"):
        check_quantized(nf4(), GPU, frozen_copy=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(DiffalignError, match=r"pip install 'diffalign\[quantize\]'"):
        check_quantized(nf4(), GPU, frozen_copy=False)
    check_quantized(ModelConfig(path="some/model"), torch.device("cpu"), frozen_copy=True)


@pytest.mark.parametrize("tune", ["full", "head"])
def test_only_adapters_train_on_four_bits(tune):
    with pytest.raises(ValueError, match="quantize should be none unless tune is lora"):
        nf4(tune=tune)


class FourBit(nn.Linear):
    """A linear layer as bitsandbytes makes it: two weights in a byte, their scales beside them."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        packed = torch.arange(inputs * outputs // 2, dtype=torch.uint8)[:, None]
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", torch.tensor([1.0, 2.0]))


def quantised_model() -> SimpleNamespace:
    torch.manual_seed(0)
    # 9 bytes: not a multiple of what a float takes.
    core = nn.Sequential(FourBit(6, 3), nn.Linear(3, 2)).requires_grad_(False)
    core.add_module("adapter", nn.Linear(2, 2))
    return SimpleNamespace(core=core, config=SimpleNamespace(tune="lora"))


@pytest.mark.parametrize("changed", ["0.weight", "0.scale", "0.bias", "1.weight", "adapter.weight"])
def test_the_fingerprint_sees_packed_weights_and_their_scales_but_no_adapter(changed):
    model, other = quantised_model(), quantised_model()
    assert frozen_fingerprint(model) == frozen_fingerprint(other)
    other.core.state_dict()[changed].view(-1)[1] += 1
    assert (frozen_fingerprint(model) == frozen_fingerprint(other)) == (changed == "adapter.weight")


def test_layers_in_four_bits_answer_in_the_precision_of_the_run():
    network = nn.Sequential(FourBit(6, 3), nn.Linear(6, 3))
    network[0].forward = network[1].forward = lambda x: x
    compute_in(network, torch.bfloat16)
    assert [layer(torch.ones(2, 6)).dtype for layer in network] == [torch.bfloat16, torch.float32]


def test_layers_in_four_bits_are_not_fused():
    layers = [
        LoraLinear(layer, "default", config=LoraConfig(r=2), r=2, lora_alpha=2)
        for layer in (FourBit(6, 4), nn.Linear(6, 4))
    ]
    fuse_linear_layers(layers)
    assert ["forward" in vars(layer) for layer in layers] == [False, True]


def test_adapters_train_on_layers_of_bitsandbytes(tiny_sd, monkeypatch):
    """The network that diffusers would make on a GPU, made on the CPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    replace = pytest.importorskip("diffusers.quantizers.bitsandbytes.utils").replace_with_bnb_linear
    load = UNet2DConditionModel.from_pretrained.__func__

    def quantised(cls, *args, quantization_config, **kwargs):
        plain = load(cls, *args, **kwargs)
        weights = {key: value.clone() for key, value in plain.state_dict().items()}
        network = replace(plain, [], quantization_config=quantization_config)
        network.is_loaded_in_4bit = True
        for name, layer in network.named_modules():
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                layer.weight = bitsandbytes.nn.Params4bit(
                    weights[f"{name}.weight"], requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                bias = weights.get(f"{name}.bias")
                layer.bias = None if bias is None else nn.Parameter(bias)
        return network.to("cpu")

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", classmethod(quantised))
    monkeypatch.setattr("diffalign.backbones.check_quantized", lambda *args: None)
    config = ModelConfig(path=str(tiny_sd), quantize="nf4", precision="bf16", lora=LoRAConfig(rank=4))
    backbone = open_backbone(config, device="cpu", resolution=64)
    packed = [p for p in backbone.core.parameters() if p.dtype == torch.uint8]
    assert packed
    before = frozen_fingerprint(backbone)
    inputs = torch.randn(2, *backbone.latent_shape), torch.tensor([10, 900]), backbone.unconditional(2)
    reference = backbone.predict(*inputs, reference=True)
    assert torch.equal(backbone.predict(*inputs), reference)
    backbone.predict(*inputs).square().mean().backward()
    moved = [(p, p.grad) for _, p in backbone.trainable_parameters() if p.grad is not None and p.grad.any()]
    assert moved
    with torch.no_grad():
        for parameter, gradient in moved:
            parameter -= gradient / gradient.norm()
    assert all(p.dtype == torch.float32 for _, p in backbone.trainable_parameters())
    assert (backbone.predict(*inputs) - reference).abs().max() > 1e-3
    assert torch.equal(backbone.predict(*inputs, reference=True), reference)
    assert frozen_fingerprint(backbone) == before
