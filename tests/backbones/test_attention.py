import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign.backbones import open_backbone
from diffalign.backbones.attention import (
    FlashAttnProcessor,
    Float32AttnProcessor,
    attention_modules,
    set_attention,
)
from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError

CPU = torch.device("cpu")


def test_sdpa_is_in_every_attention_module(tiny_sdxl):
    backbone = open_backbone(ModelConfig(path=str(tiny_sdxl), attention="sdpa"), device="cpu")
    modules = attention_modules(backbone.core)
    assert len(modules) == 2 * (
        2 + 2 + 2 * 2
    )  # self and cross attention in down, mid and two up layers of two
    assert {type(module.processor) for module in modules.values()} == {AttnProcessor2_0}
    assert backbone.attention == "sdpa"


def test_auto_replaces_another_processor(tiny_sd):
    core = open_backbone(ModelConfig(path=str(tiny_sd)), device="cpu").core
    core.set_attn_processor(AttnProcessor())
    assert set_attention(core, "auto", CPU, torch.float32) == "sdpa"
    assert all(type(module.processor) is AttnProcessor2_0 for module in attention_modules(core).values())


@pytest.mark.parametrize("choice", ["xformers", "flash"])
def test_gpu_kernels_are_refused_on_a_cpu(tiny_sd, choice):
    with pytest.raises(DiffalignError, match=f"'{choice}' needs a CUDA GPU.*use attention: sdpa"):
        open_backbone(ModelConfig(path=str(tiny_sd), attention=choice), device="cpu")


def test_a_module_that_keeps_its_processor_is_noticed(tiny_sd, monkeypatch):
    core = open_backbone(ModelConfig(path=str(tiny_sd)), device="cpu").core
    core.set_attn_processor(AttnProcessor())
    monkeypatch.setattr(core, "set_attn_processor", lambda processor: None)
    with pytest.raises(DiffalignError, match="8 of 8 attention modules did not take it"):
        set_attention(core, "sdpa", CPU, torch.float32)


def test_flash_needs_half_precision(tiny_sd):
    core = open_backbone(ModelConfig(path=str(tiny_sd)), device="cpu").core
    with pytest.raises(DiffalignError, match="needs bf16 or fp16, but precision is fp32"):
        set_attention(core, "flash", torch.device("cuda"), torch.float32)


def test_xformers_that_is_not_installed_names_the_extra(tiny_sd, monkeypatch):
    core = open_backbone(ModelConfig(path=str(tiny_sd)), device="cpu").core
    monkeypatch.setattr("diffalign.backbones.attention.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DiffalignError, match=r"diffalign\[xformers\]"):
        set_attention(core, "xformers", torch.device("cuda"), torch.bfloat16)


def test_flash_processor_allows_no_other_kernel(tiny_sd, monkeypatch):
    core = open_backbone(ModelConfig(path=str(tiny_sd), tune="full"), device="cpu").core
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 16, 16)
    plain = core(*inputs, return_dict=False)[0]
    allowed = []
    original = AttnProcessor2_0.__call__

    def recorded(self, *args, **kwargs):
        cuda = torch.backends.cuda
        allowed.append((cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled()))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AttnProcessor2_0, "__call__", recorded)
    core.set_attn_processor(FlashAttnProcessor())
    torch.testing.assert_close(core(*inputs, return_dict=False)[0], plain)
    assert allowed == [(True, False, False)] * 8


def test_bf16_on_a_cpu_attends_in_float32(tiny_sdxl, monkeypatch):
    core = open_backbone(ModelConfig(path=str(tiny_sdxl), precision="bf16"), device="cpu").core
    module = next(iter(attention_modules(core).values()))
    assert type(module.processor) is Float32AttnProcessor
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "attention" in str(func):
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 8, module.query_dim, dtype=torch.bfloat16)
    with Recorder(), torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert seen == [torch.float32]
    module.set_processor(AttnProcessor2_0())
    torch.testing.assert_close(out, module(x), rtol=0.05, atol=0.02)
