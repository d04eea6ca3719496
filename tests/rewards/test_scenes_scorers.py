"""The shipped tiny scorers: their contract, gradients, shared network, and that they see what they should."""

import copy
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.errors import DiffalignError
from diffalign.rewards import Reward, load_reward
from diffalign.rewards.scenes_scorers import PREFERENCE, ScenesClip, ScenesEnsemble, ScenesPreference
from diffalign.samples import FOLDER, scenes
from diffalign.samples.scenes import Placed, draw

NAMES = ("scenes-clip", "scenes-aesthetic", "scenes-preference", "scenes-ensemble")


def tensor(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255


def rendered(count, seed):
    rng = np.random.default_rng(seed)
    drawn = [scenes.random_scene(rng) for _ in range(count)]
    placed = [scenes.place(scenes.complete_scene(scene, rng), rng) for scene in drawn]
    return torch.stack([tensor(draw(p)) for p in placed]), [scenes.caption(scene) for scene in drawn]


@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    reward = load_reward(name)
    assert isinstance(reward, Reward)
    assert (reward.name, reward.modality, reward.kind, reward.differentiable) == (
        name,
        "image",
        "sample",
        True,
    )
    assert reward.facts.scale
    assert reward.facts.backbone
    assert not any(p.requires_grad for p in reward.parameters())
    assert not reward.training
    pictures, captions = rendered(3, 0)
    output = reward.score(pictures.half(), captions)
    assert output.mean.shape == (3,)
    assert output.mean.dtype == torch.float32
    assert output.mean.isfinite().all()
    with pytest.raises(DiffalignError, match="empty"):
        reward.score(pictures[:0], [])
    with pytest.raises(DiffalignError, match="3 pictures and 2 prompts"):
        reward.score(pictures, captions[:2])


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_the_batch(name):
    reward = load_reward(name)
    pictures, captions = rendered(4, 1)
    alone = torch.cat([reward.score(pictures[i : i + 1], captions[i : i + 1]).mean for i in range(4)])
    torch.testing.assert_close(reward.score(pictures, captions).mean, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name):
    # A copy, since the network is shared by all scorers of the folder.
    reward = copy.deepcopy(load_reward(name)).double()
    draws = torch.Generator().manual_seed(0)
    pictures = 0.2 + 0.6 * torch.rand(1, 3, 64, 64, generator=draws, dtype=torch.float64)
    direction = torch.randn(pictures.shape, generator=draws, dtype=torch.float64)
    score = lambda x: double_score(reward, x, ["a red circle"])  # noqa: E731
    pictures.requires_grad_()
    (gradient,) = torch.autograd.grad(score(pictures), pictures)
    step = 1e-6
    with torch.no_grad():
        numeric = (score(pictures + step * direction) - score(pictures - step * direction)) / (2 * step)
    assert gradient.abs().max() > 0
    assert (gradient * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-4, abs=1e-8)


def double_score(reward, pictures, prompts):
    """The score before it is rounded to float32."""
    images, texts = reward.clip.embed_images(pictures), reward.clip.embed_texts(prompts)
    if reward.name == "scenes-clip":
        return (images * texts).sum()
    if reward.name == "scenes-aesthetic":
        return reward.head(images).sum()
    return reward.head(images, texts)[0][:, 0, 0].mean()


def test_gradients_reach_the_pixels_through_score():
    pictures, captions = rendered(2, 2)
    pictures = torch.nn.functional.interpolate(pictures, size=96).requires_grad_()
    for name in NAMES:
        (gradient,) = torch.autograd.grad(load_reward(name).score(pictures, captions).mean.sum(), pictures)
        assert gradient.abs().sum() > 0, name


def test_members_share_one_network_and_are_the_parts_of_the_ensemble():
    ensemble = ScenesEnsemble()
    members = [ScenesPreference(member=i) for i in range(5)]
    assert all(member.clip is ensemble.clip for member in members)
    pictures, captions = rendered(6, 3)
    output = ensemble.score(pictures, captions)
    rows = torch.stack([member.score(pictures, captions).mean for member in members])
    assert list(output.parts) == [f"member-{i}" for i in range(5)]
    torch.testing.assert_close(torch.stack(list(output.parts.values())), rows)
    torch.testing.assert_close(output.mean, rows.mean(0))
    torch.testing.assert_close(output.std, rows.std(0))
    assert (output.std > 0).all()
    torch.testing.assert_close(load_reward("scenes-preference").score(pictures, captions).mean, rows[0])


def test_another_member_is_refused():
    with pytest.raises(DiffalignError, match=r"member 5; .* members 0 to 4"):
        ScenesPreference(member=5)
    with pytest.raises(DiffalignError, match="member -1"):
        load_reward({"reward": "scenes-preference", "member": -1})


def test_another_folder_and_a_changed_file_are_read(tmp_path):
    folder = tmp_path / "scorers"
    shutil.copytree(FOLDER / "scorers", folder)
    pictures, captions = rendered(2, 4)
    before = ScenesEnsemble(str(folder)).score(pictures, captions).mean
    torch.testing.assert_close(before, ScenesEnsemble().score(pictures, captions).mean)
    state = load_file(folder / PREFERENCE)
    save_file({**state, "second_bias": state["second_bias"] + 1}, folder / PREFERENCE)
    with pytest.raises(DiffalignError, match="no preference model"):
        ScenesEnsemble(str(folder))
    (folder / PREFERENCE).unlink()
    with pytest.raises(DiffalignError, match=r"no file of weights at .*preference\.safetensors"):
        ScenesEnsemble(str(folder))
    shutil.rmtree(folder / "clip")
    with pytest.raises(DiffalignError, match="no CLIP"):
        ScenesClip(str(folder))


def test_clip_knows_colours_and_shapes_it_was_trained_on():
    reward = load_reward("scenes-clip")
    circle = draw((Placed("circle", "red", 30, 34, 11),))
    captions = ["a red circle", "a blue circle", "a red star", "a yellow square"]
    scores = reward.score(tensor(circle).expand(4, 3, 64, 64), captions).mean
    assert scores.argmax() == 0
    assert scores[1:3].min() > scores[3]


def test_clip_tells_the_right_caption_from_another():
    reward = load_reward("scenes-clip")
    pictures, captions = rendered(120, 5)
    right = reward.score(pictures, captions).mean
    wrong = reward.score(pictures, captions[1:] + captions[:1]).mean
    assert (right > wrong).float().mean() > 0.9


def test_aesthetic_prefers_clean_pictures_whatever_the_prompt():
    from diffalign.samples.degrade import degrade

    reward = load_reward("scenes-aesthetic")
    pictures, captions = rendered(60, 6)
    broken = degrade(pictures, torch.Generator().manual_seed(0), 3.0)
    clean_score = reward.score(pictures, captions).mean
    assert (clean_score > reward.score(broken, captions).mean).float().mean() > 0.7
    assert torch.equal(clean_score, reward.score(pictures, captions[::-1]).mean)


def test_dropout_layers_are_there_for_mc_dropout():
    pictures, captions = rendered(3, 7)
    for name in ("scenes-aesthetic", "scenes-preference"):
        output = load_reward({"reward": "mc-dropout", "of": name, "passes": 4}).score(pictures, captions)
        assert (output.std > 0).all(), name


def test_the_ensemble_can_be_aggregated_by_its_parts():
    pictures, captions = rendered(3, 8)
    parts = [f"member-{i}" for i in range(5)]
    worst = load_reward({"reward": "wco", "of": "scenes-ensemble", "members": parts}).score(
        pictures, captions
    )
    rows = torch.stack(list(ScenesEnsemble().score(pictures, captions).parts.values()))
    torch.testing.assert_close(worst.mean, rows.amin(0))
