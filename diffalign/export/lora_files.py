"""LoRA files of other tools: diffusers, ComfyUI (kohya naming for UNets, diffusers naming for transformers), peft."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save, save_file
from torch import Tensor

from diffalign.backbones import Backbone
from diffalign.config import LoRAConfig
from diffalign.errors import DiffalignError

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"

KOHYA_NAMES = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
"""Layers that the diffusers loader knows by their original name only; ComfyUI knows both names."""

COMFY_TRANSFORMERS = ("StableDiffusion3Pipeline", "FluxPipeline", "ZImagePipeline")
"""Pipelines for whose networks ComfyUI reads every adapted layer by its diffusers name after `transformer.`."""


def write_diffusers(
    family: type[Backbone], state: Mapping[str, Tensor], lora: LoRAConfig, folder: Path
) -> Path:
    """Write the file that `pipeline.load_lora_weights(folder)` reads, with rank and alpha in its header.

    Args:
        family: adapter of the pipeline whose network was trained.
    """
    name = family.network_name
    layers = {
        f"{name}_lora_layers": _on_cpu(state),
        f"{name}_lora_adapter_metadata": {**_peft_arguments(lora), "target_modules": adapted_layers(state)},
    }
    family.pipeline_class.save_lora_weights(folder, **layers)
    return folder / DIFFUSERS_FILE


def write_single_file(
    family: type[Backbone],
    state: Mapping[str, Tensor],
    lora: LoRAConfig,
    path: Path,
    metadata: dict[str, str],
) -> Path:
    """Write one file for ComfyUI and the diffusers loader, with the hash of its tensors added to the ModelSpec header.

    Raises:
        DiffalignError: DoRA, which diffusers drops from such files without an error; or no loader of other tools is
            known for the family.
    """
    tensors = single_file_state(family, state, lora)
    content = save(tensors)
    start = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(content[start:]).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {**metadata, "modelspec.hash_sha256": f"0x{digest}"})
    return path


def single_file_state(
    family: type[Backbone], state: Mapping[str, Tensor], lora: LoRAConfig
) -> dict[str, Tensor]:
    """Adapter weights as the tools outside diffusers name them, for a family.

    Raises:
        DiffalignError: as `write_single_file`.
    """
    if lora.dora:
        raise DiffalignError(
            "DoRA adapters cannot be exported as kohya: loaders drop the magnitudes; use diffusers or merged."
        )
    if family.network_name == "unet":
        return kohya_state(state, lora)
    name = family.pipeline_class.__name__
    if name not in COMFY_TRANSFORMERS:
        raise DiffalignError(
            f"no file format outside diffusers is known for LoRAs of a {name}; use diffusers, peft or merged."
        )
    return transformer_state(state, lora)


def transformer_state(state: Mapping[str, Tensor], lora: LoRAConfig) -> dict[str, Tensor]:
    """Adapter weights as `transformer.MODULE.lora_A.weight`, `.lora_B.weight`, with alpha / rank multiplied into B.

    ComfyUI maps these names to its own layers and scales by an entry `MODULE.alpha` if there is one, else by 1; the
    diffusers loader of SD3 refuses files with such an entry. Without one, and with the factor in B, both read the same.
    """
    scale = lora.alpha / lora.rank
    return {
        f"transformer.{name}": value * scale if name.endswith(".lora_B.weight") else value
        for name, value in _on_cpu(state).items()
    }


def kohya_state(state: Mapping[str, Tensor], lora: LoRAConfig) -> dict[str, Tensor]:
    """Adapter weights as `lora_unet_MODULE.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    MODULE is the diffusers name with underscores: ComfyUI, A1111 and the diffusers loader all read it, for
    SD 1.x, 2.x and SDXL alike, while the original names (`input_blocks_...`) exist for SDXL files only.

    Raises:
        DiffalignError: a weight that has no kohya name.
    """
    parts = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    tensors: dict[str, Tensor] = {}
    for name, value in _on_cpu(state).items():
        layer, _, part = name.rpartition(".lora_")
        if f"lora_{part}" not in parts:
            raise DiffalignError(
                f"adapter weight {name!r} has no name in kohya format; use diffusers or merged."
            )
        prefix = "lora_unet_" + KOHYA_NAMES.get(layer, layer).replace(".", "_")
        tensors[f"{prefix}.{parts[f'lora_{part}']}"] = value
        tensors[f"{prefix}.alpha"] = torch.tensor(float(lora.alpha))
    return tensors


def write_peft(state: Mapping[str, Tensor], lora: LoRAConfig, folder: Path, base: str) -> list[Path]:
    """Write the folder that `PeftModel.from_pretrained(network, folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        **_peft_arguments(lora),
        target_modules=adapted_layers(state),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{name}": value for name, value in _on_cpu(state).items()}
    save_file(tensors, folder / PEFT_FILE, {"format": "pt"})
    return [folder / PEFT_FILE, folder / "adapter_config.json"]


def adapted_layers(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the layers that have adapters."""
    return sorted({name.rpartition(".lora_")[0] for name in state})


def _peft_arguments(lora: LoRAConfig) -> dict[str, Any]:
    """What a loader needs, and no more: peft refuses fields that its version does not know."""
    return {"r": lora.rank, "lora_alpha": lora.alpha, "use_dora": lora.dora, "bias": "none"}


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}
