"""The attention kernel of a network, verified to be in use.

Attention runs in a processor object per attention module. There are two kinds. Processors of UNets and of SD3 are
bound to one kernel: `set_attention_backend` of diffusers does not reach them, so a choice is made by setting other
processors. Those of FLUX and later transformers ask diffusers' dispatcher for the kernel named in them.
Either way the choice is checked by reading it back.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from diffalign.backbones.loading import quiet
from diffalign.errors import DiffalignError


class FlashAttnProcessor(AttnProcessor2_0):
    """PyTorch's attention restricted to its flash kernel, also where gradient checkpointing recomputes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Attention of one module; arguments as `AttnProcessor2_0`."""
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().__call__(*args, **kwargs)


class FlashJointAttnProcessor(JointAttnProcessor2_0):
    """As `FlashAttnProcessor`, for SD3's attention over pictures and text together."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Attention of one module; arguments and result as `JointAttnProcessor2_0`."""
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().__call__(*args, **kwargs)


class Float32AttnProcessor(AttnProcessor2_0):
    """PyTorch's attention in float32 between projections in another format.

    For bf16 on CPUs, where the backward pass of the kernel takes three to eight times as long as in float32.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Attention of one module; arguments as `AttnProcessor2_0`."""
        with _Float32Attention():
            return super().__call__(*args, **kwargs)


class Float32JointAttnProcessor(JointAttnProcessor2_0):
    """As `Float32AttnProcessor`, for SD3's attention over pictures and text together."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Attention of one module; arguments and result as `JointAttnProcessor2_0`."""
        with _Float32Attention():
            return super().__call__(*args, **kwargs)


class _Float32Attention(TorchFunctionMode):
    """Casts what goes into `scaled_dot_product_attention`; the processor offers no other place to do so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args
        mask = kwargs.pop("attn_mask", None)
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        with torch.autocast(query.device.type, enabled=False):
            out = func(query.float(), key.float(), value.float(), attn_mask=mask, **kwargs)
        return out.to(query.dtype)


PROCESSORS: dict[type[nn.Module], dict[str, type]] = {
    UNet2DConditionModel: {
        "sdpa": AttnProcessor2_0,
        "xformers": XFormersAttnProcessor,
        "flash": FlashAttnProcessor,
        "sdpa in float32": Float32AttnProcessor,
    },
    SD3Transformer2DModel: {
        "sdpa": JointAttnProcessor2_0,
        "xformers": XFormersJointAttnProcessor,
        "flash": FlashJointAttnProcessor,
        "sdpa in float32": Float32JointAttnProcessor,
    },
}
"""Processors that are bound to a kernel, by network."""

BACKENDS = {"sdpa": "native", "xformers": "xformers", "flash": "_native_flash"}
"""Kernels by their names in diffusers' dispatcher; its `flash` is another package, this one is PyTorch's."""


def set_attention(network: nn.Module, choice: str, device: torch.device, dtype: torch.dtype) -> str:
    """Put the chosen attention into every attention module, read it back and return its name.

    Args:
        network: a diffusers UNet or transformer. choice: auto, sdpa, xformers or flash; auto is sdpa, and `own` for
            a network whose attention cannot be chosen.
        device, dtype: where and in which number format the network will run.

    Raises:
        DiffalignError: the choice cannot run here, or a module did not take it.
    """
    name = "sdpa" if choice == "auto" else choice
    modules = attention_modules(network)
    bound = next((kinds for kind, kinds in PROCESSORS.items() if isinstance(network, kind)), None)
    dispatched = all(hasattr(module.processor, "_attention_backend") for module in modules.values())
    if bound is None and not (dispatched and modules):
        return _own_attention(network, choice)
    _check_possible(name, modules, device, dtype)
    if bound is None:
        wrong = _set_backend(network, name, modules)
    else:
        in_float32 = name == "sdpa" and device.type == "cpu" and dtype == torch.bfloat16
        wrong = _set_processors(network, bound["sdpa in float32" if in_float32 else name], modules)
    if wrong:
        raise DiffalignError(
            f"attention is {name!r}, but {len(wrong)} of {len(modules)} attention modules did not take it, "
            f"first {wrong[0]}; use attention: auto."
        )
    return name


def attention_modules(network: nn.Module) -> dict[str, Any]:
    """The attention modules of a network by name."""
    kinds = (Attention, AttentionModuleMixin)
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def _own_attention(network: nn.Module, choice: str) -> str:
    if choice != "auto":
        raise DiffalignError(
            f"attention is {choice!r}, but {type(network).__name__} has no attention that can be chosen; "
            "use attention: auto, which keeps its own."
        )
    return "own"


def _set_processors(network: Any, processor: type, modules: dict[str, Any]) -> list[str]:
    """Set processors of a kind and return the modules that have others."""
    network.set_attn_processor(processor())
    return [key for key, module in modules.items() if type(module.processor) is not processor]


def _set_backend(network: Any, name: str, modules: dict[str, Any]) -> list[str]:
    """Name a kernel to the dispatcher and return the modules whose processors name another."""
    try:
        with quiet():
            network.set_attention_backend(BACKENDS[name])
    except (RuntimeError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DiffalignError(f"attention {name!r} cannot be used: {reason}; use attention: auto.") from error
    backends = {key: module.processor._attention_backend for key, module in modules.items()}
    return [key for key, backend in backends.items() if getattr(backend, "value", None) != BACKENDS[name]]


def _check_possible(name: str, modules: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    if name == "sdpa":
        return
    instead = "use attention: sdpa (runs everywhere) or auto"
    if device.type != "cuda":
        raise DiffalignError(f"attention {name!r} needs a CUDA GPU, but the device is {device}; {instead}.")
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise DiffalignError(
            f"attention 'xformers' is not installed; pip install 'diffalign[xformers]', or {instead}."
        )
    if name == "flash" and dtype == torch.float32:
        raise DiffalignError(
            f"attention 'flash' needs bf16 or fp16, but precision is fp32; set precision, or {instead}."
        )
    for head_dim in sorted({module.inner_dim // module.heads for module in modules.values()}):
        _try_kernel(name, head_dim, device, dtype, instead)


def _try_kernel(name: str, head_dim: int, device: torch.device, dtype: torch.dtype, instead: str) -> None:
    """Run the kernel once, since heads too wide or an old GPU show only then."""
    query = torch.zeros(1, 2, 64, head_dim, device=device, dtype=dtype)
    try:
        if name == "xformers":
            import xformers.ops

            xformers.ops.memory_efficient_attention(query, query, query)
        else:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                scaled_dot_product_attention(query, query, query)
    except (RuntimeError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DiffalignError(
            f"attention {name!r} cannot run with heads of {head_dim} channels in {dtype} on this GPU "
            f"({reason}); {instead}."
        ) from error
