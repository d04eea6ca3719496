"""Reward models through the engine: exact starting points, ensembles, ties, resume, the finished reward."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clip_world import WIDTH, random_clip, scorer_config, write_pairs
from safetensors.torch import load_file

from diffalign.config import trainer_config
from diffalign.data.features import JudgedPairs, open_store
from diffalign.data.judged import ANYBODY, judgements
from diffalign.data.sources import open_source
from diffalign.engine import train
from diffalign.engine.assembly import open_data
from diffalign.engine.parallel import Parallel
from diffalign.engine.scorer_assembly import ClipOnce, ScorerBackbone, open_judged, predict
from diffalign.errors import DiffalignError
from diffalign.objectives.reward_model import bradley_terry_loss
from diffalign.plan import plan_run
from diffalign.progress import Reporter
from diffalign.randomness import Draw
from diffalign.rewards import load_reward
from diffalign.rewards.clip_model import load_clip
from diffalign.rewards.heads import PreferenceSpec, build_head, spec_from_dict, spec_to_dict
from diffalign.rewards.preference_head import RewardNetwork, TrainedReward
from diffalign.trainers.reward_model import RewardModelConfig, RewardModelTrainer, member_weights

COUNT = 48
CPU = torch.device("cpu")
QUIET = Reporter(enabled=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A folder for runs, a random CLIP, and pairs whose redder picture is preferred."""
    folder = tmp_path_factory.mktemp("scorers")
    return folder, random_clip(folder / "clip"), write_pairs(folder / "pairs", COUNT)


def config_of(world, tmp_path, *overrides):
    folder, clip, pairs = world
    places = (f"output_dir={tmp_path}", f"data.cache_dir={folder / 'cache'}")
    return scorer_config(tmp_path, clip, pairs, *places, *overrides)


def pairs_of(world, tmp_path, *overrides) -> JudgedPairs:
    config = config_of(world, tmp_path, *overrides)
    return open_judged(config, ClipOnce(config, CPU), builder=True)[0]


def trainer_on(pairs, seed=0, **options) -> RewardModelTrainer:
    config = RewardModelConfig(**options)
    names = pairs.judgements.names
    spec = RewardModelTrainer.spec(config, pairs.store.width, math.exp(pairs.store.logit_scale), names, seed)
    trainer = RewardModelTrainer(config, ScorerBackbone(RewardNetwork(build_head(spec))), seed)
    trainer.prepare(pairs)
    return trainer


def whole(pairs) -> Draw:
    return Draw(0, 0, range(len(pairs)), range(len(pairs)), len(pairs))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "trainable.safetensors")


def test_bilinear_head_starts_as_the_clip_itself(world, tmp_path):
    pairs = pairs_of(world, tmp_path)
    batch = pairs.fetch(whole(pairs))
    losses, metrics = trainer_on(pairs, members=3, resampling="none").loss(batch)
    similarity = math.exp(pairs.store.logit_scale) * (batch.images * batch.texts).sum(-1)
    margin = similarity[:, 0] - similarity[:, 1]
    assert torch.allclose(metrics["margin"], margin, atol=1e-5)
    assert torch.allclose(losses, bradley_terry_loss(margin, torch.ones(len(pairs))), atol=1e-5)


def test_embeddings_are_the_clips_and_the_chosen_picture_comes_first(world, tmp_path):
    pairs = pairs_of(world, tmp_path)
    clip, record = load_clip(str(world[1])), open_source(str(world[2]))[int(pairs.judgements.records[3])]
    from diffalign.data.images import load_picture

    pixels = torch.stack(
        [load_picture(image, 64).pixels / 2 + 0.5 for image in (record.chosen, record.rejected)]
    )
    batch = pairs.fetch(Draw(0, 0, [3], [0], 1))
    assert torch.allclose(batch.images[0], clip.embed_images(pixels), atol=1e-6)
    assert torch.allclose(batch.texts[0, 0], clip.embed_texts([record.prompt])[0], atol=1e-6)


def test_store_is_filled_once_and_continues_where_it_stopped(world, tmp_path):
    records = open_source(str(world[2]))
    config = config_of(world, tmp_path, f"data.cache_dir={tmp_path}", "data.shard_size=20").data
    clip, calls = load_clip(str(world[1])), []

    def opener():
        calls.append(1)
        return clip

    first = open_store(records, config, "tiny", opener)
    again = open_store(records, config, "tiny", opener)
    assert len(calls) == 1
    (first.folder / "images-00001.safetensors").unlink()
    repaired = open_store(records, config, "tiny", opener)
    assert len(calls) == 2
    for store in (again, repaired):
        assert all(torch.equal(a, b) for a, b in zip(first.images, store.images, strict=True))
    assert open_store(records, config, "another", opener).folder != first.folder


def test_broken_pictures_are_left_out_and_counted(world, tmp_path):
    source = write_pairs(tmp_path / "few", 6)
    (tmp_path / "few" / "2-a.png").write_bytes(b"no picture")
    config = config_of(world, tmp_path, f"data.source={source}", "data.ties=half")
    pairs, _ = open_judged(config, ClipOnce(config, CPU), builder=True)
    assert len(pairs) == 5
    assert [fault["record"] for fault in pairs.broken] == [2]


def test_ties_users_and_aspects(world, tmp_path):
    records = open_source(str(world[2]))
    data = config_of(world, tmp_path, "data.ties=half").data
    judged = judgements(records, data, ("overall", "darkness"))
    assert judged.names == ("user 0", "user 1", "user 2")
    assert judged.users[:4].tolist() == [0, 1, 2, 0]
    assert judged.preference[[0, 1], 0].tolist() == [0.5, 1.0]
    # Every second pair says that the rejected picture is the darker one; the others were not judged.
    assert judged.preference[1, 1] == 0.0
    assert judged.preference[0, 1].isnan()
    # Swapped labels turn everything round.
    swapped = judgements(records, data.model_copy(update={"labels": "swapped"}), ("overall", "darkness"))
    assert swapped.chosen[1] == 1 - judged.chosen[1]
    assert swapped.preference[1].tolist() == [1.0, 0.0]
    assert judgements(records, data, names=("user 2",)).users[:3].tolist() == [ANYBODY, ANYBODY, 0]
    with pytest.raises(DiffalignError, match="Did you mean 'darkness'"):
        judgements(records, data, ("darknes",))


def test_member_weights():
    assert member_weights(5, 2, "none", 0).tolist() == [[1, 1]] * 5
    folds = member_weights(9, 3, "folds", 0)
    # Each pair is left out by exactly one member, and each member leaves out three of nine.
    assert ((folds == 0).sum(1) == 1).all()
    assert (folds == 0).sum(0).tolist() == [3, 3, 3]
    assert torch.allclose(folds.mean(0), torch.ones(3))
    bootstrap = member_weights(4000, 2, "bootstrap", 0)
    assert bootstrap.mean(0).tolist() == pytest.approx([1, 1], abs=0.05)
    # e^-1 of the pairs are not drawn, and members draw differently.
    assert float((bootstrap == 0).float().mean()) == pytest.approx(math.exp(-1), abs=0.02)
    assert abs(float(torch.corrcoef(bootstrap.T)[0, 1])) < 0.06


def test_a_pair_teaches_only_members_that_drew_it(world, tmp_path):
    pairs = pairs_of(world, tmp_path)
    trainer = trainer_on(pairs, members=2, head="mlp", hidden=8, resampling="folds")
    draw = whole(pairs).slice(0, 6)
    trainer.loss(pairs.fetch(draw))[0].sum().backward()
    left_out = [i for i in range(6) if trainer._resampled[i, 0] == 0]
    head = trainer.backbone.core.head
    head.zero_grad()
    only = pairs.fetch(Draw(0, 0, left_out, left_out, 6))
    trainer.loss(only)[0].sum().backward()
    assert head.first.grad[0].abs().max() == 0
    assert head.first.grad[1].abs().max() > 0


def test_members_of_an_ensemble_train_as_if_alone(world, tmp_path):
    options = ("optim.clip=0", "optim.steps=6", "optim.weight_decay=0", "trainer.head=bilinear")
    two = train(config_of(world, tmp_path, *options, "trainer.members=2", "name=two"), reporter=QUIET)
    # The second member alone: its own bootstrap weights, everything else equal.
    pairs = pairs_of(world, tmp_path)
    alone = trainer_on(pairs)
    alone._resampled = member_weights(len(pairs), 2, "bootstrap", 0)[:, 1:]
    head = alone.backbone.core.head
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0)
    from diffalign.randomness import batch_records

    for step in range(6):
        draw = Draw(0, step, batch_records(0, step, 8, len(pairs)), range(8), 8)
        optimizer.zero_grad()
        alone.loss(alone.fetch(draw))[0].mean().backward()
        optimizer.step()
    together = weights_of(two.folder)["head.image_map"][1]
    assert torch.allclose(together, head.image_map[0], atol=2e-5)
    assert not torch.allclose(weights_of(two.folder)["head.image_map"][0], together, atol=1e-4)


def test_aspects_nobody_judged_teach_nothing(world, tmp_path):
    pairs = pairs_of(world, tmp_path, "data.ties=half", "trainer.dimensions=[overall,darkness]")
    trainer = trainer_on(pairs, dimensions=["overall", "darkness"])
    batch = pairs.fetch(whole(pairs).slice(0, 2))  # pair 0 has no label for darkness, pair 1 has
    losses, _ = trainer.loss(batch)
    losses[0].backward()
    assert trainer.backbone.core.head.image_map.grad[0, 1].abs().max() == 0
    assert losses.isfinite().all()
    trainer.loss(batch)[0][1].backward()
    assert trainer.backbone.core.head.image_map.grad[0, 1].abs().max() > 0


@pytest.mark.parametrize("loss", ["ties", "probit", "monte_carlo", "hpsv3"])
def test_every_loss_trains(world, tmp_path, loss):
    options = (
        "data.ties=half",
        f"trainer.loss={loss}",
        "trainer.members=2",
        "optim.steps=40",
        "trainer.samples=8",
    )
    result = train(config_of(world, tmp_path, *options), reporter=QUIET)
    assert result.skipped == 0
    assert result.metrics["held_out/accuracy"] > 0.65
    validation = json.loads((result.folder / "validation.json").read_text())
    spreads = {"ensemble"} if loss == "ties" else {"ensemble", "stated", "both"}
    expected = {"margin", *spreads, *(f"{name}_relative" for name in spreads)}
    assert set(validation["dimensions"]["overall"]["halves"]) == expected


def test_resume_gives_the_same_weights_to_the_bit(world, tmp_path):
    options = ("trainer.dropout=0.3", "trainer.members=2", "trainer.loss=monte_carlo", "trainer.samples=4")
    straight = train(config_of(world, tmp_path, *options, "name=straight"), reporter=QUIET)
    train(config_of(world, tmp_path, *options, "name=cut", "optim.steps=4"), reporter=QUIET)
    cut = train(config_of(world, tmp_path, *options, "name=cut"), resume=True, reporter=QUIET)
    a, b = weights_of(straight.folder), weights_of(cut.folder)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_run_folder_and_the_reward_in_it(world, tmp_path):
    result = train(config_of(world, tmp_path, "trainer.members=3", "optim.steps=30"), reporter=QUIET)
    for name in ("validation.json", "reliability-overall.png", "margin-overall.png", "metrics.jsonl"):
        assert (result.folder / name).is_file()
    reward = load_reward(f"trained@{result.folder}")
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    prompts = ["a red circle", "a blue square", "a red circle", "a star"]
    out = reward.score(pictures, prompts)
    members = torch.stack([out.parts[f"member_{i}"] for i in range(3)])
    assert torch.allclose(out.mean, members.mean(0))
    assert torch.allclose(out.std, members.std(0))
    out.mean.sum().backward()
    assert pictures.grad.abs().sum() > 0
    # One by one or together, from the run or from its final/: the same scores.
    other = TrainedReward(str(result.folder / "final"), clip=str(world[1]))
    single = torch.cat([other.score(pictures[i : i + 1], prompts[i : i + 1]).mean for i in range(4)])
    assert torch.allclose(single, out.mean, atol=1e-5)
    with pytest.raises(DiffalignError, match="no pictures"):
        reward.score(pictures[:0], [])


def test_members_are_normalised_on_held_out_pictures(world, tmp_path):
    result = train(config_of(world, tmp_path, "trainer.members=2"), reporter=QUIET)
    reward = load_reward(f"trained@{result.folder}")
    config = config_of(world, tmp_path, "trainer.members=2")
    _, held_out = open_judged(config, ClipOnce(config, CPU), builder=True)
    trainer = RewardModelTrainer(trainer_config(config), ScorerBackbone(reward.network))
    head_only = RewardNetwork(reward.network.head)
    scores = predict(trainer, head_only, held_out, CPU).scores.flatten(1, 2)[..., 0]
    normalised = (scores - reward.location) / reward.spread
    assert normalised.mean(1).tolist() == pytest.approx([0, 0], abs=1e-4)
    assert normalised.std(1).tolist() == pytest.approx([1, 1], abs=1e-4)


def test_dimensions_of_the_reward(world, tmp_path):
    options = ("trainer.dimensions=[overall,darkness]", "data.ties=half")
    result = train(config_of(world, tmp_path, *options), reporter=QUIET)
    path, pictures = str(result.folder), torch.rand(2, 3, 64, 64)
    overall, dark = (
        TrainedReward(path, weights=w).score(pictures, ["a star"] * 2) for w in (None, {"darkness": 2.0})
    )
    assert torch.allclose(overall.mean, overall.parts["overall"])
    assert torch.allclose(dark.mean, 2 * overall.parts["darkness"], atol=1e-6)
    assert "held_out/accuracy_darkness" in result.metrics
    with pytest.raises(DiffalignError, match="Did you mean 'darkness'"):
        TrainedReward(path, weights={"darknes": 1.0})


def test_whole_clip_is_trained_from_pictures(world, tmp_path):
    options = (
        "model.tune=full",
        "trainer.head=bilinear",
        "optim.steps=4",
        "optim.lr=1e-3",
        "checkpoint.every=2",
    )
    result = train(config_of(world, tmp_path, *options), reporter=QUIET)
    state = weights_of(result.folder)
    before = load_file(world[1] / "open_clip_model.safetensors")
    moved = {
        name
        for name in before
        if not torch.equal(before[name], state.get(f"clip.network.{name}", before[name]))
    }
    assert any("visual" in name for name in moved)
    assert any("transformer.resblocks" in name and "visual" not in name for name in moved)
    reward = load_reward(f"trained@{result.folder}")
    again = train(config_of(world, tmp_path, *options, "name=cut", "optim.steps=2"), reporter=QUIET)
    again = train(config_of(world, tmp_path, *options, "name=cut"), resume=True, reporter=QUIET)
    assert all(torch.equal(value, state[name]) for name, value in weights_of(again.folder).items())
    assert torch.equal(reward.network.clip.network.visual.proj, state["clip.network.visual.proj"])


def test_pal_run_and_its_users(world, tmp_path):
    pal = ("trainer={method: pal, size: 8}", "optim.steps=20")
    result = train(config_of(world, tmp_path, *pal), reporter=QUIET)
    path, pictures = str(result.folder), torch.rand(2, 3, 64, 64)
    prompts = ["a red circle"] * 2
    named = TrainedReward(path, user="user 1", normalise=False)
    given = TrainedReward(path, user=named.mixture[0].tolist(), normalise=False)
    assert torch.allclose(named.score(pictures, prompts).mean, given.score(pictures, prompts).mean, atol=1e-5)
    assert "population" in json.loads((result.folder / "validation.json").read_text())
    with pytest.raises(DiffalignError, match="no user 'user 9'"):
        TrainedReward(path, user="user 9")
    with pytest.raises(DiffalignError, match="sum to 1"):
        TrainedReward(path, user=[0.5, 0.9])


def test_dry_run_and_cache(world, tmp_path):
    config = config_of(world, tmp_path, "trainer.members=2", "trainer.hidden=10")
    plan = plan_run(config)
    # Per member: (3 x 32 + 1) x 10 weights of the first layer and 11 of the second.
    assert plan.network.trained == 2 * ((3 * WIDTH + 1) * 10 + 11)
    assert plan_run(config_of(world, tmp_path, "model.tune=full")).network.trained > 50_000
    training, held_out = open_data(config, Parallel(), QUIET)
    assert (len(training), len(held_out)) == (42, 42)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.tune=lora", "works with: head, full"),
        ("model.vae=x/y", "model.vae is 'x/y', but a reward model does not use it"),
        ("data.flip=true", "data.flip"),
        ("trainer.dimensions=[a,a]", "names should differ"),
        ("trainer.memberz=3", "trainer.members"),
        ("model.path=no-such-clip", "no CLIP 'no-such-clip'"),
        ("model.path=scenes:none", "no CLIP 'scenes:none' is shipped"),
    ],
)
def test_bad_options_are_refused(world, tmp_path, override, message):
    with pytest.raises(DiffalignError, match=message):
        train(config_of(world, tmp_path, override, f"data.cache_dir={tmp_path}"), reporter=QUIET)


def test_a_folder_that_holds_no_reward(tmp_path):
    with pytest.raises(DiffalignError, match="holds no run; expected a finished run"):
        TrainedReward(str(tmp_path))
    with pytest.raises(DiffalignError, match="is no folder; expected a finished run"):
        load_reward({"reward": "trained", "path": "nowhere"})


def test_spec_survives_json():
    spec = PreferenceSpec(8, 2.0, "mlp", dimensions=("overall", "b"))
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


def test_dropout_makes_scores_vary_only_when_asked(world, tmp_path):
    pairs = pairs_of(world, tmp_path)
    trainer = trainer_on(pairs, head="mlp", dropout=0.5)
    head, batch = trainer.backbone.core.head, pairs.fetch(whole(pairs))
    images, texts = batch.images[:, 0], batch.texts[:, 0]
    assert not torch.equal(head(images, texts)[0], head(images, texts)[0])
    head.eval()
    assert torch.equal(head(images, texts)[0], head(images, texts)[0])


def test_weights_of_pairs_scale_their_losses(world, tmp_path):
    pairs = pairs_of(world, tmp_path)
    trainer = trainer_on(pairs)
    batch = pairs.fetch(whole(pairs))
    double, _ = trainer.loss(replace(batch, weight=2 * batch.weight))
    assert torch.allclose(double, 2 * trainer.loss(batch)[0])
