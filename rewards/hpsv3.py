"""HPSv3: human preference by a vision-language model, with its uncertainty (Ma et al., 2025, arXiv:2508.03789).

A Qwen2-VL-7B reads the picture, an instruction with the prompt, and the token `<|Reward|>`, whose last hidden state an
MLP maps to `mu` and `log sigma` of a normal distribution of the score: training compares pictures by samples of it.

Two facts of the official code that a plain Qwen2-VL forward pass would get wrong: token positions simply count up
(the two-dimensional positions of image tokens are never computed), and every picture is resized to about 256 * 28^2
pixels, small ones too.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Facts, RewardOutput
from diffalign.rewards.preprocess import check_batch, normalize, resize
from diffalign.rewards.tokenizers import load_tokenizer
from diffalign.rewards.weights import StateDict, load_exactly, read_state_dict, resolve_file

REPOSITORY = "MizzenAI/HPSv3"
FILENAME = "HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
PIXELS = 256 * 28 * 28
REWARD_TOKEN, IMAGE_TOKEN = "<|Reward|>", "<|image_pad|>"

# The text the network was trained with is not ours to ship; `{text_prompt}` in it stands for the prompt.
INSTRUCTION_FILE = "instruction.txt"
INSTRUCTION_SHA256 = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
PLACEHOLDER = "{text_prompt}"

# The chat template of Qwen2-VL for one user message of a picture and a text.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)


class HPSv3(nn.Module):
    """HPSv3 as a frozen reward; `std` of its scores is `sigma`.

    Differentiable, at the cost of a backward pass through seven billion parameters. Preprocessing is the official one:
    bicubic resize to about 448x448 pixels at the same proportions, sides multiples of 28, CLIP normalisation.

    Args:
        path: hub id, folder with `HPSv3.safetensors`, or a file of the official weights; None for the official hub id.
        base: hub id or folder with the configuration and tokenizer of the Qwen2-VL underneath; None for the folder of
            `path` if it holds a `config.json`, otherwise the official one.
        instruction: text file with the words around the prompt, `{text_prompt}` for the prompt itself; None for
            `instruction.txt` beside the weights. Other words than the official ones (the variable `INSTRUCTION` of the
            package hpsv3, MIT) give other scores, and a warning.
        dtype: of the backbone, as in torch; bfloat16 is the official one and takes 16 GB. The head stays float32.

    Raises:
        DiffalignError: weights, configuration or tokenizer cannot be had or do not fit each other.
    """

    name = "hpsv3"
    modality: Literal["image", "audio"] = "image"
    differentiable = True
    kind: Literal["sample", "set"] = "sample"
    facts = Facts(
        scale="about -1 to 15; SDXL 8.2, FLUX-dev 10.4",
        licence="MIT (wheel hpsv3 1.0.0); backbone Apache-2.0",
        backbone="Qwen2-VL-7B-Instruct",
        source="arXiv:2508.03789, https://github.com/MizzenAI/HPSv3",
    )

    def __init__(
        self,
        path: str | None = None,
        base: str | None = None,
        instruction: str | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        super().__init__()
        if path is None and instruction is not None:
            read_instruction(Path(instruction))  # a mistake is found before 16 GB are downloaded
        file = resolve_file(path, REPOSITORY, FILENAME)
        self.instruction = read_instruction(
            Path(instruction) if instruction else file.parent / INSTRUCTION_FILE
        )
        base = base or (str(file.parent) if (file.parent / "config.json").is_file() else BASE)
        state = rename_weights(read_state_dict(file), parse_dtype(dtype))
        self.network = build_network(base, state)
        load_exactly(self.network, state, file)
        self.tokenizer = load_tokenizer(base, option="base")
        self.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        self.ids = special_ids(self.tokenizer, rows=len(state[EMBEDDING]), origin=base)
        self.eval().requires_grad_(False)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures `[B, 3, H, W]` in [0, 1] for `B` prompts.

        Raises:
            DiffalignError: the batch is empty, has another shape or another number of prompts, a picture is more than
                200 times longer than wide, or a prompt holds a control token of the tokenizer.
        """
        check_batch(self.name, media, prompts)
        patches, grid = image_patches(media.to(next(self.parameters()).device))
        ids = self.tokenize(prompts, image_tokens=int(grid.prod()) // 4)
        rows = torch.arange(len(ids)), (ids == self.ids[REWARD_TOKEN]).int().argmax(dim=1)
        output = self.network(ids.to(patches.device), patches, grid, self.ids[IMAGE_TOKEN], rows)
        mean, log_std = output.float().unbind(dim=-1)
        return RewardOutput(mean, std=log_std.exp())

    def tokenize(self, prompts: Sequence[str], image_tokens: int) -> Tensor:
        """Token ids `[B, L]` of the whole conversations, padded on the right."""
        for prompt in prompts:
            if found := [token for token in self.ids if token in prompt]:
                raise DiffalignError(f"prompt {prompt!r} holds the control token {found[0]!r}; remove it")
        image = IMAGE_TOKEN * image_tokens
        texts = [
            CHAT.format(image=image, text=self.instruction.replace(PLACEHOLDER, prompt)) for prompt in prompts
        ]
        return self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]


def read_instruction(path: Path) -> str:
    """The instruction in a text file, warning when it is not the official one.

    Raises:
        DiffalignError: no such file, no `{text_prompt}` in it, or other than one `<|Reward|>`.
    """
    if not path.is_file():
        raise DiffalignError(
            f"hpsv3 needs the text its network was trained with, and {str(path)!r} is missing. Save the variable "
            "INSTRUCTION of the package hpsv3 1.0.0 (MIT licence) to a file, unchanged, and give it as the option "
            f"`instruction`, or put it beside the weights as {INSTRUCTION_FILE}"
        )
    text = path.read_bytes().decode("utf-8")
    if PLACEHOLDER not in text or text.count(REWARD_TOKEN) != 1:
        raise DiffalignError(
            f"{path} is no instruction of hpsv3: expected {PLACEHOLDER} for the prompt and one {REWARD_TOKEN}"
        )
    if hashlib.sha256(text.encode()).hexdigest() != INSTRUCTION_SHA256:
        warnings.warn(f"{path} is not the official instruction; its scores will differ", stacklevel=2)
    return text


class HPSv3Network(nn.Module):
    """Qwen2-VL without its language head, and the reward head.

    Args:
        config: `transformers.Qwen2VLConfig`.
    """

    def __init__(self, config: Any) -> None:
        from transformers import Qwen2VLModel

        super().__init__()
        self.backbone = Qwen2VLModel(config)
        self.rm_head = nn.Sequential(
            nn.Linear(config.text_config.hidden_size, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )

    def forward(
        self, ids: Tensor, patches: Tensor, grid: Tensor, image_id: int, rows: tuple[Tensor, Tensor]
    ) -> Tensor:
        """`mu` and `log sigma` `[B, 2]`.

        No mask is needed: attention is causal and padding comes after the token that is read.

        Args:
            ids: `[B, L]`, padded on the right. patches, grid: of `image_patches`. image_id: replaced by image tokens.
            rows: batch index and position, both `[B]`, of the tokens that are read.
        """
        embeddings = self.backbone.get_input_embeddings()(ids)
        visual = self.backbone.visual
        features = visual(patches.to(embeddings.dtype), grid_thw=grid.to(ids.device).expand(len(ids), -1))
        features = getattr(features, "pooler_output", features)  # a bare tensor before transformers 5
        embeddings = embeddings.masked_scatter((ids == image_id)[..., None], features.to(embeddings.dtype))
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
        hidden = self.backbone.language_model(
            inputs_embeds=embeddings, position_ids=positions, use_cache=False
        ).last_hidden_state[rows]
        return self.rm_head(hidden.to(next(self.rm_head.parameters()).dtype))


def image_patches(images: Tensor) -> tuple[Tensor, Tensor]:
    """Patches in the order of Qwen2-VL, and their grid (time, rows, columns) `[3]`.

    Patches of 14x14 pixels, each picture doubled as two equal frames; 2x2 neighbours, which the network merges into one
    token, follow each other. `[B, 3, H, W]` in [0, 1] to `[B * rows * columns, 3 * 2 * 14 * 14]`.
    """
    height, width = resized_sides(*images.shape[-2:])
    pixels = normalize(resize(images, (height, width)))
    rows, columns = height // 14, width // 14
    patches = pixels.reshape(len(images), 3, rows // 2, 2, 14, columns // 2, 2, 14)
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # [B, R/2, C/2, 2, 2, 3, 1, 14, 14]
    patches = patches.expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return patches.reshape(-1, 3 * 2 * 14 * 14), torch.tensor([1, rows, columns])


def resized_sides(height: int, width: int) -> tuple[int, int]:
    """Sides with the same proportions, multiples of 28, of about `PIXELS` pixels.

    Raises:
        DiffalignError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise DiffalignError(
            f"hpsv3 got pictures of {width}x{height}; expected at most 200:1, as Qwen2-VL does"
        )
    rounded = [max(28, round(side / 28) * 28) for side in (height, width)]
    if math.prod(rounded) > PIXELS:
        # Divided in this order, as the official code does: rounding decides which multiple of 28 it is.
        factor = math.sqrt(height * width / PIXELS)
        rounded = [math.floor(side / factor / 28) * 28 for side in (height, width)]
    elif math.prod(rounded) < PIXELS:
        factor = math.sqrt(PIXELS / (height * width))
        rounded = [math.ceil(side * factor / 28) * 28 for side in (height, width)]
    return rounded[0], rounded[1]


EMBEDDING = "backbone.language_model.embed_tokens.weight"


def rename_weights(state: Mapping[str, Tensor], dtype: torch.dtype) -> StateDict:
    """The official weights under the names of `HPSv3Network`, whichever transformers wrote them.

    The official file was written before transformers 4.52 (`visual.`, `model.layers.`); later ones say `model.visual.`
    and `model.language_model.`. The language head is dropped. The reward head becomes float32, the rest `dtype`.
    """
    renamed = {}
    for key, value in state.items():
        if key.startswith("rm_head."):
            renamed[key] = value.float()
        elif not key.startswith("lm_head."):
            key = key.removeprefix("model.")
            known = key.startswith(("visual.", "language_model."))
            renamed["backbone." + key if known else "backbone.language_model." + key] = value.to(dtype)
    return renamed


def build_network(base: str, state: Mapping[str, Tensor]) -> HPSv3Network:
    """The network without memory for its weights, with as many tokens as the weights have.

    Raises:
        DiffalignError: no Qwen2-VL configuration at `base`, or no embeddings in the weights.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    if EMBEDDING not in state:
        raise DiffalignError(
            f"the weights of hpsv3 have no token embeddings; expected the official {FILENAME}"
        )
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise DiffalignError(
            f"cannot load the Qwen2-VL configuration of {base!r}: {str(error).splitlines()[0]}"
        ) from error
    if config.model_type != "qwen2_vl":
        raise DiffalignError(f"{base!r} is a {config.model_type!r} model; hpsv3 stands on 'qwen2_vl'")
    config.text_config.vocab_size = len(
        state[EMBEDDING]
    )  # the reward token was added, unused rows were dropped
    with init_empty_weights(include_buffers=False):
        return HPSv3Network(config)


def special_ids(tokenizer: Any, rows: int, origin: str) -> dict[str, int]:
    """Ids of the control tokens that the conversation uses.

    Raises:
        DiffalignError: the tokenizer lacks one, or has one beyond the `rows` of the embedding.
    """
    names = [REWARD_TOKEN, IMAGE_TOKEN, "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if not 0 <= vocabulary.get(name, -1) < rows:
            raise DiffalignError(
                f"the tokenizer of {origin!r} has {name!r} as {vocabulary.get(name)}; expected an id below {rows}, the "
                "number of token embeddings. Give the Qwen2-VL folder that the weights were trained from as `base`"
            )
    return {name: vocabulary[name] for name in names}


def parse_dtype(name: str) -> torch.dtype:
    """`torch.bfloat16` for "bfloat16".

    Raises:
        DiffalignError: not one of the three floating types that make sense here.
    """
    allowed = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in allowed:
        raise DiffalignError(f"hpsv3 got dtype {name!r}; expected one of: {', '.join(allowed)}")
    return allowed[name]
