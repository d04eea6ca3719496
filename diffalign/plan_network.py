"""What a network is made of and what a pass through it takes, without loading any weights.

The network is built from its configuration on PyTorch's meta device, where tensors have shapes but no data,
and one forward pass is traced: autograd tells which activations it would keep, every matrix product its cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffalign.config import RunConfig

if TYPE_CHECKING:
    from diffalign.backbones import Backbone

# What diffusers recomputes as one piece under gradient checkpointing.
CHECKPOINTED = (
    "ResnetBlock2D",
    "BasicTransformerBlock",
    "JointTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
    "ZImageTransformerBlock",
)


@dataclass(frozen=True)
class NetworkSize:
    """Numbers of weights, and bytes and multiply-adds of a forward pass over one pair (two pictures).

    `quantized` is the number of weights that are held in four bits; `told_guidance` says whether a guided prediction
    takes one pass, since the network is told its scale; `frozen`, whether nothing goes back through the network.
    """

    total: int
    trained: int
    activations: int
    forward_flops: int
    quantized: int = 0
    told_guidance: bool = False
    frozen: bool = False


def network_size(config: RunConfig, dtype: torch.dtype) -> NetworkSize | None:
    """Size of the network as it will be tuned; None when its configuration is not on this machine.

    Raises:
        DiffalignError: the model path does not exist.
    """
    from diffalign.backbones.base import Backbone
    from diffalign.backbones.guidance import is_told_guidance

    family = _family(config)
    network = None if family is None else meta_network(config)
    if family is None or network is None:
        return None
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    inputs = network_inputs(config, network, dtype)
    with counting(network) as kept, FlopCounterMode(display=False) as counter:
        network(**inputs)
    activations = kept.peak() if config.model.gradient_checkpointing else kept.total()
    flops = counter.get_total_flops() + kept.attention_flops
    told = is_told_guidance(network) or family.guided is not Backbone.guided
    return NetworkSize(total, trained, activations, flops, _quantized(network, config), told)


def network_inputs(config: RunConfig, network: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What a network of `meta_network` is given for a pair, as shapes; it is brought to the number format."""
    from diffalign.backbones.loading import quiet

    family = _family(config)
    assert family is not None, "there is a network"
    with quiet():
        network.to(dtype)
    side = config.data.resolution // _latent_factor(config)
    return family.meta_inputs(network.config, side, dtype)


def _quantized(network: nn.Module, config: RunConfig) -> int:
    """Number of frozen weights of linear layers, if they are to be held in four bits."""
    if config.model.quantize == "none":
        return 0
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return sum(module.weight.numel() for module in linear if not module.weight.requires_grad)


def _family(config: RunConfig) -> type[Backbone] | None:
    """The adapter of the model; None when its index is not on this machine."""
    from diffusers import DiffusionPipeline

    from diffalign.backbones import model_family, resolve_model
    from diffalign.backbones.loading import quiet

    path = resolve_model(config.model.path)
    try:
        with quiet():
            index = DiffusionPipeline.load_config(path, revision=config.model.revision, local_files_only=True)
    except OSError:
        return None
    return model_family(str(index.get("_class_name")), config.model.path)


def meta_network(config: RunConfig) -> Any:
    """The network as it will be tuned, without data; None when its configuration is not on this machine."""
    from diffalign.backbones.loading import quiet, resolve_model
    from diffalign.backbones.lora import add_lora

    family = _family(config)
    if family is None:
        return None
    path = resolve_model(config.model.path)
    try:
        with quiet():
            values = family.network_class.load_config(
                path, subfolder=family.network_name, revision=config.model.revision, local_files_only=True
            )
    except OSError:
        return None
    with torch.device("meta"):
        network = family.network_class.from_config(values)
        if config.model.tune == "lora":
            add_lora(network, config.model.lora, config.seed, autocast=False)
    return network.train()


def _latent_factor(config: RunConfig) -> int:
    """Pixels per latent; 8 when the VAE's configuration is not on this machine."""
    from diffusers import AutoencoderKL

    from diffalign.backbones.loading import quiet, resolve_model

    try:
        with quiet():
            values = AutoencoderKL.load_config(
                resolve_model(config.model.path), subfolder="vae", local_files_only=True
            )
    except OSError:
        return 8
    return int(2 ** (len(values["block_out_channels"]) - 1))


class Kept:
    """Bytes that autograd keeps for the backward pass, inside and outside of the recomputed blocks."""

    def __init__(self, parameters: set[int]):
        self.parameters = parameters
        self.attention_flops = 0
        self._seen: set[int] = set()
        self._tensors: list[Tensor] = []
        self._block: int | None = None
        self._outside = 0
        self._blocks: list[int] = []
        self._inputs = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves, each storage once and no parameter."""
        key = tensor.untyped_storage()._cdata
        if key not in self._seen and key not in self.parameters:
            self._seen.add(key)
            # Held, so that no later storage gets the same address.
            self._tensors.append(tensor)
            if self._block is None:
                self._outside += tensor.untyped_storage().nbytes()
            else:
                self._blocks[self._block] += tensor.untyped_storage().nbytes()
        return tensor

    def enter(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A block that gradient checkpointing recomputes begins."""
        self._blocks.append(0)
        self._block = len(self._blocks) - 1
        # Blocks of transformers are called by name, and change pictures and text; others change the first argument.
        streams = inputs[:1] or (named.get("hidden_states"), named.get("encoder_hidden_states"))
        self._inputs += sum(stream.nbytes for stream in streams if stream is not None)

    def leave(self, *_: Any) -> None:
        """It ends."""
        self._block = None

    def total(self) -> int:
        """Everything kept."""
        return self._outside + sum(self._blocks)

    def peak(self) -> int:
        """With recomputation: the blocks' inputs, and what the largest block keeps while it is recomputed."""
        return self._outside + self._inputs + max(self._blocks, default=0)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Stands for a fused attention kernel, which keeps its inputs and its output but no score matrix."""
        self.attention_flops += 4 * query.numel() * key.shape[-2]
        out: Tensor = _FusedAttention.apply(query, key, value)
        return out


class _FusedAttention(torch.autograd.Function):
    """Shapes and saved tensors of fused attention, without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


@contextmanager
def counting(network: nn.Module) -> Iterator[Kept]:
    """Count what a network's forward keeps for the backward pass, and the compute of its fused attention."""
    kept = Kept({p.untyped_storage()._cdata for p in network.parameters()})
    handles = []
    for module in network.modules():
        if type(module).__name__ in CHECKPOINTED:
            handles += [
                module.register_forward_pre_hook(kept.enter, with_kwargs=True),
                module.register_forward_hook(kept.leave),
            ]
    fused = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = kept.attention
    try:
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
            yield kept
    finally:
        torch.nn.functional.scaled_dot_product_attention = fused
        for handle in handles:
            handle.remove()
