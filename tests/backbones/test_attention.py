import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign.backbones import open_backbone
from diffalign.backbones.attention import (
    FlashAttnProcessor,
    FlashJointAttnProcessor,
    Float32AttnProcessor,
    Float32JointAttnProcessor,
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sd3_gets_processors_of_its_own(tiny_sd3, precision):
    core = open_backbone(ModelConfig(path=str(tiny_sd3), precision=precision), device="cpu").core
    modules = attention_modules(core)
    assert len(modules) == 3  # two blocks, the first with a second attention over the picture alone
    expected = Float32JointAttnProcessor if precision == "bf16" else JointAttnProcessor2_0
    assert {type(module.processor) for module in modules.values()} == {expected}


def test_sd3_in_bf16_on_a_cpu_attends_in_float32(tiny_sd3):
    backbone = open_backbone(ModelConfig(path=str(tiny_sd3), precision="bf16"), device="cpu")
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([0.5]), backbone.unconditional(1)
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "attention" in str(func):
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Recorder():
        out = backbone.predict(*inputs)
    assert seen == [torch.float32] * 3
    backbone.core.set_attn_processor(JointAttnProcessor2_0())
    torch.testing.assert_close(out, backbone.predict(*inputs), rtol=0.05, atol=0.1)


def test_sd3_flash_processor_allows_no_other_kernel(tiny_sd3, monkeypatch):
    core = open_backbone(ModelConfig(path=str(tiny_sd3), tune="full"), device="cpu").core
    inputs = torch.randn(1, 4, 16, 16), torch.randn(1, 20, 48), torch.randn(1, 28), torch.tensor([500.0])
    plain = core(*inputs, return_dict=False)[0]
    allowed = []
    original = JointAttnProcessor2_0.__call__

    def recorded(self, *args, **kwargs):
        allowed.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(JointAttnProcessor2_0, "__call__", recorded)
    core.set_attn_processor(FlashJointAttnProcessor())
    torch.testing.assert_close(core(*inputs, return_dict=False)[0], plain)
    assert allowed == [(True, False)] * 3


@pytest.mark.parametrize("choice", ["xformers", "flash"])
@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_flux"])
def test_gpu_kernels_of_transformers_are_refused_on_a_cpu(request, family, choice):
    path = str(request.getfixturevalue(family))
    with pytest.raises(DiffalignError, match=f"'{choice}' needs a CUDA GPU.*use attention: sdpa"):
        open_backbone(ModelConfig(path=path, attention=choice), device="cpu")


def test_the_dispatcher_is_told_the_kernel_and_read_back(tiny_flux, monkeypatch):
    core = open_backbone(ModelConfig(path=str(tiny_flux)), device="cpu").core
    modules = attention_modules(core)
    assert len(modules) == 2
    assert {module.processor._attention_backend.value for module in modules.values()} == {"native"}
    monkeypatch.setattr("diffalign.backbones.attention._check_possible", lambda *args: None)
    try:
        assert set_attention(core, "flash", CPU, torch.bfloat16) == "flash"
        assert {m.processor._attention_backend.value for m in modules.values()} == {"_native_flash"}
        monkeypatch.setattr(core, "set_attention_backend", lambda name: None)
        with pytest.raises(DiffalignError, match="'sdpa', but 2 of 2 attention modules did not take it"):
            set_attention(core, "sdpa", CPU, torch.bfloat16)
    finally:
        monkeypatch.undo()
        set_attention(core, "sdpa", CPU, torch.float32)


def test_a_kernel_that_the_dispatcher_lacks_is_one_message(tiny_flux, monkeypatch):
    core = open_backbone(ModelConfig(path=str(tiny_flux)), device="cpu").core
    monkeypatch.setattr("diffalign.backbones.attention._check_possible", lambda *args: None)

    def refused(name):
        raise RuntimeError(f"backend {name} is too old\ndetails")

    monkeypatch.setattr(core, "set_attention_backend", refused)
    with pytest.raises(
        DiffalignError, match="cannot be used: backend xformers is too old; use attention: auto"
    ):
        set_attention(core, "xformers", CPU, torch.float32)


def test_a_network_without_a_choice_keeps_its_attention_and_says_so():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert set_attention(network, "auto", CPU, torch.float32) == "own"
    with pytest.raises(DiffalignError, match="'sdpa', but Sequential has no attention that can be chosen"):
        set_attention(network, "sdpa", CPU, torch.float32)
