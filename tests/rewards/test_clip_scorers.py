"""Scorers on CLIP: official formulas and files, gradients against finite differences, loading by specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import SIDE, WIDTH, assert_gradient, random_state, write_open_clip, write_transformers
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.rewards import Reward, facts_of, load_reward, place
from diffalign.rewards.aesthetic import AestheticHead, AestheticV1, AestheticV2, LinearHead
from diffalign.rewards.clip import ClipScore
from diffalign.rewards.clip_model import backbone_name, load_clip
from diffalign.rewards.hps import HpsV2, HpsV21
from diffalign.rewards.pickscore import PickScore

PROMPTS = ["a red circle", "a blue star"]


def _images(dtype: torch.dtype = torch.float32, size: tuple[int, int] = (40, 48)) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3), dtype=dtype)


def _head_state(width: int = WIDTH) -> dict[str, Tensor]:
    """A random head of v2 under its official names, with narrow layers."""
    generator = torch.Generator().manual_seed(5)
    sizes, state = [width, 12, 10, 8, 6, 1], {}
    for layer, fan_in, fan_out in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        state[f"layers.{layer}.weight"] = torch.randn(fan_out, fan_in, generator=generator) / fan_in**0.5
        state[f"layers.{layer}.bias"] = torch.randn(fan_out, generator=generator)
    return state


@pytest.fixture(scope="module")
def files(clip_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Local weights of every scorer in its published file format; read only."""
    root = tmp_path_factory.mktemp("scorers")
    v1, v2 = root / "v1.pth", root / "aesthetic-model.pth"
    torch.save({"weight": torch.randn(1, WIDTH), "bias": torch.ones(1)}, v1)
    torch.save(_head_state(), v2)
    for name in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        torch.save({"epoch": 1, "state_dict": random_state(seed=len(name))}, root / name)
    return {"v1": v1, "v2": v2, "hps": root, **clip_folders}


def _all(files: dict[str, Path]) -> dict[str, Any]:
    """One specification per scorer."""
    clip, architecture = str(files["open_clip"]), f"local-dir:{files['open_clip']}"
    return {
        "clip": {"reward": "clip", "path": clip},
        "pickscore": {"reward": "pickscore", "path": str(files["transformers"])},
        "hpsv2": {"reward": "hpsv2", "path": str(files["hps"]), "architecture": architecture},
        "hpsv2.1": {"reward": "hpsv2.1", "path": str(files["hps"]), "architecture": architecture},
        "aesthetic-v1": {"reward": "aesthetic-v1", "path": str(files["v1"]), "clip": clip},
        "aesthetic-v2": {"reward": "aesthetic-v2", "path": str(files["v2"]), "clip": clip},
    }


NAMES = ["clip", "pickscore", "hpsv2", "hpsv2.1", "aesthetic-v1", "aesthetic-v2"]


@pytest.mark.parametrize("name", NAMES)
def test_contract_and_gradients(name: str, files: dict[str, Path]) -> None:
    """Frozen, float32 scores of any media dtype, and exact gradients to random pixels."""
    reward: Any = load_reward(_all(files)[name])
    assert isinstance(reward, Reward)
    assert (reward.name, reward.kind, reward.modality, reward.differentiable) == (
        name,
        "sample",
        "image",
        True,
    )
    assert all(facts_of(reward).__dict__.values())
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.modules())
    place(reward, "cpu")
    output = reward.score(_images(), PROMPTS)
    assert output.mean.shape == (2,)
    assert output.mean.dtype == torch.float32
    assert output.std is None
    assert abs(output.mean[0] - output.mean[1]) > 1e-5
    from_half = reward.score(_images().bfloat16(), PROMPTS)
    assert from_half.mean.dtype == torch.float32
    assert torch.allclose(from_half.mean, output.mean, rtol=0.02, atol=0.02)
    with pytest.raises(DiffalignError, match=f"{name} got an empty batch"):
        reward.score(_images()[:0], [])
    _check_gradient(reward.double())


def _check_gradient(reward: Any) -> None:
    aesthetic = isinstance(reward, (AestheticV1, AestheticV2))

    def scores(images: Tensor) -> Tensor:
        result = reward(images) if aesthetic else reward(images, PROMPTS)
        return result[0] if isinstance(result, tuple) else result

    images = _images(torch.float64)
    assert scores(images).dtype == torch.float64
    assert_gradient(scores, images)
    leaf = images.clone().requires_grad_()
    reward.score(leaf, PROMPTS).mean.sum().backward()
    expected = torch.autograd.grad(scores(leaf).sum(), leaf)[0]
    assert torch.allclose(leaf.grad, expected)


def test_clip_is_the_cosine_from_a_folder_a_model_or_a_file(files: dict[str, Path], tmp_path: Path) -> None:
    folder = str(files["open_clip"])
    clip = load_clip(folder)
    cosine = (clip.embed_images(_images()) * clip.embed_texts(PROMPTS)).sum(-1)
    for reward in (ClipScore(path=folder), ClipScore(model=folder), load_reward(f"clip@{folder}")):
        assert torch.allclose(reward.score(_images(), PROMPTS).mean, cosine)


def test_facts_name_the_network_that_was_loaded(files: dict[str, Path]) -> None:
    """So that sharing a backbone with another scorer can be noticed; see `evaluation/independence.py`."""
    folder = str(files["open_clip"])
    assert facts_of(ClipScore(path=folder)).backbone == f"CLIP {folder}"
    assert facts_of(AestheticV1(str(files["v1"]), clip=folder)).backbone == f"CLIP {folder}"
    assert backbone_name("ViT-H-14", "laion2b_s32b_b79k") == PickScore.facts.backbone == HpsV2.facts.backbone
    assert backbone_name("openai/clip-vit-large-patch14") == AestheticV2.facts.backbone
    assert ClipScore.facts.backbone.startswith(AestheticV2.facts.backbone)


def test_clip_takes_a_file_of_weights_for_an_architecture(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tiny` stands for a named architecture of open_clip."""
    import json

    import open_clip
    import open_clip.factory

    config = json.loads((files["open_clip"] / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    weights = files["open_clip"] / "open_clip_model.safetensors"
    expected = ClipScore(path=str(files["open_clip"])).score(_images(), PROMPTS).mean
    for options in ({"path": str(weights)}, {"pretrained": str(weights)}):
        assert torch.allclose(ClipScore(model="tiny", **options).score(_images(), PROMPTS).mean, expected)


def test_pickscore_is_scaled_by_the_learned_temperature(files: dict[str, Path]) -> None:
    reward = load_reward(f"pickscore@{files['transformers']}")
    output = reward.score(_images(), PROMPTS)
    clip = load_clip(str(files["open_clip"]))  # the same network
    cosine = (clip.embed_images(_images()) * clip.embed_texts(PROMPTS)).sum(-1)
    assert torch.allclose(output.parts["cosine"], cosine, atol=1e-5)
    assert torch.allclose(
        output.mean, output.parts["cosine"] / 0.07, rtol=1e-4
    )  # CLIP starts at exp(logit_scale) = 1 / 0.07


def test_pickscore_uses_the_authors_tokenizer_when_a_folder_has_none(tmp_path: Path) -> None:
    bare = write_transformers(tmp_path / "bare", random_state(), tokenizer=False)
    with pytest.raises(DiffalignError, match="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        PickScore(path=str(bare))


def test_hps_versions_take_their_own_file(files: dict[str, Path]) -> None:
    architecture = f"local-dir:{files['open_clip']}"
    old, new = (
        HpsV2(str(files["hps"]), architecture=architecture),
        HpsV21(str(files["hps"]), architecture=architecture),
    )
    direct = HpsV21(str(files["hps"] / "HPS_v2.1_compressed.pt"), architecture=architecture)
    scores = [reward.score(_images(), PROMPTS).mean for reward in (old, new, direct)]
    assert torch.equal(scores[1], scores[2])
    assert (scores[0] - scores[1]).abs().max() > 1e-4


def test_hps_pads_unless_told_to_crop(files: dict[str, Path]) -> None:
    """A picture whose left and right thirds are beyond the central square: only padding sees them."""
    options = {"path": str(files["hps"]), "architecture": f"local-dir:{files['open_clip']}"}
    wide = torch.full((1, 3, SIDE, 3 * SIDE), 0.5)
    changed = wide.clone()
    changed[..., : SIDE // 2] = 1.0
    padded, cropped = HpsV2(**options), HpsV2(**options, preprocessing="center-crop")
    seen = [
        (r.score(wide, ["a"]).mean - r.score(changed, ["a"]).mean).abs().item() for r in (padded, cropped)
    ]
    assert seen[0] > 1e-4
    assert seen[1] == 0
    square = _images(size=(SIDE, SIDE))
    assert torch.equal(padded.score(square, PROMPTS).mean, cropped.score(square, PROMPTS).mean)
    with pytest.raises(DiffalignError, match="'crop'; expected one of official, center-crop"):
        HpsV2(**options, preprocessing="crop")


def test_hps_of_another_size_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    state = random_state()
    del state["visual.proj"]
    torch.save({"state_dict": state}, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(DiffalignError, match=r"do not fit CLIP: 1 missing \(first: visual.proj\)"):
        HpsV2(str(tmp_path), architecture=f"local-dir:{files['open_clip']}")


# ---- aesthetic heads --------------------------------------------------------------------------------------------


def _official_v2() -> nn.Sequential:
    """The published architecture, written out."""
    return nn.Sequential(
        nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
        nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip


def test_v2_head_takes_the_official_file_and_folds_it_exactly() -> None:
    torch.manual_seed(0)
    official = _official_v2().double().eval()
    head = AestheticHead.from_state_dict({f"layers.{k}": v for k, v in official.state_dict().items()})
    assert [type(layer) for layer in head.layers] == [type(layer) for layer in official]
    assert [layer.p for layer in head.layers if isinstance(layer, nn.Dropout)] == [0.2, 0.2, 0.1]
    embeddings = nn.functional.normalize(torch.randn(5, 768, dtype=torch.float64), dim=-1)
    folded = head.eval()(embeddings)
    assert torch.allclose(folded, official(embeddings).squeeze(-1), rtol=1e-12, atol=1e-13)
    weight, bias = head.affine(torch.float64)
    assert weight.shape == (1, 768)
    assert torch.allclose(embeddings @ weight[0] + bias, folded, rtol=1e-12, atol=1e-13)


def test_v2_head_by_hand() -> None:
    """One value per layer: ((((2 x + 1) 3 + 1) 1 + 0) 2 + 1) 1 - 4 = 12 x + 5, at x = 0.5: 11."""
    values = {0: (2.0, 1.0), 2: (3.0, 1.0), 4: (1.0, 0.0), 6: (2.0, 1.0), 7: (1.0, -4.0)}
    state = {}
    for layer, (weight, bias) in values.items():
        state[f"layers.{layer}.weight"] = torch.tensor([[weight]])
        state[f"layers.{layer}.bias"] = torch.tensor([bias])
    head = AestheticHead.from_state_dict(state).eval()
    assert head(torch.tensor([[0.5]])).item() == pytest.approx(11.0)


def test_dropout_makes_the_head_uncertain_around_its_folded_score() -> None:
    head = AestheticHead.from_state_dict(_head_state()).eval()
    embedding = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
    exact = head(embedding)
    for layer in head.layers:
        if isinstance(layer, nn.Dropout):
            layer.train()
    torch.manual_seed(0)
    draws = head(embedding.expand(20000, WIDTH))
    assert draws.std() > 0.1
    assert abs(draws.mean() - exact) < 4 * draws.std() / 20000**0.5  # dropout keeps the mean of a linear map
    assert torch.equal(head.eval()(embedding), exact)


def test_v1_head_by_hand() -> None:
    head = LinearHead.from_state_dict({"weight": torch.tensor([[2.0, -1.0]]), "bias": torch.tensor([0.5])})
    assert head(torch.tensor([[0.6, 0.8], [1.0, 0.0]])).tolist() == pytest.approx([0.9, 2.5])


def test_scores_come_from_unit_embeddings(files: dict[str, Path]) -> None:
    clip = str(files["open_clip"])
    unit = load_clip(clip).embed_images(_images())
    state = torch.load(files["v1"], weights_only=True)
    expected = unit @ state["weight"][0] + state["bias"]
    assert torch.allclose(AestheticV1(str(files["v1"]), clip=clip).score(_images(), PROMPTS).mean, expected)
    head = AestheticHead.from_state_dict(_head_state()).eval()
    assert torch.allclose(AestheticV2(str(files["v2"]), clip=clip).score(_images(), PROMPTS).mean, head(unit))


def test_v2_head_from_a_folder_or_safetensors(files: dict[str, Path], tmp_path: Path) -> None:
    clip = str(files["open_clip"])
    expected = AestheticV2(str(files["v2"]), clip=clip).score(_images(), PROMPTS).mean
    save_file(_head_state(), tmp_path / "head.safetensors")
    for path in (files["v2"].parent, tmp_path / "head.safetensors"):
        assert torch.equal(AestheticV2(str(path), clip=clip).score(_images(), PROMPTS).mean, expected)


def test_half_precision_scorers_stay_close(files: dict[str, Path]) -> None:
    spec = _all(files)["aesthetic-v2"]
    full, half = load_reward(spec), load_reward(spec)
    half.to(torch.bfloat16)  # type: ignore[attr-defined]
    expected, rounded = full.score(_images(), PROMPTS).mean, half.score(_images(), PROMPTS).mean
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, expected, atol=0.05)


def test_heads_that_do_not_fit_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    clip = str(files["open_clip"])
    with pytest.raises(DiffalignError, match=r"is no head of aesthetic-v2: 'layers.0.weight' is missing"):
        AestheticV2(str(files["v1"]), clip=clip)
    with pytest.raises(DiffalignError, match=r"2 missing \(first: weight\)"):
        AestheticV1(str(files["v2"]), clip=clip)
    torch.save(_head_state(width=24), tmp_path / "wide.pth")
    with pytest.raises(DiffalignError, match=f"the head takes embeddings of width 24, CLIP .* makes {WIDTH}"):
        AestheticV2(str(tmp_path / "wide.pth"), clip=clip)
    with pytest.raises(DiffalignError, match="variant 'h14'; expected one of l14, b32, b16"):
        AestheticV1(str(files["v1"]), variant="h14", clip=clip)


def test_weights_that_cannot_be_reached_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DiffalignError, match=r"cannot download .*sa_0_4_vit_l_14_linear.pth: offline"):
        AestheticV1()
    with pytest.raises(DiffalignError, match=r"cannot get 'HPS_v2.1_compressed.pt' of 'xswu/HPSv2'"):
        HpsV21()
    with pytest.raises(DiffalignError, match="no option 'preprocess'"):
        load_reward({"reward": "hpsv2", "preprocess": "official"})


# ---- the official network of PickScore --------------------------------------------------------------------------


def test_pickscore_has_the_official_names_and_shapes() -> None:
    """transformers' CLIPModel of ViT-H/14 on the meta device, against the names in the published file."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
    }
    vision = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
    }
    config = CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 14}, projection_dim=1024)
    with torch.device("meta"):
        network = CLIPModel(config)
    state = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert sum(value.numel() for value in network.parameters()) == 986_109_441
    official = {
        "logit_scale": (),
        "text_projection.weight": (1024, 1024),
        "visual_projection.weight": (1024, 1280),
        "text_model.embeddings.token_embedding.weight": (49408, 1024),
        "text_model.embeddings.position_embedding.weight": (77, 1024),
        "text_model.encoder.layers.23.self_attn.k_proj.weight": (1024, 1024),
        "text_model.encoder.layers.0.mlp.fc1.bias": (4096,),
        "text_model.final_layer_norm.weight": (1024,),
        "vision_model.embeddings.class_embedding": (1280,),
        "vision_model.embeddings.patch_embedding.weight": (1280, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, 1280),
        "vision_model.pre_layrnorm.weight": (1280,),
        "vision_model.encoder.layers.31.self_attn.out_proj.weight": (1280, 1280),
        "vision_model.encoder.layers.31.layer_norm2.bias": (1280,),
        "vision_model.post_layernorm.bias": (1280,),
    }
    assert {name: state.get(name) for name in official} == official


def test_an_open_clip_folder_serves_as_preference_model(tmp_path: Path) -> None:
    """A PickScore-like model trained with open_clip, such as the tiny one shipped in `samples`."""
    state = random_state()
    state["logit_scale"] = torch.tensor(3.0)
    reward = PickScore(path=str(write_open_clip(tmp_path / "pick", state)))
    output = reward.score(_images(), PROMPTS)
    assert torch.allclose(output.mean, torch.tensor(3.0).exp() * output.parts["cosine"])
