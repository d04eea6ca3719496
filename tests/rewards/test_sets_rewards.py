"""Set rewards by name: signs, references of every kind, gradients, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards import Reward, load_reward
from diffalign.rewards.encoders import PixelEncoder
from diffalign.rewards.sets import FrechetStats, cmmd, frechet_distance, kid, pairwise_distance, vendi_score
from diffalign.rewards.sets.reference import load_reference

ENCODER = "pixels:2"
PROMPTS = ["a"] * 6


def pictures(count: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def features(media: Tensor) -> Tensor:
    return PixelEncoder(2).embed(media)


class TextsToo(PixelEncoder):
    """Embeds a text as the number of its letters."""

    def embed_texts(self, texts: list[str]) -> Tensor:
        return torch.tensor([[float(len(text)), 1.0] for text in texts])


@pytest.fixture
def reference(tmp_path) -> str:
    save_file({"features": features(pictures(20, seed=9))}, tmp_path / "reference.safetensors")
    return str(tmp_path / "reference.safetensors")


@pytest.mark.parametrize(("name", "metric"), [("frechet", frechet_distance), ("kid", kid), ("cmmd", cmmd)])
def test_distances_to_a_reference_are_negated_and_repeated(name, metric, reference):
    reward = load_reward({"reward": name, "reference": reference, "encoder": ENCODER, "batch_size": 4})
    assert isinstance(reward, Reward)
    assert (reward.name, reward.kind, reward.differentiable) == (name, "set", True)
    output = reward.score(pictures(), PROMPTS)
    expected = -metric(features(pictures()), features(pictures(20, seed=9)))
    assert output.mean.shape == (6,)
    assert output.mean.dtype == torch.float32
    assert output.mean.tolist() == pytest.approx([float(expected)] * 6, rel=1e-5)


def test_vendi_and_diversity_reward_variety():
    media = pictures()
    vendi = load_reward({"reward": "vendi", "encoder": ENCODER, "order": 2})
    assert float(vendi.score(media, PROMPTS).mean[0]) == pytest.approx(float(vendi_score(features(media), 2)))
    diversity = load_reward({"reward": "diversity", "encoder": ENCODER})
    assert float(diversity.score(media, PROMPTS).mean[3]) == pytest.approx(
        float(pairwise_distance(features(media)))
    )
    alike = media[:1].expand(6, -1, -1, -1)
    assert float(vendi.score(alike, PROMPTS).mean[0]) == pytest.approx(1)
    assert float(diversity.score(alike, PROMPTS).mean[0]) == pytest.approx(0, abs=1e-6)


def test_diversity_per_prompt_knows_each_pictures_own():
    media = pictures(5)
    reward = load_reward({"reward": "diversity", "encoder": ENCODER, "per_prompt": True})
    output = reward.score(media, ["a", "b", "a", "b", "c"])
    of_a, of_b = (float(pairwise_distance(features(media[rows]))) for rows in ([0, 2], [1, 3]))
    assert output.parts["prompt"][:4].tolist() == pytest.approx([of_a, of_b, of_a, of_b])
    assert math.isnan(output.parts["prompt"][4])
    assert float(output.mean[4]) == pytest.approx((of_a + of_b) / 2)


@pytest.mark.parametrize("name", ["frechet", "kid", "cmmd", "vendi", "diversity"])
def test_gradients_of_pixels_agree_with_differences(name, reference):
    options = {"reference": reference} if name in ("frechet", "kid", "cmmd") else {}
    reward = load_reward({"reward": name, "encoder": ENCODER, **options})
    media = pictures().requires_grad_()
    value = reward.value(features(media))
    value.backward()
    step = 1e-3 * (pictures(seed=1) - 0.5)
    ahead, back = (float(reward.value(features(media.detach() + sign * step))) for sign in (1, -1))
    assert float((media.grad * step).sum()) == pytest.approx((ahead - back) / 2, rel=2e-3, abs=1e-7)
    reward.score(media, PROMPTS).mean.sum().backward()


def test_a_folder_of_pictures_of_several_sizes_is_a_reference(tmp_path):
    media = (pictures(3) * 255).round().byte()
    for number, image in enumerate(media):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    (tmp_path / "deeper").mkdir()
    Image.new("RGB", (5, 11), (255, 0, 0)).save(tmp_path / "deeper" / "red.png")
    (tmp_path / "notes.txt").write_text("no picture")
    found = load_reference(str(tmp_path), PixelEncoder(2))
    torch.testing.assert_close(found[:3], features(media / 255))
    assert found[3].tolist() == [1.0] * 4 + [0.0] * 8
    assert len(found) == 4
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(DiffalignError, match=r"broken\.png' cannot be decoded"):
        load_reference(str(tmp_path), PixelEncoder(2))


def test_stored_statistics_are_a_reference_of_frechet_only(tmp_path):
    path = tmp_path / "stats.safetensors"
    FrechetStats.of(features(pictures(20, seed=9))).save(path)
    reward = load_reward({"reward": "frechet", "reference": str(path), "encoder": ENCODER})
    expected = -frechet_distance(features(pictures()), features(pictures(20, seed=9)))
    assert float(reward.score(pictures(), PROMPTS).mean[0]) == pytest.approx(float(expected), rel=1e-5)
    kernel = load_reward({"reward": "kid", "reference": str(path), "encoder": ENCODER})
    with pytest.raises(DiffalignError, match="holds statistics, which only `frechet` can use"):
        kernel.score(pictures(), PROMPTS)


def test_texts_are_a_reference_for_encoders_of_texts(tmp_path):
    (tmp_path / "texts.txt").write_text("red\n\n green \n")
    expected = [[3.0, 1.0], [5.0, 1.0]]
    assert load_reference(str(tmp_path / "texts.txt"), TextsToo(2)).tolist() == expected
    assert load_reference(["red", "green"], TextsToo(2)).tolist() == expected
    with pytest.raises(
        DiffalignError, match="'pixels:2' embeds pictures only; texts as reference need a CLIP"
    ):
        load_reference(["red"], PixelEncoder(2))


def test_references_are_checked_when_the_reward_is_made(tmp_path):
    with pytest.raises(DiffalignError, match="no reference at 'nowhere'"):
        load_reward({"reward": "kid", "reference": "nowhere", "encoder": ENCODER})
    with pytest.raises(DiffalignError, match="needs reference"):
        load_reward({"reward": "frechet", "encoder": ENCODER})
    with pytest.raises(DiffalignError, match="at least one text"):
        load_reward({"reward": "cmmd", "reference": [], "encoder": ENCODER})
    with pytest.raises(DiffalignError, match="order 0"):
        load_reward({"reward": "vendi", "order": 0, "encoder": ENCODER})
    save_file({"other": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(DiffalignError, match=r"holds \['other'\]; expected a tensor `features`"):
        load_reference(str(tmp_path / "x.safetensors"), PixelEncoder(2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffalignError, match="holds no pictures"):
        load_reference(str(tmp_path / "empty"), PixelEncoder(2))


def test_batches_that_make_no_set_are_refused(reference):
    reward = load_reward({"reward": "frechet", "reference": reference, "encoder": ENCODER})
    with pytest.raises(DiffalignError, match="frechet got an empty batch"):
        reward.score(pictures()[:0], [])
    with pytest.raises(DiffalignError, match="features have 1 rows; this needs at least 2 pictures"):
        reward.score(pictures(1), ["a"])
