"""CLIP from open_clip and transformers: the same network gives the same numbers; bad sources say what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import SIDE, WIDTH, random_state, write_open_clip, write_transformers

from diffalign.errors import DiffalignError
from diffalign.rewards.clip_model import ClipModel, empty_open_clip, load_clip, open_clip_from_file
from diffalign.rewards.weights import load_exactly, read_state_dict, resolve_file

PROMPTS = ["a red circle left of a blue star", "Two  GREEN squares, really!"]


@pytest.fixture(scope="module")
def clips(clip_folders: dict[str, Path]) -> dict[str, ClipModel]:
    """Loaded by either library; read only."""
    return {kind: load_clip(str(folder)) for kind, folder in clip_folders.items()}


@pytest.fixture(scope="module")
def clip(clips: dict[str, ClipModel]) -> ClipModel:
    return clips["open_clip"]


def _images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 40, 48, generator=torch.Generator().manual_seed(3))


def test_both_libraries_give_the_same_embeddings(clips: dict[str, ClipModel]) -> None:
    clip, other = clips["open_clip"], clips["transformers"]
    images = _images(3)
    assert torch.allclose(clip.embed_images(images), other.embed_images(images), atol=1e-5)
    assert torch.allclose(clip.embed_texts(PROMPTS), other.embed_texts(PROMPTS), atol=1e-5)
    assert torch.equal(clip.logit_scale, other.logit_scale)
    assert clip.width == other.width == WIDTH
    assert clip.preprocess.size == other.preprocess.size == SIDE


def test_embeddings_are_unit_float32_and_tell_inputs_apart(clip: ClipModel) -> None:
    pictures, texts = clip.embed_images(_images()), clip.embed_texts(PROMPTS)
    for vectors in (pictures, texts):
        assert vectors.dtype == torch.float32
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(2))
        assert (vectors[0] - vectors[1]).abs().max() > 1e-2
    assert torch.allclose(clip.similarity(_images(), PROMPTS), (pictures * texts).sum(-1))


def test_everything_is_frozen_and_in_evaluation_mode(clip: ClipModel) -> None:
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    assert not any(module.training for module in clip.modules())


def test_half_precision_networks_give_float32_vectors(clip_folders: dict[str, Path]) -> None:
    full, half = (
        load_clip(str(clip_folders["open_clip"])),
        load_clip(str(clip_folders["open_clip"])).to(torch.bfloat16),
    )
    vectors = half.embed_images(_images())
    assert vectors.dtype == torch.float32
    assert torch.allclose(vectors, full.embed_images(_images()), atol=0.05)
    assert half.embed_texts(PROMPTS).dtype == torch.float32


def _count_encoded(clip: ClipModel) -> list[str]:
    """Every prompt that goes through the text tower from now on."""
    seen: list[str] = []
    tokenize = clip.tokenize

    def counting(prompts: list[str]) -> Any:
        seen.extend(prompts)
        return tokenize(prompts)

    clip.tokenize = counting
    return seen


def test_each_distinct_prompt_is_encoded_once(clip_folders: dict[str, Path]) -> None:
    clip = load_clip(str(clip_folders["open_clip"]))
    seen = _count_encoded(clip)
    first = clip.embed_texts(["a", "b", "a"])
    assert torch.equal(first[0], first[2])
    assert torch.equal(clip.embed_texts(["b", "a"]), first[[1, 0]])
    assert seen == ["a", "b"]


def test_cache_is_bounded_and_keeps_what_was_used_last(clip_folders: dict[str, Path]) -> None:
    clip = load_clip(str(clip_folders["open_clip"]))
    clip.cache_size = 2
    seen = _count_encoded(clip)
    clip.embed_texts(["a", "b"])
    clip.embed_texts(["a", "c"])  # drops b
    clip.embed_texts(["a"])
    assert seen == ["a", "b", "c"]
    assert clip.embed_texts(["a", "b", "c", "d"]).shape == (4, WIDTH)  # more than fit
    assert seen == ["a", "b", "c", "b", "d"]


def test_cache_is_dropped_with_other_weights_or_precision(clip_folders: dict[str, Path]) -> None:
    clip = load_clip(str(clip_folders["open_clip"]))
    before = clip.embed_texts(["a"])
    wrapper = torch.nn.ModuleDict({"clip": clip})
    state = wrapper.state_dict()
    state["clip.network.text_projection"] = -state["clip.network.text_projection"]
    wrapper.load_state_dict(state)
    assert torch.allclose(clip.embed_texts(["a"]), -before, atol=1e-6)
    assert clip.double().embed_texts(["a"]).dtype == torch.float64


def test_prompts_first_seen_in_inference_mode_serve_gradients_later(clip_folders: dict[str, Path]) -> None:
    clip = load_clip(str(clip_folders["open_clip"]))
    with torch.inference_mode():
        clip.similarity(_images(), PROMPTS)
    images = _images().requires_grad_()
    clip.similarity(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0


def test_trainable_networks_get_gradients_and_never_a_stale_prompt(clip_folders: dict[str, Path]) -> None:
    clip = load_clip(str(clip_folders["open_clip"]))
    before = clip.embed_texts(["a"])
    clip.requires_grad_(True)
    clip.embed_texts(["a"]).sum().backward()
    assert clip.network.text_projection.grad.abs().max() > 0
    with torch.no_grad():
        clip.network.text_projection.neg_()
    assert torch.allclose(clip.embed_texts(["a"]), -before, atol=1e-6)
    clip.requires_grad_(False)
    assert torch.allclose(clip.embed_texts(["a"]), -before, atol=1e-6)


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_long_prompts_are_cut_at_77_tokens(clips: dict[str, ClipModel], kind: str) -> None:
    clip = clips[kind]
    full, longer = "star " * 75, "star " * 75 + "circle"
    vectors = clip.embed_texts([full, longer, "star " * 74 + "circle"])
    assert torch.allclose(vectors[0], vectors[1], atol=1e-6)
    assert (vectors[0] - vectors[2]).abs().max() > 1e-4


def test_weights_from_a_file(clip_folders: dict[str, Path], clip: ClipModel, tmp_path: Path) -> None:
    """As published: under `state_dict`, in half precision, with the prefix of data-parallel training."""
    state = {f"module.{name}": value.half() for name, value in random_state().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "weights.pt")
    loaded = open_clip_from_file(f"local-dir:{clip_folders['open_clip']}", tmp_path / "weights.pt")
    assert next(loaded.parameters()).dtype == torch.float32
    assert torch.allclose(loaded.embed_images(_images()), clip.embed_images(_images()), atol=5e-3)
    assert not any(parameter.is_meta for parameter in loaded.parameters())


# ---- the official sizes -----------------------------------------------------------------------------------------

BLOCK = {
    "ln_1.weight": "d", "ln_1.bias": "d", "attn.in_proj_weight": "3d d", "attn.in_proj_bias": "3d",
    "attn.out_proj.weight": "d d", "attn.out_proj.bias": "d", "ln_2.weight": "d", "ln_2.bias": "d",
    "mlp.c_fc.weight": "4d d", "mlp.c_fc.bias": "4d", "mlp.c_proj.weight": "d 4d", "mlp.c_proj.bias": "d",
}  # fmt: skip


def _shape(symbols: str, width: int) -> tuple[int, ...]:
    return tuple(int(symbol.replace("d", "") or 1) * width for symbol in symbols.split())


def _official_vit_h_14() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "token_embedding.weight": (49408, 1024),
        "ln_final.weight": (1024,),
        "ln_final.bias": (1024,),
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
    }
    for norm in ("visual.ln_pre", "visual.ln_post"):
        shapes |= {f"{norm}.weight": (1280,), f"{norm}.bias": (1280,)}
    for prefix, layers, width in (("", 24, 1024), ("visual.", 32, 1280)):
        for index in range(layers):
            block = f"{prefix}transformer.resblocks.{index}."
            shapes |= {block + name: _shape(symbols, width) for name, symbols in BLOCK.items()}
    return shapes


def test_vit_h_14_has_the_official_names_and_shapes() -> None:
    """The network of HPSv2 and PickScore, on the meta device: 986 million parameters, no memory."""
    network = empty_open_clip("ViT-H-14")
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert own == _official_vit_h_14()
    assert sum(parameter.numel() for parameter in network.parameters()) == 986_109_441
    assert all(parameter.is_meta for parameter in network.parameters())


def test_vit_h_14_takes_a_state_dict_of_the_official_names() -> None:
    network = empty_open_clip("ViT-H-14")
    state = {name: torch.empty(shape, device="meta") for name, shape in _official_vit_h_14().items()}
    load_exactly(network, state, "HPS_v2.1_compressed.pt")
    del state["visual.proj"]
    state["head.weight"] = torch.empty(1, device="meta")
    state["ln_final.bias"] = torch.empty(7, device="meta")
    message = (
        r"1 missing \(first: visual.proj\); 1 unknown \(first: head.weight\); "
        r"1 of another shape \(first: ln_final.bias is \(7,\), expected \(1024,\)\)"
    )
    with pytest.raises(DiffalignError, match=message):
        load_exactly(network, state, "x.pt")


# ---- bad sources ------------------------------------------------------------------------------------------------


def test_unknown_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="Did you mean 'ViT-H-14'"):
        load_clip("ViT-H14")
    with pytest.raises(DiffalignError, match="holds no CLIP"):
        load_clip(str(tmp_path))
    with pytest.raises(DiffalignError, match="expected an existing folder"):
        load_clip("./no/such/folder")
    with pytest.raises(DiffalignError, match="transformers cannot load a CLIP from 'models/none'"):
        load_clip("models/none")


def test_architectures_need_weights_that_exist() -> None:
    with pytest.raises(DiffalignError, match=r"'ViT-H-14' needs weights.*laion2b_s32b_b79k"):
        load_clip("ViT-H-14")
    with pytest.raises(
        DiffalignError, match=r"'laion2b_s32b_b79' is neither.*Did you mean 'laion2b_s32b_b79k'"
    ):
        load_clip("ViT-H-14@laion2b_s32b_b79")


def test_a_folder_without_weights_is_never_a_random_network(
    clip_folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(DiffalignError, match="open_clip cannot load"):
        load_clip(str(write_open_clip(tmp_path / "empty")))
    folder = Path(shutil.copytree(clip_folders["transformers"], tmp_path / "partial"))
    state = read_state_dict(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DiffalignError, match=r"lack 1 tensors \(first: visual_projection.weight\)"):
        load_clip(str(folder))


def test_tokenizer_from_elsewhere(clip_folders: dict[str, Path], clip: ClipModel, tmp_path: Path) -> None:
    bare = write_transformers(tmp_path / "bare", random_state(), tokenizer=False)
    loaded = load_clip(str(bare), processor=str(clip_folders["transformers"]))
    assert torch.allclose(loaded.embed_texts(PROMPTS), clip.embed_texts(PROMPTS), atol=1e-5)


@pytest.mark.parametrize(("tag", "expected"), [("openai", True), ("laion2b_s32b_b82k", False)])
def test_the_gelu_is_that_of_the_weights(tag: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip only warns when ViT-L-14 is used with OpenAI's weights, and the embeddings come out wrong."""
    asked: dict[str, Any] = {}

    def create_model(name: str, pretrained: str, **options: Any) -> None:
        asked.update(options)
        raise RuntimeError("not downloaded in tests")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(DiffalignError, match="not downloaded in tests"):
        load_clip(f"ViT-L-14@{tag}")
    assert asked["force_quick_gelu"] is expected


class Payload:
    """Anything that is not a tensor."""


def test_only_tensors_are_unpickled(tmp_path: Path) -> None:
    torch.save({"state_dict": Payload()}, tmp_path / "pickled.pt")
    with pytest.raises(DiffalignError, match="pickled models are refused"):
        read_state_dict(tmp_path / "pickled.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DiffalignError, match="holds a list; expected tensors by name"):
        read_state_dict(tmp_path / "list.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(DiffalignError, match="cannot read weights"):
        read_state_dict(tmp_path / "broken.safetensors")
    with pytest.raises(DiffalignError, match="no file of weights"):
        read_state_dict(tmp_path / "absent.pt")


def test_a_path_is_a_file_a_folder_or_a_hub_id(tmp_path: Path) -> None:
    file = tmp_path / "official.pt"
    file.write_bytes(b"")
    assert resolve_file(str(file), "org/name", "official.pt") == file
    assert resolve_file(str(tmp_path), "org/name", "official.pt") == file
    with pytest.raises(DiffalignError, match=r"has no 'other.pt'"):
        resolve_file(str(tmp_path), "org/name", "other.pt")
    with pytest.raises(DiffalignError, match=r"cannot get 'other.pt' of 'org/name'"):
        resolve_file(None, "org/name", "other.pt")
