"""Captioners of transformers on tiny random models: one that gets the picture alone, one that is asked in a chat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

from diffalign.data.captioners import QUESTION, _inputs
from diffalign.data.captioning import load_captioner
from diffalign.errors import DiffalignError

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "red", "blue", "circle", "star")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP of one layer each for pictures and words."""
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(WORDS), "encoder_hidden_size": 16, "bos_token_id": 5, "sep_token_id": 3}
    config = BlipConfig(
        text_config=layers | text | {"pad_token_id": 0, "eos_token_id": 3, "initializer_range": 1.0},
        vision_config=layers | {"image_size": 32, "patch_size": 16, "initializer_range": 1.0},
        projection_dim=8,
    )
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(processor, BertTokenizer(str(folder / "vocab.txt"))).save_pretrained(folder)
    return folder


def test_a_model_without_chat_captions_the_picture(blip):
    caption = load_captioner(f"diffalign.data.captioners:image_to_text@{blip}")
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    said = caption(image, "ignored")
    # The same by hand: from [DEC] on, the most probable word after those there are, until [SEP].
    network = BlipForConditionalGeneration.from_pretrained(blip).eval()
    pixels = BlipProcessor.from_pretrained(blip)(images=image, return_tensors="pt")["pixel_values"]
    tokens = [WORDS.index("[DEC]")]
    with torch.no_grad():
        seen = network.vision_model(pixels)[0]
        while len(tokens) < 12 and WORDS[tokens[-1]] != "[SEP]":
            step = network.text_decoder(torch.tensor([tokens]), encoder_hidden_states=seen)
            tokens.append(int(step.logits[0, -1].argmax()))
    words = [
        WORDS[token] for token in tokens if WORDS[token] not in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    ]
    assert len(words) > 2
    assert said.split()[: len(words)] == words
    assert caption(image, "another prompt") == said


class Chat:
    """A processor with a chat template that notes what it is given."""

    chat_template = "{{ messages }}"

    def apply_chat_template(self, messages, **options):
        self.messages, self.options = messages, options
        return {"input_ids": torch.zeros(1, 3, dtype=torch.long)}


def test_a_model_with_a_chat_is_asked_about_the_picture():
    processor, image = Chat(), Image.new("RGB", (4, 4))
    _inputs(processor, image)
    (message,) = processor.messages
    assert message["role"] == "user"
    assert [part.get("image") or part["text"] for part in message["content"]] == [image, QUESTION]
    assert processor.options["add_generation_prompt"]
    assert processor.options["return_dict"]


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DiffalignError, match="cannot load the captioner"):
        load_captioner(f"diffalign.data.captioners:image_to_text@{tmp_path}")
