"""Tiny random CLIPs in the real classes and file formats, and the check of gradients against finite differences."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 16
SIDE = 32
ARCHITECTURE = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of the tiny open_clip architecture, large enough for embeddings to differ clearly."""
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    state = CLIP(**ARCHITECTURE).state_dict()
    return {
        name: 2 * value if "weight" in name and value.ndim > 1 else value for name, value in state.items()
    }


def write_open_clip(folder: Path, state: dict[str, Tensor] | None = None) -> Path:
    """An open_clip `local-dir:` folder; without a state it holds no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": ARCHITECTURE, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    if state is not None:
        save_file(state, folder / "open_clip_model.safetensors")
    return folder


def write_transformers(folder: Path, state: dict[str, Tensor], tokenizer: bool = True) -> Path:
    """The same network as a transformers folder."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    text |= {"eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407, "hidden_act": "gelu"}
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    vision |= {"image_size": SIDE, "patch_size": 8, "hidden_act": "gelu"}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    model.load_state_dict(_renamed(state), strict=True)
    model.save_pretrained(folder)
    if tokenizer:
        write_processor(folder)
    return folder


def write_processor(folder: Path) -> Path:
    """CLIP's own vocabulary and the preprocessing of the tiny network, in transformers' files."""
    import open_clip.tokenizer
    from transformers import CLIPImageProcessor, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    lines = gzip.decompress(Path(open_clip.tokenizer.default_bpe()).read_bytes()).decode("utf-8").split("\n")
    vocabulary = open_clip.tokenizer.SimpleTokenizer().encoder
    rename = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {rename.get(token, token): index for token, index in vocabulary.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *lines[1 : 49152 - 256 - 2 + 1]]), encoding="utf-8"
    )
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)
    return folder


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and shapes to those of transformers."""
    renamed = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_projection.weight": state["text_projection"].T.contiguous(),
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
    }
    for kind in ("weight", "bias"):
        renamed[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        renamed[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        renamed[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
    for index in range(2):
        for ours, theirs in (("", "text_model"), ("visual.", "vision_model")):
            block, layer = f"{ours}transformer.resblocks.{index}.", f"{theirs}.encoder.layers.{index}."
            renamed |= _renamed_block(state, block, layer)
    return renamed


def _renamed_block(state: dict[str, Tensor], block: str, layer: str) -> dict[str, Tensor]:
    renamed = {}
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names["attn.out_proj"] = "self_attn.out_proj"
    for kind in ("weight", "bias"):
        for ours, theirs in names.items():
            renamed[f"{layer}{theirs}.{kind}"] = state[f"{block}{ours}.{kind}"]
        for name, part in zip("qkv", state[f"{block}attn.in_proj_{kind}"].chunk(3), strict=True):
            renamed[f"{layer}self_attn.{name}_proj.{kind}"] = part.clone()
    return renamed


def assert_gradient(function: Callable[[Tensor], Tensor], images: Tensor, tolerance: float = 1e-5) -> None:
    """The derivative of `function(images).sum()` along random directions equals the central difference.

    Args:
        images: float64. tolerance: relative to the largest possible derivative along a unit direction.
    """
    assert images.dtype == torch.float64
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
    assert gradient.norm() > 0
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(images.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    step = 1e-5
    for direction in [*directions, gradient.clone()]:
        direction /= direction.norm()
        with torch.no_grad():
            ahead, behind = function(images + step * direction), function(images - step * direction)
        measured = (ahead - behind).sum() / (2 * step)
        assert abs(measured - (gradient * direction).sum()) < tolerance * gradient.norm()
