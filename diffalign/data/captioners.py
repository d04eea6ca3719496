"""Captioners by hub id: image-to-text models of transformers, such as BLIP, or those that are asked in a chat."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from diffalign.backbones.loading import loading
from diffalign.data.captioning import Captioner

QUESTION = "Describe this picture in one short sentence, as a caption: what is there, with colours, numbers and places."
MAX_TOKENS = 64


def image_to_text(model: str) -> Captioner:
    """The captioner of a hub id or folder, on the GPU in bfloat16 where there is one.

    `--captioner diffalign.data.captioners:image_to_text@Salesforce/blip-image-captioning-large` on the command line.
    A model with a chat template is asked `QUESTION`; others (BLIP, BLIP-2, GIT) get the picture alone. The most
    probable words are taken, so that a picture has one caption. The prompt is not shown: the caption has to say what is
    there and not what was wanted.

    Raises:
        DiffalignError: the model cannot be loaded; pickled weights and code of the model's own never are.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    gpu = torch.cuda.is_available()
    network = loading(
        f"captioner {model}",
        lambda: AutoModelForImageTextToText.from_pretrained(
            model, use_safetensors=True, dtype=torch.bfloat16 if gpu else torch.float32
        ),
    )
    network = network.eval().to("cuda" if gpu else "cpu")
    processor = loading(f"processor of captioner {model}", lambda: AutoProcessor.from_pretrained(model))

    def caption(image: Image.Image, prompt: str) -> str:
        inputs = _inputs(processor, image).to(network.device, network.dtype)
        with torch.no_grad():
            tokens = network.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[0]
        # A decoder repeats what it was asked before it answers; one with an encoder was asked nothing.
        asked = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        return str(processor.decode(tokens[asked:], skip_special_tokens=True)).strip()

    return caption


def _inputs(processor: Any, image: Image.Image) -> Any:
    """What the model is given for a picture."""
    if not getattr(processor, "chat_template", None):
        return processor(images=image, return_tensors="pt")
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
