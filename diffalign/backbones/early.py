"""Hidden states of a generator's network at a layer, without running the layers after it.

What rewards of noisy latents read: LPO (arXiv 2502.01051) takes a UNet up to its middle, Flow-NRG (arXiv 2501.13918)
the first blocks of a transformer. A hook on the layer ends the forward pass there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from diffalign.backbones.base import Backbone
from diffalign.conditioning import Conditioning
from diffalign.config import LoRAConfig, ModelConfig
from diffalign.errors import DiffalignError, did_you_mean
from diffalign.precision import at_least_float32

MIDDLE = "mid_block"
BLOCKS = "transformer_blocks"


class _Reached(Exception):
    """Ends a forward pass; carries what the layer gave."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def read_only(config: ModelConfig) -> ModelConfig:
    """The same model to be read: with the smallest adapters, which are off inside `Backbone.reference`."""
    return config.model_copy(update={"tune": "lora", "lora": LoRAConfig(rank=1)})


def default_layer(network: nn.Module) -> str:
    """The layer to read: the middle of a UNet, or the middle one of the blocks that SD3 and FLUX share in kind.

    Raises:
        DiffalignError: a network of another kind.
    """
    if getattr(network, MIDDLE, None) is not None:
        return MIDDLE
    blocks = getattr(network, BLOCKS, None)
    if blocks is None:
        raise DiffalignError(
            f"no layer to read is known for a {type(network).__name__}, whose blocks mix pictures, text and padding. "
            "UNets (SD, SDXL, LCM), SD3 and FLUX have one."
        )
    return f"{BLOCKS}.{(len(blocks) - 1) // 2}"


def early_states(backbone: Backbone, x_t: Tensor, t: Tensor, cond: Conditioning, layer: str) -> Tensor:
    """Hidden states `[B, N, D]` of the untuned network at a layer, with gradients in `x_t` where they are enabled.

    Args:
        x_t, t, cond: as for `Backbone.predict`. layer: name of a module of the network.

    Raises:
        DiffalignError: the network has no such layer, or never comes to it.
    """
    with backbone.reference():
        network = backbone.acting
        with _without_checkpointing(network):
            output = stopped(network, layer, lambda: backbone.predict(x_t, t, cond))
    if output is not None:
        return states_of(output)
    raise DiffalignError(
        f"the forward pass of {backbone.source.name} never came to its layer {layer!r}; name another layer, and set "
        "model.compile=false, since a compiled network runs without hooks."
    )


def stopped(network: nn.Module, layer: str, forward: Callable[[], Any]) -> Any:
    """What a layer gives in a forward pass, which ends there; None if it never came to it.

    Raises:
        DiffalignError: the network has no such layer.
    """
    handle = _module(network, layer).register_forward_hook(_stop)
    try:
        forward()
    except _Reached as reached:
        return reached.output
    finally:
        handle.remove()
    return None


def states_of(output: Any) -> Tensor:
    """Hidden states of the picture `[B, N, D]` in what a layer gives, at least float32.

    UNets give maps `[B, D, h, w]`, alone or before those for the skip connections; joint blocks of transformers the
    states of the text, then of the picture.
    """
    found = [output] if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)]
    if found[0].dim() == 4:
        return at_least_float32(found[0].flatten(2).transpose(1, 2))
    return at_least_float32(found[-1])


def _stop(module: nn.Module, inputs: Any, output: Any) -> None:
    raise _Reached(output)


def _module(network: nn.Module, layer: str) -> nn.Module:
    try:
        return network.get_submodule(layer)
    except AttributeError:
        names = [name for name, _ in network.named_modules() if name.count(".") < 2]
        raise DiffalignError(
            f"the network has no layer {layer!r}.{did_you_mean(layer, names)} UNets have down_blocks.N, mid_block and "
            "up_blocks.N, transformers transformer_blocks.N."
        ) from None


@contextmanager
def _without_checkpointing(network: Any) -> Iterator[None]:
    """Recomputation off inside the block: what is computed again later may not end in the middle."""
    active = getattr(network, "is_gradient_checkpointing", False)
    if active:
        network.disable_gradient_checkpointing()
    try:
        yield
    finally:
        if active:
            network.enable_gradient_checkpointing()
