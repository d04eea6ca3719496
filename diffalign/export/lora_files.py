"""LoRA files from adapter weights: diffusers, kohya (ComfyUI, A1111) and PEFT, each with its alpha.

Adapter weights are named `MODULE.lora_A.weight` (down), `MODULE.lora_B.weight` (up) and, for DoRA,
`MODULE.lora_magnitude_vector`, with MODULE the layer's name in the diffusers network. A loader that finds no
alpha takes alpha = rank, so every format here carries it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save, save_file
from torch import Tensor

from diffalign.config import LoRAConfig
from diffalign.errors import DiffalignError

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"

KOHYA_NAMES = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
"""Layers that the diffusers loader knows by their original name only; ComfyUI knows both names."""


def write_diffusers(pipeline_class: Any, state: Mapping[str, Tensor], lora: LoRAConfig, folder: Path) -> Path:
    """Write the file that `pipeline.load_lora_weights(folder)` reads, with rank and alpha in its header.

    Args:
        pipeline_class: the diffusers pipeline class whose network was trained.
    """
    pipeline_class.save_lora_weights(
        folder,
        unet_lora_layers=_on_cpu(state),
        unet_lora_adapter_metadata={**_peft_arguments(lora), "target_modules": adapted_layers(state)},
    )
    return folder / DIFFUSERS_FILE


def write_kohya(state: Mapping[str, Tensor], lora: LoRAConfig, path: Path, metadata: dict[str, str]) -> Path:
    """Write one file in kohya naming, with the hash of its tensors added to the ModelSpec header.

    Raises:
        DiffalignError: DoRA, which diffusers drops from kohya files without an error.
    """
    tensors = kohya_state(state, lora)
    content = save(tensors)
    start = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(content[start:]).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {**metadata, "modelspec.hash_sha256": f"0x{digest}"})
    return path


def kohya_state(state: Mapping[str, Tensor], lora: LoRAConfig) -> dict[str, Tensor]:
    """Adapter weights as `lora_unet_MODULE.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    MODULE is the diffusers name with underscores: ComfyUI, A1111 and the diffusers loader all read it, for
    SD 1.x, 2.x and SDXL alike, while the original names (`input_blocks_...`) exist for SDXL files only.

    Raises:
        DiffalignError: DoRA, or a weight that has no kohya name.
    """
    if lora.dora:
        raise DiffalignError(
            "DoRA adapters cannot be exported as kohya: loaders drop the magnitudes; use diffusers or merged."
        )
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
    """Write the folder that `PeftModel.from_pretrained(unet, folder)` reads."""
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
