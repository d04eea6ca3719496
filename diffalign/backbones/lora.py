"""Low-rank adapters on a network (Hu et al. 2021) through peft: adding, switching off, reading, writing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from diffalign.backbones.fused_lora import fuse_linear_layers
from diffalign.config import LoRAConfig
from diffalign.errors import DiffalignError, did_you_mean
from diffalign.randomness import derive_seed

ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    # The text's side of transformers that attend to pictures and text together.
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
CONVOLUTIONS = (
    *("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    # Transformers have feed-forward layers only: of the text (SD3, FLUX), of FLUX's single blocks, and of Z-Image.
    *("ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)


def target_modules(network: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Full names of the layers that get adapters.

    Args:
        targets: `attention`, `attention+conv` (also resnet convolutions, projections, feed-forward layers),
            `all-linear`, or a list of module-name endings. Presets stay inside the blocks: the `proj_out` that ends a
            transformer is in none but `all-linear`.

    Raises:
        DiffalignError: an ending matches no linear or convolution layer.
    """
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if targets == "all-linear":
        return [name for name in layers if isinstance(network.get_submodule(name), nn.Linear)]
    presets = {"attention": ATTENTION, "attention+conv": ATTENTION + CONVOLUTIONS}
    if isinstance(targets, str):
        return [name for name in layers if "." in name and _ends_with(name, presets[targets])]
    _check_endings(layers, targets)
    return [name for name in layers if _ends_with(name, targets)]


def add_lora(network: nn.Module, config: LoRAConfig, seed: int, autocast: bool) -> list[LoraLayer]:
    """Freeze a network, add adapters to it in fp32 and return the adapted layers; those for the noise are off.

    The second factor starts at zero, so the adapted network equals the base exactly; the first is normal,
    drawn from the seed whatever the state of the global generator.

    Args:
        autocast: the network always runs under autocast, so that peft need not cast activations.
    """
    network.requires_grad_(False)
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=target_modules(network, config.targets),
        lora_dropout=config.dropout,
        use_dora=config.dora,
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        network.add_adapter(peft_config)  # type: ignore[operator]
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    layers: list[LoraLayer] = [module for module in network.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.cast_input_dtype_enabled = not autocast
    fuse_linear_layers(layers)
    switch_off(layers, config.changes == "noise")
    return layers


@contextmanager
def adapters_off(
    layers: Sequence[LoraLayer], anchor: Sequence[tuple[nn.Parameter, Tensor]] = ()
) -> Iterator[None]:
    """The base network inside the block, or the one with the adapter weights of `anchor` (parameter and its value)."""
    if anchor:
        with _exchanged(anchor):
            yield
        return
    with _switched(layers, True):
        yield


@contextmanager
def adapters_on(layers: Sequence[LoraLayer]) -> Iterator[None]:
    """The adapted network inside the block, where adapters are otherwise off."""
    with _switched(layers, False):
        yield


def switch_off(layers: Sequence[LoraLayer], disabled: bool) -> None:
    """Turn adapters off or on.

    Sets only the layers' flags: peft's own switch also turns off `requires_grad` of every adapter weight, which takes
    longer.
    """
    # Past torch's own __setattr__, which looks for parameters first and takes ten times as long.
    for layer in layers:
        object.__setattr__(layer, "_disable_adapters", disabled)


@contextmanager
def _switched(layers: Sequence[LoraLayer], disabled: bool) -> Iterator[None]:
    """Adapters off or on inside the block, and as before after it."""
    before = bool(layers) and layers[0].disable_adapters
    switch_off(layers, disabled)
    try:
        yield
    finally:
        switch_off(layers, before)


@contextmanager
def _exchanged(weights: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Other values of parameters inside the block; none is copied."""
    before = [parameter.data for parameter, _ in weights]
    for parameter, value in weights:
        parameter.data = value
    try:
        yield
    finally:
        for (parameter, _), data in zip(weights, before, strict=True):
            parameter.data = data


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """Adapter weights by name (`...to_q.lora_A.weight`); they share memory with the network."""
    state = get_peft_model_state_dict(network, save_embedding_layers=False)
    return {name: value.detach() for name, value in state.items()}


def load_lora_state(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy adapter weights into a network that has the same adapters.

    Raises:
        DiffalignError: names or shapes differ.
    """
    expected = lora_state(network)
    differing = sorted(expected.keys() ^ state.keys())
    differing += [
        name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape
    ]
    if differing:
        raise DiffalignError(
            f"the adapter file does not fit the model: {len(differing)} of {len(expected)} weights differ in "
            f"name or shape, first {differing[0]}; expected the same model, rank and targets as in training."
        )
    set_peft_model_state_dict(network, dict(state))


def _ends_with(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith("." + ending) for ending in endings)


def _check_endings(layers: list[str], endings: Sequence[str]) -> None:
    for ending in endings:
        if not any(_ends_with(name, [ending]) for name in layers):
            known = sorted({name.rpartition(".")[2] for name in layers} | set(ATTENTION))
            hint = did_you_mean(ending, known)
            raise DiffalignError(
                f"LoRA target {ending!r} matches no linear or convolution layer of the network.{hint}"
            )
    if not endings:
        raise DiffalignError("the list of LoRA targets is empty; name at least one module, or use a preset.")
