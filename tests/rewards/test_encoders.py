"""Encoders by specification: shapes, gradients, preprocessing, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.encoders import Encoder, TextEncoder, load_encoder


def pictures(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "resample": 3}
    BitImageProcessor(**size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.1]).save_pretrained(folder)
    return folder


def test_pixels_are_averages_of_cells():
    images = torch.zeros(1, 3, 4, 4)
    images[0, 0, :2, :2] = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    images[0, 2, 2:, 2:] = 1
    expected = [0.5, 0, 0, 0] + [0] * 4 + [0, 0, 0, 1]
    encoder = load_encoder("pixels:2")
    assert isinstance(encoder, Encoder)
    assert not isinstance(encoder, TextEncoder)
    assert encoder.name == "pixels:2"
    assert encoder.embed(images)[0].tolist() == expected


def test_dino_takes_the_class_token_of_preprocessed_pictures(dino_folder):
    from transformers import AutoImageProcessor, Dinov2Model

    encoder = load_encoder(f"dino:{dino_folder}")
    assert not any(p.requires_grad for p in encoder.parameters())
    bytes_ = (pictures(2, 3, 40, 50) * 255).round()
    processor = AutoImageProcessor.from_pretrained(dino_folder)
    pixels = processor(list(bytes_.byte()), return_tensors="pt")["pixel_values"]
    expected = Dinov2Model.from_pretrained(dino_folder).eval()(pixel_values=pixels).pooler_output
    found = encoder.embed(bytes_ / 255)
    assert found.shape == (2, 16)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    # The preprocessing matters to these features by far more than the tolerance.
    assert float((found - encoder.embed(bytes_ / 255 * 0.7)).abs().max()) > 0.2


def test_gradients_reach_the_pictures(dino_folder):
    images = pictures(1, 3, 30, 30).requires_grad_()
    load_encoder(f"dino:{dino_folder}").embed(images).square().sum().backward()
    assert float(images.grad.abs().sum()) > 0


def test_clip_embeds_pictures_and_texts_in_one_space(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    from diffalign.samples import __path__ as folders

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(f"{folders[0]}/tiny-sdxl/tokenizer")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**text, "image_size": 32, "patch_size": 16}
    text |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path
    )
    encoder = load_encoder(f"clip:{tmp_path}")
    assert isinstance(encoder, TextEncoder)
    features, texts = encoder.embed(pictures(2, 3, 40, 40)), encoder.embed_texts(["a red circle"])
    assert features.shape == (2, 8)
    assert texts.shape == (1, 8)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_inception_takes_pooled_features_of_a_state_dict(tmp_path):
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    network = inception_v3(weights=None, init_weights=False).eval()
    save_file(network.state_dict(), tmp_path / "inception.safetensors")
    encoder = load_encoder(f"inception@{tmp_path / 'inception.safetensors'}")
    images = pictures(1, 3, 299, 299)
    found = encoder.embed(images)
    assert found.shape == (1, 2048)
    with torch.no_grad():
        network.transform_input = False
        logits = network(2 * images - 1)
        torch.testing.assert_close(network.fc(found), logits, atol=1e-5, rtol=1e-4)


def test_unknown_and_broken_specifications(tmp_path):
    with pytest.raises(DiffalignError, match=r"unknown encoder 'pixels:zero'.*Did you mean 'pixels:'"):
        load_encoder("pixels:zero")
    with pytest.raises(DiffalignError, match="unknown encoder 'vgg'"):
        load_encoder("vgg")
    with pytest.raises(DiffalignError, match="no file of weights at"):
        load_encoder(f"inception@{tmp_path / 'none.pth'}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DiffalignError, match="transformers cannot load the encoder"):
        load_encoder(f"dino:{tmp_path}")
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(DiffalignError, match="do not fit Inception3"):
        load_encoder(f"inception@{tmp_path / 'other.safetensors'}")
