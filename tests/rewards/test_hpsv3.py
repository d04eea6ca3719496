"""HPSv3 on a tiny random Qwen2-VL, against the official forward pass rebuilt on the class of transformers."""

import hashlib
import json
import math
import warnings

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

from diffalign.errors import DiffalignError
from diffalign.rewards import Reward, load_reward
from diffalign.rewards.hpsv3 import (
    CHAT,
    INSTRUCTION_SHA256,
    HPSv3,
    build_network,
    image_patches,
    read_instruction,
    rename_weights,
    resized_sides,
)

CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
]
INSTRUCTION = (
    "\nLook at the picture and judge, from bad to good, how it is drawn and how well it shows the text below, in all "
    "of its objects, their colours, shapes, sizes, numbers and places, and in its style and mood. Say how sure you are "
    "of each, what is missing, what was added, and whether light, depth, detail and composition hold together.\n"
    "Text - {text_prompt}\n\nRate it: <|Reward|>\n\nEND\n"
)
IMAGE_ID, REWARD_ID, ROWS = 773, 774, 775
PROMPTS = ["a red circle", "two blue squares and a cat"]


def tiny_config():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = {
        "vocab_size": 800,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    return Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_ID)


def save_tokenizer(path):
    """A byte-level BPE of 768 tokens, learned from the instruction and numbers, with the control tokens of Qwen2-VL."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=768, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([INSTRUCTION, " ".join(f"{n:03d}" for n in range(1000))], trainer)
    assert raw.get_vocab_size() == 768
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|endoftext|>")
    tokenizer.add_tokens(CONTROL[1:], special_tokens=True)
    tokenizer.save_pretrained(path)


def official_model():
    """The class that the official reward model extends, with the embedding cut to the tokens in use."""
    config = tiny_config()
    config.text_config.vocab_size = ROWS
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed_tokens" not in name:
            torch.nn.init.normal_(parameter, std=1.2 / math.sqrt(parameter[0].numel()))
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model.requires_grad_(False)


def official_head():
    torch.manual_seed(1)
    layers = {0: torch.nn.Linear(32, 1024), 3: torch.nn.Linear(1024, 16), 5: torch.nn.Linear(16, 2)}
    return {
        f"rm_head.{i}.{name}": p.detach()
        for i, layer in layers.items()
        for name, p in layer.named_parameters()
    }


def older_names(state):
    """The names that transformers 4.45 wrote and the official file has."""
    return {
        k.replace("model.visual.", "visual.").replace("model.language_model.", "model."): v
        for k, v in state.items()
    }


@pytest.fixture(scope="module")
def official():
    return official_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, official):
    path = tmp_path_factory.mktemp("hpsv3")
    tiny_config().save_pretrained(path)
    save_tokenizer(path)
    (path / "instruction.txt").write_bytes(INSTRUCTION.encode())
    state = {key: value.clone() for key, value in older_names(official.state_dict()).items()}
    assert {"visual.blocks.0.attn.qkv.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"} < set(
        state
    )
    save_file(state | official_head(), path / "HPSv3.safetensors")
    return path


@pytest.fixture(scope="module")
def reward(folder):
    return load_reward({"reward": "hpsv3", "path": str(folder), "dtype": "float32"})


@pytest.fixture
def images():
    return torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(2))


def official_scores(model, reward, images, prompts):
    """The official forward pass: image features into the embeddings, padding mask, no positions given."""
    patches, grid = image_patches(images)
    ids = reward.tokenize(prompts, image_tokens=int(grid.prod()) // 4)
    mask = (ids != reward.tokenizer.pad_token_id).long()
    embeddings = model.get_input_embeddings()(ids)
    features = model.model.visual(patches, grid_thw=grid.expand(len(ids), 3)).pooler_output
    embeddings = embeddings.masked_scatter((ids == IMAGE_ID)[..., None], features)
    text_model = model.model.language_model
    hidden = text_model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state[ids == REWARD_ID]
    w = official_head()
    for index in (0, 3, 5):
        hidden = hidden @ w[f"rm_head.{index}.weight"].T + w[f"rm_head.{index}.bias"]
        hidden = hidden if index == 5 else hidden.clamp(min=0)
    return hidden


def test_scores_equal_the_official_forward_pass(official, reward, images):
    mean, log_std = official_scores(official, reward, images, PROMPTS).unbind(-1)
    output = reward.score(images, PROMPTS)
    torch.testing.assert_close(output.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.std, log_std.exp(), rtol=1e-4, atol=1e-5)
    assert (mean[0] - mean[1]).abs() > 1e-3


def test_score_depends_on_picture_and_prompt(reward, images):
    first = reward.score(images[:1], PROMPTS[:1]).mean
    assert (first - reward.score(images[1:], PROMPTS[:1]).mean).abs() > 1e-4
    assert (first - reward.score(images[:1], PROMPTS[1:]).mean).abs() > 1e-4


def test_positions_of_image_tokens_simply_count_up(official, reward, images):
    """With the two-dimensional positions of a plain Qwen2-VL the score is another one."""
    patches, grid = image_patches(images[:1])
    ids = reward.tokenize(PROMPTS[:1], image_tokens=int(grid.prod()) // 4)
    types = (ids == IMAGE_ID).int()
    hidden = official.model(
        input_ids=ids, pixel_values=patches, image_grid_thw=grid[None], mm_token_type_ids=types
    ).last_hidden_state
    plain = reward.network.rm_head(hidden[ids == REWARD_ID])[0, 0]
    assert (plain - reward.score(images[:1], PROMPTS[:1]).mean[0]).abs() > 1e-4


def test_padding_does_not_change_scores(reward, images):
    batch = reward.score(images, PROMPTS)
    single = [reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(batch.mean, torch.cat([one.mean for one in single]), rtol=1e-4, atol=1e-5)


def test_second_output_is_the_log_of_sigma(folder, images):
    reward = HPSv3(str(folder), dtype="float32")
    last = reward.network.rm_head[5]
    last.weight.zero_()
    last.bias.copy_(torch.tensor([3.0, math.log(2.0)]))
    output = reward.score(images, PROMPTS)
    torch.testing.assert_close(output.mean, torch.tensor([3.0, 3.0]))
    torch.testing.assert_close(output.std, torch.tensor([2.0, 2.0]))


def test_names_of_newer_transformers_give_the_same_network(tmp_path, folder, official, reward):
    state = {key: value.clone() for key, value in official.state_dict().items()}
    save_file(state | official_head(), tmp_path / "new.safetensors")
    other = HPSv3(
        str(tmp_path / "new.safetensors"),
        base=str(folder),
        instruction=str(folder / "instruction.txt"),
        dtype="float32",
    )
    mine, theirs = reward.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_patches_are_those_of_the_official_processor():
    pixels = torch.randint(
        0, 256, (3, 448, 448), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )
    expected = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)(pixels, return_tensors="pt")
    patches, grid = image_patches(pixels[None] / 255)
    assert grid.tolist() == expected["image_grid_thw"][0].tolist() == [1, 32, 32]
    torch.testing.assert_close(patches, expected["pixel_values"], rtol=1e-5, atol=1e-5)


def test_resize_is_close_to_pil():
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randint(0, 256, (64, 96, 3), generator=generator, dtype=torch.uint8)
    height, width = resized_sides(64, 96)
    resized = Image.fromarray(pixels.numpy()).resize((width, height))  # the official call; bicubic by default
    expected = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)(resized, return_tensors="pt")[
        "pixel_values"
    ]
    patches, _ = image_patches(pixels.permute(2, 0, 1)[None] / 255)
    assert (patches - expected).abs().max() < 0.0048 / 0.261  # 1.2 grey levels


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (448, 448)), ((1024, 1024), (448, 448)), ((512, 768), (364, 532)), ((100, 50), (644, 336))],
)
def test_resized_sides(size, expected):
    assert resized_sides(*size) == expected


@example(height=2223, width=2223)  # rounding decides between 420 and 448
@given(height=st.integers(1, 4000), width=st.integers(1, 4000))
def test_resized_sides_are_those_of_transformers(height, width):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    if max(height, width) > 200 * min(height, width):
        with pytest.raises(DiffalignError, match="200:1"):
            resized_sides(height, width)
    else:
        assert resized_sides(height, width) == smart_resize(height, width, 28, 256 * 28 * 28, 256 * 28 * 28)


def test_conversation_is_that_of_the_chat_template(reward):
    ids = reward.tokenize(["a cat"], image_tokens=3)[0].tolist()
    text = reward.tokenizer.decode(ids)
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        "<|image_pad|><|image_pad|><|image_pad|><|vision_end|>\nLook at the picture"
    )
    assert text.endswith("Text - a cat\n\nRate it: <|Reward|>\n\nEND\n<|im_end|>\n<|im_start|>assistant\n")
    assert (ids.count(IMAGE_ID), ids.count(REWARD_ID)) == (3, 1)
    assert CHAT.count("{") == 2


def test_other_instructions_than_the_official_one_are_said_to_differ(tmp_path, monkeypatch):
    path = tmp_path / "mine.txt"
    path.write_text("Rate {text_prompt}: <|Reward|>")
    with pytest.warns(UserWarning, match="not the official instruction"):
        assert read_instruction(path) == "Rate {text_prompt}: <|Reward|>"
    official = hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(INSTRUCTION_SHA256) == len(official)
    monkeypatch.setattr("diffalign.rewards.hpsv3.INSTRUCTION_SHA256", official)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_instruction(path)


@pytest.mark.parametrize(
    "text", ["Rate it: <|Reward|>", "{text_prompt}", "{text_prompt} <|Reward|> <|Reward|>"]
)
def test_a_file_that_is_no_instruction_is_refused(tmp_path, text):
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(DiffalignError, match="is no instruction"):
        read_instruction(tmp_path / "mine.txt")


def test_a_missing_instruction_says_where_to_get_it(tmp_path):
    with pytest.raises(DiffalignError, match="INSTRUCTION of the package hpsv3"):
        read_instruction(tmp_path / "instruction.txt")


def test_braces_in_prompts_are_text(reward):
    assert "Text - {image} {text_prompt} {}\n" in reward.tokenizer.decode(
        reward.tokenize(["{image} {text_prompt} {}"], image_tokens=1)[0]
    )


@pytest.mark.parametrize("token", ["<|Reward|>", "<|image_pad|>", "<|im_end|>"])
def test_control_tokens_in_prompts_are_refused(reward, images, token):
    with pytest.raises(DiffalignError, match="holds the control token"):
        reward.score(images[:1], [f"a cat {token}"])


def test_gradient_agrees_with_finite_differences(folder):
    reward = HPSv3(str(folder), dtype="float32").double()
    generator = torch.Generator().manual_seed(5)
    x = (torch.rand(1, 3, 30, 30, generator=generator, dtype=torch.float64) * 0.4 + 0.3).requires_grad_()
    output = reward.score(x, PROMPTS[:1])
    (gradient,) = torch.autograd.grad(output.mean.sum() + output.std.sum(), x)
    direction = gradient / gradient.norm()

    def value(step):
        out = reward.score((x + step * direction).detach(), PROMPTS[:1])
        return (out.mean.double() + out.std.double()).item()

    assert gradient.norm() > 1e-4
    assert gradient.norm().item() == pytest.approx((value(2e-4) - value(-2e-4)) / 4e-4, rel=3e-3)


def test_is_frozen_with_a_float32_head_on_a_bfloat16_backbone(folder, images):
    reward = HPSv3(str(folder))
    assert isinstance(reward, Reward)
    assert reward.differentiable
    assert not any(p.requires_grad for p in reward.parameters())
    assert {p.dtype for p in reward.network.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reward.network.rm_head.parameters()} == {torch.float32}
    output = reward.score(images, PROMPTS)
    exact = HPSv3(str(folder), dtype="float32").score(images, PROMPTS)
    assert output.mean.dtype == output.std.dtype == torch.float32
    torch.testing.assert_close(output.mean, exact.mean, rtol=0.1, atol=0.1)


def test_bad_folders_and_options_are_refused(tmp_path, folder, images, reward):
    with pytest.raises(DiffalignError, match="bfloat16, float16, float32"):
        HPSv3(str(folder), dtype="int8")
    save_file({"rm_head.0.weight": torch.zeros(2)}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(DiffalignError, match="no token embeddings"):
        HPSv3(str(tmp_path), base=str(folder), instruction=str(folder / "instruction.txt"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(DiffalignError, match="is a 'bert' model"):
        HPSv3(str(folder), base=str(tmp_path))
    with pytest.raises(DiffalignError, match="empty batch"):
        reward.score(images[:0], [])


def test_missing_weight_and_foreign_tokenizer_are_named(tmp_path, folder, official):
    state = {
        key: value.clone() for key, value in older_names(official.state_dict()).items()
    } | official_head()
    del state["model.norm.weight"]
    save_file(state, tmp_path / "lost.safetensors")
    with pytest.raises(DiffalignError, match=r"1 missing .first: backbone\.language_model\.norm\.weight"):
        HPSv3(
            str(tmp_path / "lost.safetensors"), base=str(folder), instruction=str(folder / "instruction.txt")
        )
    state["model.norm.weight"] = torch.ones(32)
    state["model.embed_tokens.weight"] = torch.zeros(REWARD_ID, 32)
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(DiffalignError, match=r"'<.Reward.>' as 774; expected an id below 774"):
        HPSv3(
            str(tmp_path / "short.safetensors"), base=str(folder), instruction=str(folder / "instruction.txt")
        )


def official_full_shapes():
    """Names and shapes of the official file: Qwen2-VL-7B as transformers 4.45 named it, one more token, the head."""

    def dense(name, outputs, inputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    shapes = {"visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14)}
    for i in range(32):
        block = f"visual.blocks.{i}."
        shapes |= {
            f"{block}{norm}.{part}": (1280,) for norm in ("norm1", "norm2") for part in ("weight", "bias")
        }
        shapes |= dense(block + "attn.qkv", 3840, 1280) | dense(block + "attn.proj", 1280, 1280)
        shapes |= dense(block + "mlp.fc1", 5120, 1280) | dense(block + "mlp.fc2", 1280, 5120)
    shapes |= {"visual.merger.ln_q.weight": (1280,), "visual.merger.ln_q.bias": (1280,)}
    shapes |= dense("visual.merger.mlp.0", 5120, 5120) | dense("visual.merger.mlp.2", 3584, 5120)
    shapes |= {"model.embed_tokens.weight": (151658, 3584), "model.norm.weight": (3584,)}
    for i in range(28):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (3584,),
            layer + "post_attention_layernorm.weight": (3584,),
        }
        for name, width in (("q", 3584), ("k", 512), ("v", 512)):
            shapes |= dense(f"{layer}self_attn.{name}_proj", width, 3584)
        shapes |= {
            layer + "self_attn.o_proj.weight": (3584, 3584),
            layer + "mlp.down_proj.weight": (3584, 18944),
        }
        shapes |= {f"{layer}mlp.{name}_proj.weight": (18944, 3584) for name in ("gate", "up")}
    shapes |= {"lm_head.weight": (151658, 3584)}
    for index, outputs, inputs in ((0, 1024, 3584), (3, 16, 1024), (5, 2, 16)):
        shapes |= dense(f"rm_head.{index}", outputs, inputs)
    return shapes


def test_full_size_takes_the_official_names_and_shapes(tmp_path):
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    Qwen2VLConfig(text_config=text | {"num_key_value_heads": 4, "rope_parameters": rope}).save_pretrained(
        tmp_path
    )
    shapes = official_full_shapes()
    state = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()}
    renamed = rename_weights(state, torch.bfloat16)
    network = build_network(str(tmp_path), renamed)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in renamed.items()} == expected
    assert len(shapes) == len(expected) + 1  # all but the language head
