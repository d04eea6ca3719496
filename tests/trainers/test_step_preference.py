"""D3PO, SPO and LPO on rollouts of a tiny random SD: data, start, gradients, learning, resuming, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pair_world import counted_forwards, move_weights, open_model
from safetensors.torch import load_file

from diffalign.config import RunConfig, with_trainer_defaults
from diffalign.data.rollouts import PROMPTS_PER_SHARD, RolloutStore, store_rollouts
from diffalign.data.shards import CorruptShard
from diffalign.data.step_pairs import candidate_pairs, trajectory_pairs
from diffalign.engine import train
from diffalign.errors import DiffalignError
from diffalign.objectives.transitions import step_log_ratio
from diffalign.progress import Reporter
from diffalign.randomness import Draw
from diffalign.rewards import FunctionReward
from diffalign.sampling.rollout import policy_transition, replay
from diffalign.trainers.step_preference import StepPreferenceConfig, StepPreferenceTrainer, thresholds

PROMPTS = ("a red circle", "two blue squares", "a green star")
ROLLOUTS = {"prompts": 3, "held_out_prompts": 0, "samples": 3, "steps": 4, "guidance": 3.0, "batch_size": 6}
FORMS = ("d3po", "spo", "lpo")


def redness(pictures: torch.Tensor, prompts: Any) -> torch.Tensor:
    """How red a picture is: something a random model's pictures differ in, times a large number."""
    return 1000 * (pictures[:, 0] - pictures[:, 1]).flatten(1).mean(1)


def config_of(form: str, **options: Any) -> StepPreferenceConfig:
    return StepPreferenceConfig(
        form=form, reward="unused", rollouts=ROLLOUTS, **{"threshold": 0.0, "time_range": (0, 1)} | options
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where rollouts are kept for all tests of this file."""
    return tmp_path_factory.mktemp("rollouts")


@pytest.fixture
def make(tiny_sd, folder):
    """Opens a trainer with its rollouts, which are drawn once per kind."""

    def build(form: str, **options: Any) -> StepPreferenceTrainer:
        backbone, config = open_model(tiny_sd), config_of(form, **options)
        trainer = StepPreferenceTrainer(config, backbone)
        job = trainer.job(config, backbone, PROMPTS, 0)
        key = job.key("tiny")
        store = store_rollouts(folder / key, backbone, job, FunctionReward(redness), key=key)
        trainer.prepare(trainer.pairs(config, backbone, store))
        return trainer

    return build


def batch_of(trainer: StepPreferenceTrainer, count: int = 4):
    rows = list(range(count))
    return trainer.fetch(Draw(0, 0, rows, rows, count))


# The data


def test_stored_trajectories_are_what_was_drawn(make):
    trainer = make("d3po")
    store = trainer._pairs.store
    assert store.rewards.shape == (3, 3)
    # SD's last step goes to timestep 0, which has noise: all four have a density.
    assert store.read("latents", 2).shape == (3, 5, 4, 8, 8)
    drawn = store.rollout([0, 1])
    assert drawn.seeds == tuple(store.read("seeds", 0).tolist() + store.read("seeds", 1).tolist())
    # The pictures of a prompt start from the same latents.
    assert torch.equal(drawn.latents[0, 0], drawn.latents[0, 2])
    assert torch.equal(replay(trainer.backbone, drawn), drawn.log_probs)
    pictures = trainer.backbone.decode(drawn.clean).detach()
    torch.testing.assert_close(redness(pictures, ()), store.rewards[:2].flatten(), atol=1e-2, rtol=1e-3)


def test_pairs_of_trajectories_are_best_and_worst_at_every_step(make):
    pairs = make("d3po")._pairs
    assert len(pairs) == 3 * 4
    rewards = pairs.store.rewards
    for prompt, step, chosen, rejected in pairs.rows.tolist():
        assert rewards[prompt, chosen] == rewards[prompt].max()
        assert rewards[prompt, rejected] == rewards[prompt].min()
        assert 0 <= step < 4
    assert len(trajectory_pairs(pairs.store, [0, 1], "all")) == 3 * 3 * 2
    with pytest.raises(DiffalignError, match="have the same reward"):
        trajectory_pairs(pairs.store, [0], min_gap=1e9)


def test_pairs_of_candidates_are_those_whose_scores_differ(make):
    pairs = make("spo")._pairs
    scores = pairs.store.scores
    assert scores.shape == (3, 4, 3)
    for prompt, place, chosen, rejected in pairs.rows.tolist():
        assert scores[prompt, place, chosen] == scores[prompt, place].max()
        assert scores[prompt, place, rejected] == scores[prompt, place].min()
    # tanh(gap / 2) > 0.5 is a gap above log 3.
    gaps = scores.amax(2) - scores.amin(2)
    scale = math.log(3) / float(gaps.flatten().median())
    half = candidate_pairs(pairs.store, [0.5] * 4, scale)
    assert len(half) == int((gaps > gaps.flatten().median()).sum())
    with pytest.raises(DiffalignError, match=r"differs by .* raise trainer\.reward_scale"):
        candidate_pairs(pairs.store, [0.5] * 4, 1e-9)


def test_spo_leaves_out_the_noisiest_steps(make):
    # Times 751, 501, 251, 1.
    store = make("spo", time_range=(0.0, 0.75))._pairs.store
    assert store.schedule.times.tolist() == [751, 501, 251, 1, 0]
    assert store.steps == [1, 2, 3]
    with pytest.raises(DiffalignError, match=r"time_range is \[0.8, 0.9\]"):
        make("spo", time_range=(0.8, 0.9))


def test_an_interrupted_job_goes_on_where_it_stopped(tiny_sd, tmp_path):
    backbone, config = open_model(tiny_sd), config_of("d3po")
    prompts = tuple(f"shape {i}" for i in range(PROMPTS_PER_SHARD + 1))
    small = config.model_copy(
        update={"rollouts": config.rollouts.model_copy(update={"steps": 1, "samples": 2})}
    )
    job = StepPreferenceTrainer.job(small, backbone, prompts, 0)
    key, calls = job.key("tiny"), []

    def reward(stop_at: int):
        def score(pictures, prompts):
            calls.append(len(pictures))
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return redness(pictures, prompts)

        return FunctionReward(score)

    first_shard = math.ceil(2 * PROMPTS_PER_SHARD / job.sampler.batch_size)
    with pytest.raises(KeyboardInterrupt):
        store_rollouts(tmp_path, backbone, job, reward(first_shard + 1), key=key)
    with pytest.raises(CorruptShard, match="no complete rollouts"):
        RolloutStore.open(tmp_path, key)
    calls.clear()
    store = store_rollouts(tmp_path, backbone, job, reward(0), key=key)
    assert calls == [2]
    assert len(store) == PROMPTS_PER_SHARD + 1
    with pytest.raises(CorruptShard, match="belongs to cache"):
        RolloutStore.open(tmp_path, job.key("another model"))


def test_every_choice_is_part_of_the_key(tiny_sd):
    backbone = open_model(tiny_sd)
    job = StepPreferenceTrainer.job(config_of("spo"), backbone, PROMPTS, 0)
    others = [
        replace(job, samples=4),
        replace(job, seed=1),
        replace(job, guidance=4.0),
        replace(job, prompts=PROMPTS[:2]),
        replace(job, steps=(0,)),
        replace(job, sampler=replace(job.sampler, kernel=replace(job.sampler.kernel, noise=0.5))),
    ]
    assert len({each.key("m") for each in (job, *others)} | {job.key("n")}) == len(others) + 2


def test_scores_must_be_finite(tiny_sd, tmp_path):
    backbone = open_model(tiny_sd)
    job = StepPreferenceTrainer.job(config_of("d3po"), backbone, PROMPTS[:1], 0)
    broken = FunctionReward(lambda pictures, prompts: [float("nan")] * len(pictures), "broken")
    with pytest.raises(DiffalignError, match="not finite"):
        store_rollouts(tmp_path, backbone, job, broken, key="k")


# The loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clip", [0.1, None])
def test_the_start_is_margin_zero_and_log_two(make, form, clip):
    trainer = make(form, clip=clip)
    losses, metrics = trainer.loss(batch_of(trainer))
    assert metrics["margin"].tolist() == [0] * 4
    assert losses.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-7)
    losses.mean().backward()
    assert any(
        p.grad.abs().max() > 0 for _, p in trainer.backbone.trainable_parameters() if p.grad is not None
    )


@pytest.mark.parametrize(("form", "forwards"), [("d3po", [16, 16]), ("spo", [8, 8])])
def test_one_forward_each_of_policy_and_reference(make, form, forwards):
    """Four pairs with guidance: two branches, and two states where each trajectory has its own."""
    trainer = make(form)
    batch = batch_of(trainer)
    with counted_forwards(trainer.backbone) as calls:
        trainer.loss(batch)
    assert [len(call["x_t"]) for call in calls] == forwards


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clip", [0.1, None])
def test_loss_and_gradient_are_those_of_two_forwards_each(make, form, clip):
    """The releases' form: log-probabilities of chosen and rejected from a forward of their own, subtracted."""
    trainer = make(form, clip=clip, beta=3.0)
    backbone, batch = trainer.backbone, batch_of(trainer)
    move_weights(backbone, 0.01)
    parameters = [p for _, p in backbone.trainable_parameters()]
    losses, metrics = trainer.loss(batch)
    ours = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
    starts = (batch.x_t, batch.x_t) if batch.shared else batch.x_t.chunk(2)
    ratios = []
    for x_t, x_prev in zip(starts, (batch.chosen, batch.rejected), strict=True):
        inputs = (backbone, trainer._kernel, x_t, batch.t, batch.t_prev, batch.told)
        policy, reference = policy_transition(*inputs), policy_transition(*inputs, reference=True)
        # In float64, since the difference of two log-probabilities loses the digits that a margin is made of.
        log_p = replace(policy, mean=policy.mean.double(), std=policy.std.double()).log_prob(x_prev.double())
        log_r = replace(reference, mean=reference.mean.double(), std=reference.std.double())
        ratios.append(log_p - log_r.log_prob(x_prev.double()))
        assert ratios[-1].tolist() == pytest.approx(
            step_log_ratio(x_prev, policy.mean, reference.mean, policy.std).tolist(), abs=1e-5, rel=1e-3
        )
    if clip is not None:
        ratios = [ratio.clamp(math.log(1 - clip), math.log(1 + clip)) for ratio in ratios]
    naive = -F.logsigmoid(3.0 * (ratios[0] - ratios[1]))
    torch.testing.assert_close(losses.double(), naive, atol=1e-5, rtol=1e-4)
    theirs = torch.autograd.grad(naive.mean(), parameters, allow_unused=True)
    scale = max(float(g.abs().max()) for g in theirs if g is not None)
    for mine, other in zip(ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, atol=1e-3 * scale, rtol=1e-2)
    assert metrics["margin"].abs().min() > 0


def test_sums_are_means_times_the_elements(make):
    mean, total = make("spo", beta=2.0, clip=None), make("spo", beta=2.0 / 256, reduction="sum", clip=None)
    for trainer in (mean, total):
        move_weights(trainer.backbone, 0.01)
    expected, found = mean.loss(batch_of(mean))[0], total.loss(batch_of(total))[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", ["d3po", "spo"])
def test_implicit_accuracy_of_stored_steps_rises(make, form):
    trainer = make(form, beta=10.0)
    parameters = [p for _, p in trainer.backbone.trainable_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    batch = batch_of(trainer, 6)
    values = []
    for _ in range(8):
        losses, _ = trainer.loss(batch)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        values.append(float(losses.detach().mean()))
    assert values[-1] < values[0] == pytest.approx(math.log(2), abs=1e-6)
    assert int((trainer.margin(batch) > 0).sum()) >= 5


# The engine


def test_a_run_draws_its_data_and_resumes_to_the_bit(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setattr("diffalign.engine.rollout_assembly.load_reward", lambda spec: FunctionReward(redness))
    said: list[str] = []

    def run(name: str, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        values = {
            "name": name,
            "output_dir": str(tmp_path / "runs"),
            "model": {"path": str(tiny_sd), "precision": "fp32"},
            "data": {
                "source": "scenes:preferences",
                "held_out": "scenes:preferences",
                "resolution": 64,
                "cache_dir": str(tmp_path / "cache"),
            },
            "trainer": {
                "method": "step_preference",
                "reward": "unused",
                "rollouts": ROLLOUTS | {"prompts": 2, "held_out_prompts": 1, "steps": 3},
                "threshold": 0.0,
            },
            "optim": {"lr": 1e-3, "steps": steps, "batch_size": 2},
        }
        reporter = Reporter(enabled=False)
        monkeypatch.setattr(reporter, "say", said.append)
        result = train(RunConfig.model_validate(values), resume=resume, reporter=reporter)
        assert result.step == steps
        assert 0 <= result.metrics["held_out/implicit_accuracy"] <= 1
        return load_file(tmp_path / "runs" / name / "final" / "trainable.safetensors")

    whole = run("whole", 2)
    folders = sorted((tmp_path / "cache").glob("rollouts-*"))
    assert len(folders) == 2
    stamps = [file.stat().st_mtime_ns for folder in folders for file in sorted(folder.iterdir())]
    run("parts", 1)
    parts = run("parts", 2, resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert stamps == [file.stat().st_mtime_ns for folder in folders for file in sorted(folder.iterdir())]
    assert any("2 prompts' rollouts" in line for line in said)


def test_the_form_fills_in_its_authors_values():
    def filled(**options: Any) -> dict[str, Any]:
        values = {
            "name": "x",
            "model": {"path": "m"},
            "data": {"source": "s", "resolution": 64},
            "trainer": {"method": "step_preference", "reward": "clip", **options},
            "optim": {"lr": 1.0, "steps": 1, "batch_size": 1},
        }
        return with_trainer_defaults(RunConfig.model_validate(values)).trainer

    assert (filled(form="d3po")["beta"], filled(form="d3po")["time_range"]) == (0.1, [0.0, 1.0])
    assert (filled(form="spo")["beta"], filled(form="spo")["time_range"]) == (10.0, [0.0, 0.75])
    assert (filled(form="lpo")["beta"], filled(form="lpo")["threshold"]) == (500.0, [0.35, 0.5])
    assert filled(form="lpo", beta=20)["beta"] == 20
    with pytest.raises(DiffalignError, match=r"trainer\.time_range.*rising"):
        filled(time_range=[0.5, 0.5])
    with pytest.raises(DiffalignError, match=r"trainer\.reward: is None"):
        filled(reward=None)


def test_thresholds_follow_the_noise_of_a_step():
    # 0.35 + 0.15 (s - 0.1) / 0.4
    found = thresholds((0.35, 0.5), torch.tensor([0.5, 0.3, 0.1]))
    assert found == pytest.approx([0.5, 0.425, 0.35])
    assert thresholds(0.3, torch.tensor([0.5, 0.1])) == pytest.approx([0.3, 0.3])


def test_flow_kernels_are_refused_before_anything_is_drawn(tiny_sd):
    config = config_of("spo")
    options = config.rollouts.model_copy(update={"kernel": "flow_sde"})
    with pytest.raises(DiffalignError, match=r"not a flow; .*trainer\.rollouts\.kernel"):
        StepPreferenceTrainer.job(
            config.model_copy(update={"rollouts": options}), open_model(tiny_sd), PROMPTS, 0
        )
