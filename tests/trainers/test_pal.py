"""PAL: two kinds of users, new users from a few pairs, and the trainer's numbers."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

# Benchmarks are not part of the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.pal_users import World, as_pairs, ask, experiment
from diffalign.data.judged import ANYBODY
from diffalign.engine.scorer_assembly import ScorerBackbone
from diffalign.randomness import Draw
from diffalign.rewards.heads import PALHead, PALSpec, build_head, spec_from_dict, spec_to_dict
from diffalign.rewards.preference_head import RewardNetwork
from diffalign.trainers.pal import PALConfig, PALTrainer, fit_users

SPEC = PALSpec(width=3, scale=1.0, form="angle", size=3, users=("ann", "bob"), rate=1.0)


def hand_made() -> PALHead:
    """Prototype 0 likes the first axis, prototype 1 the second; Ann is all of the first, Bob of the second."""
    head = build_head(SPEC)
    assert isinstance(head, PALHead)
    with torch.no_grad():
        head.item.weight.copy_(torch.eye(3))
        head.prototypes.zero_()
        head.prototypes[0, 0, 2] = head.prototypes[1, 1, 2] = 1.0  # the text is the third axis
        head.log_scale.zero_()
        head.user_logits.copy_(torch.tensor([[40.0, 0.0], [0.0, 40.0]]))
    return head


def trainer_on(head: PALHead, pairs, **options) -> PALTrainer:
    trainer = PALTrainer(PALConfig(**options), ScorerBackbone(RewardNetwork(head)))
    trainer.prepare(pairs)
    return trainer


def test_scores_by_hand():
    head = hand_made()
    images, texts = torch.eye(3)[[0, 1, 0, 0]], torch.eye(3)[[2, 2, 2, 2]]
    users = torch.tensor([0, 0, 1, ANYBODY])
    scores, spread = head(images, texts, users)
    # Ann: cosine 1 with the first axis, 0 with the second; Bob: 0 with the first; the mean of both: 1 / sqrt(2).
    assert scores[0, :, 0].tolist() == pytest.approx([1, 0, 0, 1 / math.sqrt(2)], abs=1e-6)
    assert spread is None


def test_a_user_who_is_not_known_is_the_population():
    head = hand_made()
    assert head.weights(None, 2).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert torch.equal(head.weights(torch.tensor([ANYBODY]), 1), head.weights(None, 1))


def test_distance_form_by_hand():
    head = build_head(PALSpec(width=1, scale=1.0, form="distance", prototypes=2, size=1, rate=1.0))
    with torch.no_grad():
        head.item.weight.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
        head.item.bias.zero_()
        head.prototypes.copy_(torch.tensor([[1.0], [9.0]]))  # the second is pulled back to norm 4
        head.log_scale.fill_(math.log(2))
    one = torch.ones(1, 1)
    assert head.scores(one, one, torch.tensor([[0.0, 1.0]])).item() == pytest.approx(-6)
    assert head.scores(one, one, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(0, abs=1e-6)


def test_new_user_is_found_from_eight_pairs_and_nothing_else_changes():
    head = hand_made()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    images = torch.eye(3)[[0, 1]].repeat(
        2, 8, 1, 1
    )  # the first axis wins eight times, in the eyes of the first user
    images[1] = images[1].flip(1)
    texts = torch.eye(3)[[2, 2]].repeat(2, 8, 1, 1)
    weights = fit_users(head, images, texts)
    assert weights[0, 0] > 0.9
    assert weights[1, 1] > 0.9
    assert weights.sum(1).tolist() == pytest.approx([1, 1])
    undecided = fit_users(head, images[:1], texts[:1], torch.full((1, 8), 0.5))
    assert undecided[0].tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize(("loss", "expected"), [("logistic", math.log1p(math.exp(-1))), ("hinge", 0.0)])
def test_loss_of_a_right_answer(loss, expected):
    pairs = as_pairs(ask(World(users=2, pairs=1, width=3), 2, 1, "x"))
    trainer = trainer_on(hand_made(), pairs, loss=loss)
    batch = trainer.fetch(Draw(0, 0, [0], [0], 1))
    batch.images[0] = torch.eye(3)[[0, 1]]
    batch.texts[0] = torch.eye(3)[[2, 2]]
    losses, metrics = trainer.loss(batch)
    assert losses.tolist() == pytest.approx([expected], abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(1.0)
    assert metrics["accuracy"].item() == 1.0


def test_spec_survives_json():
    assert spec_from_dict(spec_to_dict(SPEC)) == SPEC


@pytest.mark.parametrize("form", ["distance", "angle"])
def test_two_prototypes_beat_one_and_eight_pairs_fit_a_new_user(form):
    found = experiment(World(users=40, new_users=40, pairs=30, test=30, width=6), form, steps=150)
    known, new, _ = found.values()
    assert known["interval"][0] > 0.02
    assert new["interval"][0] > 0.02
