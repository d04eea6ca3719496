"""Trained rewards of noisy latents as scorers: gradients, attachment, guidance, rollouts, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from few_steps import PROMPTS, Redness
from safetensors.torch import save_file
from steered import problem

from diffalign.backbones import model_fingerprint, open_backbone
from diffalign.config import ModelConfig
from diffalign.data.rollouts import RolloutJob, store_rollouts
from diffalign.errors import DiffalignError
from diffalign.inference.config import GenerationConfig
from diffalign.inference.latent_reward import LatentReward
from diffalign.inference.run import optimize
from diffalign.inference.steering.noisy_reward import Scored
from diffalign.inference.steering.walk import Walk
from diffalign.rewards import Reward, load_reward
from diffalign.samples import FOLDER
from diffalign.sampling.latent_scorer import HeadSpec, LatentHead
from diffalign.sampling.rollout import Sampler
from diffalign.sampling.schedules import schedule_of
from diffalign.sampling.step_scores import StepReward
from diffalign.sampling.transition import Kernel

FEW = GenerationConfig(steps=4, guidance=0.0, batch_size=8, distilled=True)


def opened(path: Any, **options: Any) -> Any:
    return open_backbone(
        ModelConfig(path=str(path), precision="fp32", **options), device="cpu", resolution=64
    )


def written(folder: Path, model: Path, layer: str, states: int, caption: int, shape: Any) -> Path:
    """What a finished run leaves, with a lively head."""
    final = folder / "final"
    final.mkdir(parents=True)
    torch.manual_seed(0)
    head = LatentHead(HeadSpec(states, caption, hidden=8))
    state = {name: 0.5 * torch.randn(value.shape) for name, value in head.state_dict().items()}
    save_file(state, final / "trainable.safetensors")
    facts = {
        "name": folder.name,
        "model": {"path": str(model)},
        "fingerprint": model_fingerprint(ModelConfig(path=str(model)), network=True),
        "latent_shape": list(shape),
        "resolution": 64,
        "layer": layer,
        "guidance": 2.0,
        "head": head.spec.__dict__,
    }
    (final / "latent_reward.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def run(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("runs") / "judge", tiny_sdxl, "mid_block", 16, 12, (4, 16, 16))


@pytest.fixture(scope="module")
def flow(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "flow"
    return written(folder, tiny_sd3, "transformer_blocks.0", 16, 28, (4, 16, 16))


@pytest.mark.parametrize("which", ["run", "flow"])
def test_gradients_are_those_of_finite_differences(which: str, request: Any) -> None:
    reward: Any = load_reward(str(request.getfixturevalue(which)))
    assert isinstance(reward, Reward)
    assert isinstance(reward, StepReward)
    generator = reward._opened()
    torch.manual_seed(0)
    x = torch.randn(2, 4, 16, 16)
    t = generator.process.times(torch.tensor([0.3, 0.7]))
    inside = x.clone().requires_grad_()
    scores = reward.score_step(inside, t, PROMPTS)
    assert scores.shape == (2,)
    (gradient,) = torch.autograd.grad(scores.sum(), inside)
    # Along the gradient itself, where the change is largest against the rounding of float32.
    step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1).reshape(2, 1, 1, 1)
    with torch.no_grad():
        change = reward.score_step(x + step, t, PROMPTS) - reward.score_step(x - step, t, PROMPTS)
    expected = 2 * (gradient * step).flatten(1).sum(1)
    torch.testing.assert_close(change, expected, rtol=0.02, atol=1e-5)


def test_scores_follow_latents_times_and_prompts_and_not_the_batch(run: Path) -> None:
    reward = LatentReward(str(run))
    torch.manual_seed(0)
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([100, 800])
    both = reward.score_step(x, t, PROMPTS)
    alone = torch.cat([reward.score_step(x[i : i + 1], t[i : i + 1], PROMPTS[i : i + 1]) for i in (0, 1)])
    torch.testing.assert_close(alone, both, atol=1e-5, rtol=0)
    assert float((reward.score_step(x, t.flip(0), PROMPTS) - both).abs().min()) > 1e-4
    assert float((reward.score_step(x, t, PROMPTS[::-1]) - both).abs().min()) > 1e-5
    # A negative time is clean.
    assert reward.score_step(x, torch.tensor([-1, -1]), PROMPTS).isfinite().all()


def test_pictures_are_scored_by_their_clean_latents(run: Path) -> None:
    reward = LatentReward(str(run))
    pictures = torch.rand(2, 3, 64, 64)
    output = reward.score(pictures, PROMPTS)
    latents, _ = reward._opened().encode(pictures * 2 - 1)
    expected = reward.score_step(latents, torch.zeros(2, dtype=torch.long), PROMPTS)
    torch.testing.assert_close(output.mean, expected)
    assert not reward.differentiable
    with pytest.raises(DiffalignError, match=r"pictures of 64x64 pixels.*got 32x64"):
        reward.score(torch.rand(1, 3, 32, 64), ["x"])


def test_a_run_with_adapters_lends_its_untuned_network(run: Path, tiny_sdxl: Path) -> None:
    backbone, alone = opened(tiny_sdxl), LatentReward(str(run))
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([100, 800])
    with torch.no_grad():
        for _, weight in backbone.trainable_parameters():
            weight += 0.1
    attached = LatentReward(str(run))
    attached.attach(backbone)
    assert attached._generator is backbone
    torch.testing.assert_close(attached.score_step(x, t, PROMPTS), alone.score_step(x, t, PROMPTS))
    # Weights that are all trained are no longer those it was trained on; it opens its own.
    attached.attach(opened(tiny_sdxl, tune="full"))
    assert attached._generator is None


def test_other_generators_are_refused(run: Path, tiny_sd: Path, tiny_sd3: Path) -> None:
    reward = LatentReward(str(run))
    with pytest.raises(DiffalignError, match=r"reads latents of shape \(4, 16, 16\).*has \(4, 8, 8\)"):
        reward.attach(opened(tiny_sd))
    with pytest.raises(DiffalignError, match=r"another one\. Take that generator"):
        reward.attach(opened(tiny_sd3))


def guided(path: Path, reward: Any, **method: Any) -> Any:
    method = {"method": "noisy_reward", **method}
    options = {"generation": FEW, "baseline": "none"}
    return optimize(opened(path), PROMPTS, Redness() if reward is None else reward, method=method, **options)


def test_the_pull_is_the_gradient_at_the_states_own_time(run: Path, tiny_sdxl: Path) -> None:
    """And the prediction is the network's, without gradients."""
    backbone, reward = opened(tiny_sdxl), LatentReward(str(run))
    reward.attach(backbone)
    found, _ = problem(backbone, Redness(), PROMPTS, 4)
    walk, x = Walk(found), torch.randn(2, 4, 16, 16)
    pull = Scored(reward)(walk, x, 2, [1, 0])
    t = found.generation.sampler.schedule.times[2].repeat(2)
    inside = x.clone().requires_grad_()
    scores = reward.score_step(inside, t, PROMPTS[::-1])
    torch.testing.assert_close(pull.gradient, torch.autograd.grad(scores.sum(), inside)[0])
    torch.testing.assert_close(pull.rewards, scores.detach())
    assert not pull.prediction.requires_grad
    assert not pull.through


def test_a_run_guides_by_its_folder(run: Path, tiny_sdxl: Path) -> None:
    plain, moved = (guided(tiny_sdxl, None, scorer=str(run), strength=s, clip=1.0) for s in (0.0, 200.0))
    assert torch.equal(plain.trajectory[-1].rewards, plain.rewards["before"])
    assert (moved.trajectory[-1].rewards != plain.trajectory[-1].rewards).all()


def test_guidance_by_another_generators_reward_is_refused(flow: Path, tiny_sdxl: Path) -> None:
    with pytest.raises(DiffalignError, match="train a latent_reward on this one"):
        guided(tiny_sdxl, None, scorer=str(flow))


def test_candidates_of_rollouts_are_scored_without_decoding(
    run: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    backbone, reward = opened(tiny_sdxl), LatentReward(str(run))
    sampler = Sampler(schedule_of(backbone, 3), Kernel("ddim", 1.0))
    job = RolloutJob("candidates", tuple(PROMPTS), 2, sampler)
    store = store_rollouts(tmp_path, backbone, job, reward, key="k")
    assert reward._generator is backbone
    assert store.scores.shape == (2, len(store.steps), 2)
    first, number = store.read("candidates", 0)[0], store.steps[0]
    t = sampler.schedule.times[number + 1].repeat(2)
    torch.testing.assert_close(
        store.scores[0, 0], reward.score_step(first, t, [PROMPTS[0]] * 2).detach(), atol=1e-4, rtol=1e-4
    )


def test_folders_of_runs_are_rewards_or_say_what_they_hold(run: Path, tmp_path: Path) -> None:
    assert load_reward(str(run)).name == load_reward(f"latent@{run / 'final'}").name == "latent:judge"
    other = tmp_path / "dpo"
    other.mkdir()
    with pytest.raises(DiffalignError, match="holds no run; expected a finished run"):
        load_reward(str(other))
    (other / "config.yaml").write_text("trainer: {method: dpo}\n")
    with pytest.raises(DiffalignError, match=r"is a run of trainer\.method dpo, which trains a generator"):
        load_reward(str(other))
    (other / "config.yaml").write_text("trainer: {method: latent_reward}\n")
    with pytest.raises(DiffalignError, match=r"latent_reward that is not finished"):
        LatentReward(str(other))
    without = tmp_path / "without"
    shutil.copytree(run, without)
    (without / "final" / "trainable.safetensors").unlink()
    with pytest.raises(DiffalignError, match=r"has a latent_reward.json, but no trainable.safetensors"):
        LatentReward(str(without))
    with pytest.raises(DiffalignError, match="holds the reward latent@"):
        load_reward(f"trained@{run}")
    with pytest.raises(DiffalignError, match="is no folder"):
        LatentReward(str(tmp_path / "nothing"))


def test_damaged_files_are_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    facts = json.loads((copy / "final" / "latent_reward.json").read_text())
    (copy / "final" / "latent_reward.json").write_text(
        json.dumps({**facts, "head": {**facts["head"], "states": 9}})
    )
    with pytest.raises(DiffalignError, match="do not fit LatentHead"):
        LatentReward(str(copy))
    del facts["layer"]
    (copy / "final" / "latent_reward.json").write_text(json.dumps(facts))
    with pytest.raises(DiffalignError, match=r"latent_reward.json is damaged \(KeyError: 'layer'\)"):
        LatentReward(str(copy))


def test_the_shipped_one_is_small_and_fits_the_shipped_generator() -> None:
    reward: Any = load_reward("scenes-latent")
    assert reward.name == "scenes-latent"
    files = list((FOLDER / "scorers" / "latent").iterdir())
    assert sum(file.stat().st_size for file in files) < 200_000
    reward.attach(opened("scenes:tiny-sdxl"))
    with pytest.raises(DiffalignError, match="scenes:tiny-sdxl"):
        reward.attach(opened("scenes:tiny-sd3"))
