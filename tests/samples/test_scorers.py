"""Training of the tiny scorers: losses and ratings by hand, degradation, determinism, files that open_clip reads."""

import json
import math
import shutil

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from diffalign.rewards.clip_model import load_clip
from diffalign.samples import FOLDER, train_scorers
from diffalign.samples.degrade import bend, blur, degrade
from diffalign.samples.preferences import Pair, write_pairs
from diffalign.samples.scenes import Placed, draw

SEED = 5


def random_pictures(count=3, seed=0):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with an untrained CLIP and twelve pairs of two pictures each."""
    out = tmp_path_factory.mktemp("world")
    shutil.copytree(FOLDER / "tiny-sdxl" / "tokenizer", out / "tiny-sdxl" / "tokenizer")
    folder = out / "scorers" / "clip"
    train_scorers.write_clip_config(out / "tiny-sdxl" / "tokenizer", folder)
    torch.manual_seed(0)
    train_scorers.save_clip(open_clip.create_model(f"local-dir:{folder}", load_weights=False), folder)
    red, blue = (draw((Placed("circle", color, 30, 34, 10),)) for color in ("red", "blue"))
    rows = [Pair("a red circle", (red, blue), 1.0), Pair("a blue circle", (red, blue), 0.0)] * 5
    ties = [Pair("a circle", (red, blue), 0.5)] * 2
    write_pairs(out / "preferences" / "train-00000.parquet", rows + ties)
    return out


def test_contrastive_loss_by_hand():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # Logits with scale 2 are [[2, 1.2], [0, 1.6]]; the diagonal is right, in rows and in columns.
    rows = math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(-1.6))
    columns = math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-0.4))
    loss = train_scorers.contrastive_loss(images, texts, torch.tensor(2.0), torch.tensor([7, 9]))
    assert loss.item() == pytest.approx((rows + columns) / 4)


def test_equal_captions_share_the_target():
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    same = train_scorers.contrastive_loss(images, texts, torch.tensor(3.0), torch.tensor([4, 4]))
    # Rows [3, 3] and [0, 0] against a target of halves: log 2 each. Columns [3, 0]: log(1 + e^3) - 1.5 each.
    assert same.item() == pytest.approx((math.log(2) + math.log(1 + math.exp(3)) - 1.5) / 2)


def test_no_bending_and_no_blur_leave_pictures_as_they_are():
    pictures = random_pictures()
    draws = torch.Generator().manual_seed(1)
    torch.testing.assert_close(bend(pictures, torch.zeros(3), draws), pictures, atol=1e-4, rtol=0)
    torch.testing.assert_close(blur(pictures, torch.zeros(3)), pictures, atol=1e-6, rtol=0)


def test_blur_of_a_point_has_the_width_asked_for():
    point = torch.zeros(2, 3, 64, 64)
    point[:, :, 32, 32] = 1.0
    spread = blur(point, torch.tensor([0.7, 1.0]))
    offsets = torch.arange(64) - 32.0
    variance = (spread[:, 0].sum(1) * offsets.square()).sum(1)
    assert spread.sum((2, 3)) == pytest.approx(torch.ones(2, 3))
    assert variance.sqrt().tolist() == pytest.approx([0.7, 1.0], abs=0.02)


def test_bending_moves_pixels_by_the_amount_asked_for():
    ramp = torch.arange(64.0).view(1, 1, 1, 64).expand(1, 1, 64, 64)
    moved = bend(ramp, torch.tensor([1.0]), torch.Generator().manual_seed(3))
    inner = (moved - ramp)[..., 8:-8, 8:-8]
    # An rms shift of one pixel in two directions is about 0.7 in each.
    assert 0.4 < inner.square().mean().sqrt() < 1.0


def test_degrading_grows_with_strength_keeps_the_range_and_repeats():
    pictures = random_pictures(8)
    far = []
    for strength in (0.0, 1.0, 3.0):
        one, two = (degrade(pictures, torch.Generator().manual_seed(2), strength) for _ in range(2))
        assert torch.equal(one, two)
        assert one.min() >= 0
        assert one.max() <= 1
        far.append((one - pictures).abs().mean().item())
    assert far[0] < 1e-4 < far[1] < far[2]


def test_rating_of_an_empty_picture_is_one_and_clean_beats_broken():
    clean = draw((Placed("circle", "black", 32, 32, 10),))
    corner = draw((Placed("circle", "black", 14, 14, 10),))
    broken = clean.copy()
    broken[28:40, 32:44] = 240
    assert train_scorers.rating(draw(())) == 1.0
    # A perfect black circle in the middle: clean about 1, distance to the background 355 of 300, no imbalance.
    assert train_scorers.rating(clean) == pytest.approx(10, abs=0.5)
    assert train_scorers.rating(clean) - train_scorers.rating(corner) == pytest.approx(
        1.8 * math.hypot(18, 18) / 32, abs=0.1
    )
    assert train_scorers.rating(broken) < train_scorers.rating(clean) - 0.5


def test_a_pair_is_read_back_with_its_label(world):
    pairs = train_scorers.read_pairs(world / "preferences" / "train-00000.parquet")
    assert pairs.captions[:2] == ["a red circle", "a blue circle"]
    assert pairs.images.shape == (12, 2, 64, 64, 3)
    assert pairs.labels.tolist() == [1, 0] * 5 + [0.5] * 2
    assert np.abs(pairs.images[0, 0, 34, 30].astype(int) - (214, 39, 40)).max() < 12


def test_clip_folder_is_read_by_open_clip_with_its_own_tokenizer(world):
    clip = load_clip(str(world / "scorers" / "clip"))
    config = json.loads((world / "scorers" / "clip" / "open_clip_config.json").read_text())
    assert clip.width == train_scorers.EMBEDDING
    (tokens,) = clip.tokenize(["a red circle", "two blue stars"])
    end = config["model_cfg"]["text_cfg"]["vocab_size"] - 1
    # The end token has the highest id, where open_clip looks for the sentence's embedding; the rest is filled with it.
    assert tokens.shape == (2, 16)
    assert (tokens == end).int().argmax(1).tolist() == [4, 4]
    assert (tokens[:, 5:] == end).all()


def test_heads_are_the_same_from_the_same_seed_and_learn_the_pairs(world, tmp_path):
    clip = load_clip(str(world / "scorers" / "clip"))
    pairs = train_scorers.read_pairs(world / "preferences" / "train-00000.parquet")
    for name, seed in (("a", SEED), ("b", SEED), ("c", SEED + 1)):
        train_scorers.train_preference(clip, pairs, tmp_path / name, seed, steps=4)
    a, b, c = (load_file(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)
    assert len(a["first"]) == train_scorers.MEMBERS
    assert not torch.equal(a["first"][0], a["first"][1])


def test_aesthetic_head_follows_the_ratings(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train_scorers, "RATED_PICTURES", 40)
    clip = load_clip(str(world / "scorers" / "clip"))
    pairs = train_scorers.read_pairs(world / "preferences" / "train-00000.parquet")
    pixels, ratings = train_scorers.rated_pictures(pairs, SEED)
    assert pixels.shape == (52, 3, 64, 64)
    assert ratings[:10].mean() > ratings[30:40].mean() + 0.5
    train_scorers.train_aesthetic(clip, pairs, tmp_path / "head.safetensors", SEED, steps=3)
    state = load_file(tmp_path / "head.safetensors")
    assert state["layers.0.weight"].shape == (128, train_scorers.EMBEDDING)
