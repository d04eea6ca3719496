"""ImageReward on tiny random weights with the official names, against a float64 computation step by step."""

import json
import math

import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.rewards import Reward, load_reward
from diffalign.rewards.image_reward import UNUSED, ImageReward, ImageRewardNetwork, network_sizes
from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "cat", "##s", ","]
SIZES = {
    "vision": {"size": 32, "patch": 16, "width": 192, "depth": 2, "heads": 3},
    "text": {
        "vocabulary": len(WORDS),
        "positions": 40,
        "width": 128,
        "depth": 2,
        "heads": 2,
        "hidden": 96,
        "image_width": 192,
    },
}
FULL = {
    "vision": {"size": 224, "patch": 16, "width": 1024, "depth": 24, "heads": 16},
    "text": {
        "vocabulary": 30524,
        "positions": 512,
        "width": 768,
        "depth": 12,
        "heads": 12,
        "hidden": 3072,
        "image_width": 1024,
    },
}


def dense(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def official_shapes(sizes):
    """Names and shapes as the official modules (timm-style ViT, `med.py`, the MLP) register them."""
    vision, text = sizes["vision"], sizes["text"]
    width, prefix = vision["width"], "blip.visual_encoder."
    shapes = {
        prefix + "cls_token": (1, 1, width),
        prefix + "pos_embed": (1, (vision["size"] // vision["patch"]) ** 2 + 1, width),
        prefix + "patch_embed.proj.weight": (width, 3, vision["patch"], vision["patch"]),
        prefix + "patch_embed.proj.bias": (width,),
    } | norm(prefix + "norm", width)
    for i in range(vision["depth"]):
        block = f"{prefix}blocks.{i}."
        shapes |= norm(block + "norm1", width) | norm(block + "norm2", width)
        shapes |= dense(block + "attn.qkv", 3 * width, width) | dense(block + "attn.proj", width, width)
        shapes |= dense(block + "mlp.fc1", 4 * width, width) | dense(block + "mlp.fc2", width, 4 * width)
    width, hidden, prefix = text["width"], text["hidden"], "blip.text_encoder."
    shapes |= {
        prefix + "embeddings.word_embeddings.weight": (text["vocabulary"], width),
        prefix + "embeddings.position_embeddings.weight": (text["positions"], width),
    } | norm(prefix + "embeddings.LayerNorm", width)
    for i in range(text["depth"]):
        layer = f"{prefix}encoder.layer.{i}."
        for kind, source in (("attention", width), ("crossattention", text["image_width"])):
            shapes |= dense(f"{layer}{kind}.self.query", width, width)
            shapes |= dense(f"{layer}{kind}.self.key", width, source)
            shapes |= dense(f"{layer}{kind}.self.value", width, source)
            shapes |= dense(f"{layer}{kind}.output.dense", width, width)
            shapes |= norm(f"{layer}{kind}.output.LayerNorm", width)
        shapes |= dense(layer + "intermediate.dense", hidden, width)
        shapes |= dense(layer + "output.dense", width, hidden) | norm(layer + "output.LayerNorm", width)
    for index, outputs, inputs in ((0, 1024, width), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        shapes |= dense(f"mlp.layers.{index}", outputs, inputs)
    return shapes


def random_weights(sizes):
    """Random weights, large enough that every part of the network matters for the score."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in official_shapes(sizes).items():
        values = torch.randn(shape, generator=generator)
        scale = 0.3 if len(shape) == 1 or "embed" in name else 1.5 / math.sqrt(math.prod(shape[1:]))
        is_norm_scale = len(shape) == 1 and name.endswith("weight")
        state[name] = values * scale + is_norm_scale
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of the official kind, with the entries that the score does not use, and a tokenizer."""
    path = tmp_path_factory.mktemp("image-reward")
    unused = {name: torch.zeros(2) for name in UNUSED}
    torch.save(random_weights(SIZES) | unused, path / "ImageReward.pt")
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def reward(folder):
    return load_reward({"reward": "image-reward", "path": str(folder), "tokenizer": str(folder)})


@pytest.fixture
def images():
    return torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(1))


PROMPTS = ["A red circle, cats", "a cat"]
IDS = [[2, 5, 6, 7, 10, 8, 9, 3], [2, 5, 8, 3]]


def step_by_step(state, pixels, ids):
    """Raw score of one picture `[3, S, S]` and one unpadded prompt in float64: loops and explicit softmaxes only."""
    w = {name: value.double() for name, value in state.items()}

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def layer_norm(x, name, eps):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * w[name + ".weight"] + w[name + ".bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def attend(query, key, value):
        heads = []
        for start in range(0, query.shape[-1], 64):
            q, k, v = (x[:, start : start + 64] for x in (query, key, value))
            weights = (q @ k.T / 8).exp()
            heads.append(weights / weights.sum(-1, keepdim=True) @ v)
        return torch.cat(heads, dim=-1)

    pre = "blip.visual_encoder."
    kernel = w[pre + "patch_embed.proj.weight"].flatten(1)
    patches = [pixels[:, y : y + 16, x : x + 16].double().flatten() for y in (0, 16) for x in (0, 16)]
    tokens = torch.stack(patches) @ kernel.T + w[pre + "patch_embed.proj.bias"]
    tokens = torch.cat([w[pre + "cls_token"][0], tokens]) + w[pre + "pos_embed"][0]
    for i in range(2):
        block = f"{pre}blocks.{i}."
        query, key, value = linear(layer_norm(tokens, block + "norm1", 1e-6), block + "attn.qkv").split(
            192, -1
        )
        tokens = tokens + linear(attend(query, key, value), block + "attn.proj")
        hidden = gelu(linear(layer_norm(tokens, block + "norm2", 1e-6), block + "mlp.fc1"))
        tokens = tokens + linear(hidden, block + "mlp.fc2")
    image = layer_norm(tokens, pre + "norm", 1e-6)

    pre = "blip.text_encoder."
    words = w[pre + "embeddings.word_embeddings.weight"][ids]
    text = words + w[pre + "embeddings.position_embeddings.weight"][: len(ids)]
    text = layer_norm(text, pre + "embeddings.LayerNorm", 1e-12)
    for i in range(2):
        layer = f"{pre}encoder.layer.{i}."
        for kind in ("attention", "crossattention"):
            source = text if kind == "attention" else image
            own = f"{layer}{kind}."
            mixed = attend(
                linear(text, own + "self.query"),
                linear(source, own + "self.key"),
                linear(source, own + "self.value"),
            )
            text = layer_norm(linear(mixed, own + "output.dense") + text, own + "output.LayerNorm", 1e-12)
        hidden = gelu(linear(text, layer + "intermediate.dense"))
        text = layer_norm(linear(hidden, layer + "output.dense") + text, layer + "output.LayerNorm", 1e-12)
    out = text[0]
    for index in (0, 2, 4, 6, 7):
        out = linear(out, f"mlp.layers.{index}")
    return out.item()


def test_scores_equal_the_computation_step_by_step(reward, images):
    pixels = reward.preprocess(images)
    raw = [step_by_step(reward.network.state_dict(), *one) for one in zip(pixels, IDS, strict=True)]
    expected = torch.tensor([(r - 0.16717362830052426) / 1.0333394966054072 for r in raw])
    output = reward.score(images, PROMPTS)
    torch.testing.assert_close(output.mean, expected, rtol=2e-5, atol=2e-5)
    assert (output.mean[0] - output.mean[1]).abs() > 0.01
    assert output.std is None


def test_float64_network_equals_the_computation_to_rounding(reward, images):
    network = ImageRewardNetwork(**SIZES).double().eval()
    network.load_state_dict(reward.network.state_dict())
    pixels = reward.preprocess(images).double()
    ids, mask = reward.tokenize(PROMPTS)
    expected = [step_by_step(network.state_dict(), *one) for one in zip(pixels, IDS, strict=True)]
    torch.testing.assert_close(
        network(pixels, ids, mask), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11
    )


def test_text_encoder_equals_that_of_transformers(reward):
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    text = SIZES["text"]
    config = BlipTextConfig(
        vocab_size=text["vocabulary"],
        hidden_size=text["width"],
        encoder_hidden_size=text["image_width"],
        intermediate_size=text["hidden"],
        num_hidden_layers=text["depth"],
        num_attention_heads=text["heads"],
        max_position_embeddings=text["positions"],
    )
    theirs = BlipTextModel(config, add_pooling_layer=False).eval()
    own = reward.network.blip["text_encoder"]
    theirs.load_state_dict(own.state_dict(), strict=False)
    image = torch.randn(2, 5, text["image_width"], generator=torch.Generator().manual_seed(2))
    ids, mask = reward.tokenize(PROMPTS)
    expected = theirs(
        ids, attention_mask=mask, encoder_hidden_states=image, is_decoder=False
    ).last_hidden_state
    torch.testing.assert_close(own(ids, mask, image)[:, 0], expected[:, 0], rtol=1e-4, atol=1e-5)


def test_full_size_has_the_official_names_and_shapes():
    with torch.device("meta"):
        network = ImageRewardNetwork(**FULL)
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert own == official_shapes(FULL)
    assert own["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"] == (768, 1024)
    assert sum(p.numel() for n, p in network.named_parameters() if "visual" in n) == 303_301_632


def test_sizes_are_read_from_the_weights():
    state = {name: torch.empty(shape, device="meta") for name, shape in official_shapes(FULL).items()}
    assert network_sizes(state, "ImageReward.pt") == FULL


def test_prompts_become_cls_words_sep_and_35_tokens(reward):
    ids, mask = reward.tokenize([*PROMPTS, "cat " * 50])
    assert ids.shape == mask.shape == (3, 35)
    assert ids[0, :8].tolist() == IDS[0]
    assert mask.sum(dim=1).tolist() == [8, 4, 35]
    assert ids[2].tolist() == [2, *[8] * 33, 3]


def test_preprocessing_is_the_official_pil_pipeline(reward):
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (50, 71, 3), generator=generator, dtype=torch.uint8)
    official = Compose(
        [Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)]
    )
    expected = official(Image.fromarray(pixels.numpy()))
    ours = reward.preprocess(pixels.permute(2, 0, 1)[None] / 255)[0]
    assert (ours - expected).abs().max() < 0.0048 / min(CLIP_STD)  # 1.2 grey levels


def test_gradient_agrees_with_finite_differences(folder, images):
    reward = ImageReward(str(folder), str(folder)).double()
    ids, mask = reward.tokenize(PROMPTS[:1])

    def raw(x):
        return reward.network(reward.preprocess(x), ids, mask)

    x = (images[:1].double() * 0.4 + 0.3).requires_grad_()
    (gradient,) = torch.autograd.grad(raw(x).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    step = 1e-6
    slope = (raw(x + step * direction) - raw(x - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)
    (scored,) = torch.autograd.grad(reward.score(x, PROMPTS[:1]).mean.sum(), x)
    torch.testing.assert_close(scored, gradient / 1.0333394966054072)


def test_is_frozen_and_moves_to_other_types(folder, images):
    reward = ImageReward(str(folder), str(folder))
    assert isinstance(reward, Reward)
    assert not any(p.requires_grad for p in reward.parameters())
    assert not reward.training
    exact = reward.score(images, PROMPTS).mean
    rounded = reward.to(torch.bfloat16).score(images, PROMPTS).mean
    assert exact.dtype == rounded.dtype == torch.float32
    assert not exact.requires_grad
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)


def test_batch_scores_equal_single_scores(reward, images):
    batch = reward.score(images, PROMPTS).mean
    single = [reward.score(images[i : i + 1], PROMPTS[i : i + 1]).mean for i in range(2)]
    torch.testing.assert_close(batch, torch.cat(single), rtol=1e-5, atol=1e-5)


def test_missing_and_unknown_weights_are_named(tmp_path, folder):
    weights = random_weights(SIZES)
    lost = "blip.text_encoder.encoder.layer.1.crossattention.self.value.bias"
    torch.save({k: v for k, v in weights.items() if k != lost}, tmp_path / "ImageReward.pt")
    with pytest.raises(DiffalignError, match=f"1 missing .first: {lost}"):
        ImageReward(str(tmp_path), str(folder))
    torch.save(weights | {"blip.itm_head.weight": torch.zeros(2)}, tmp_path / "ImageReward.pt")
    with pytest.raises(DiffalignError, match=r"1 unknown .first: blip\.itm_head\.weight"):
        ImageReward(str(tmp_path), str(folder))
    torch.save({"mlp.layers.0.weight": torch.zeros(2)}, tmp_path / "ImageReward.pt")
    with pytest.raises(DiffalignError, match="holds no ImageReward weights"):
        ImageReward(str(tmp_path), str(folder))


def test_missing_tokenizer_and_bad_batches_are_refused(tmp_path, folder, reward, images):
    with pytest.raises(DiffalignError, match=r"cannot load the tokenizer.*as `tokenizer`"):
        ImageReward(str(folder), str(tmp_path))
    with pytest.raises(DiffalignError, match="empty batch"):
        reward.score(images[:0], [])
    with pytest.raises(DiffalignError, match="2 pictures and 1 prompts"):
        reward.score(images, ["a cat"])
