"""Quality diversity: learned axes, the archive by hand, climbing above random sampling, judgements, continuation."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.inference.diversity import (
    Axes,
    agreement,
    distance_gap,
    judged_by,
    learned_axes,
    principal_axes,
    triplet_loss,
)
from diffalign.inference.qd import QualityDiversity, QualityDiversityConfig, collage, empty_archive
from diffalign.inference.search import draw

UNIT = Axes(torch.zeros(2), torch.eye(2), torch.zeros(2), torch.ones(2))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cells_by_hand():
    places = torch.tensor([[0.0, 0.0], [0.3, 0.9], [0.99, 0.26], [1.0, 1.0], [-5.0, 7.0]])
    # Of 4 x 4, the second axis fastest: 0, (1, 3), (3, 1), (3, 3), and outside (0, 3).
    assert UNIT.cells(places, 4).tolist() == [0, 7, 13, 15, 3]


def test_triplet_loss_by_hand():
    """On the first axis: |0 - 2|^2 - |0 - 1|^2 = 3. Second judged nearer: max(0, 0.05 - 3) = 0; else 3.05."""
    triplets = torch.tensor([[[0.0, 9.0], [2.0, 0.0], [1.0, 5.0]]]).repeat(2, 1, 1)
    projection = torch.tensor([[1.0], [0.0]])
    assert distance_gap(projection, triplets).tolist() == [3.0, 3.0]
    nearer = torch.tensor([True, False])
    torch.testing.assert_close(triplet_loss(projection, triplets, nearer), torch.tensor([0.0, 3.05]))
    assert agreement(projection, triplets, nearer) == 0.5


def test_a_proxy_judges_by_cosine():
    features = torch.tensor([[[1.0, 0.0], [5.0, 5.0], [1.0, 0.1]], [[1.0, 0.0], [9.0, 0.0], [1.0, 1.0]]])
    assert judged_by(features).tolist() == [True, False]


def test_principal_axes_find_the_widest_directions():
    features = normal(500, 5) * torch.tensor([0.1, 3.0, 0.1, 1.0, 0.1]) + 4
    axes = principal_axes(features, 2)
    directions = torch.nn.functional.normalize(axes.projection, dim=0)
    assert directions[1, 0] > 0.99
    assert directions[3, 1] > 0.99
    cells = axes.cells(features, 10)
    assert cells.min() >= 0
    assert cells.max() < 100


def test_principal_axes_need_variation():
    with pytest.raises(DiffalignError, match="2 axes of diversity cannot be found in features of shape"):
        principal_axes(torch.ones(5, 4), 2)
    with pytest.raises(DiffalignError, match="at least 2 different pictures"):
        principal_axes(normal(5, 1), 2)


def judged_world(count=900):
    """Features vary most in what nobody cares for; judges look at the last two."""
    features = normal(300, 6) * torch.tensor([5.0, 4.0, 3.0, 3.0, 1.0, 1.0])
    numbers = torch.randint(300, (count, 3), generator=torch.Generator().manual_seed(1))
    triplets = features[numbers]
    seen = triplets[:, :, 4:]
    nearer = (seen[:, 0] - seen[:, 2]).norm(dim=1) < (seen[:, 0] - seen[:, 1]).norm(dim=1)
    return features, triplets, nearer


def test_axes_learn_what_judges_look_at():
    features, triplets, nearer = judged_world()
    before = agreement(principal_axes(features, 2).projection, triplets, nearer)
    axes, agreed = learned_axes(features, triplets, nearer, 2)
    assert before < 0.6
    assert agreed > 0.8
    share = axes.projection[4:].square().sum() / axes.projection.square().sum()
    assert share > 0.8
    again, same = learned_axes(features, triplets, nearer, 2)
    assert torch.equal(again.projection, axes.projection)
    assert same == agreed


def test_scale_of_features_does_not_matter():
    features, triplets, nearer = judged_world(200)
    plain, first = learned_axes(features, triplets, nearer, 2, epochs=20)
    large, second = learned_axes(64 * features, 64 * triplets, nearer, 2, epochs=20)
    torch.testing.assert_close(64 * large.projection, plain.projection, rtol=1e-3, atol=1e-4)
    assert first == second


def test_few_judgements_and_none():
    features, triplets, nearer = judged_world(900)
    assert learned_axes(features, triplets[:3], nearer[:3], 2, epochs=5)[0].projection.isfinite().all()
    with pytest.raises(DiffalignError, match="need judgements"):
        learned_axes(features, triplets[:0], nearer[:0], 2)


def test_archive_by_hand():
    archive = empty_archive(4, (1,), 1)
    assert (archive.coverage, archive.score(0.0)) == (0.0, 0.0)
    cells = torch.tensor([2, 0, 2, 2, 3])
    noises = torch.arange(5.0)[:, None]
    archive = archive.insert(cells, noises, torch.tensor([1.0, 0.5, 3.0, 3.0, math.nan]), noises * 10)
    assert archive.filled.tolist() == [0, 2]
    assert archive.noises[archive.filled].tolist() == [[1.0], [2.0]], (
        "the older of equals, never a failed one"
    )
    assert archive.features[archive.filled].tolist() == [[10.0], [20.0]]
    assert archive.coverage == 0.5
    # Above -1: 1.5 + 4; a reward below the floor counts as nothing.
    assert archive.score(-1.0) == 5.5
    assert archive.score(1.0) == 2.0


def test_insertion_leaves_the_old_archive():
    old = empty_archive(2, (1,), 1)
    old.insert(torch.tensor([0]), torch.ones(1, 1), torch.ones(1), torch.ones(1, 1))
    assert old.coverage == 0


def test_collage_by_hand():
    """4 x 4 cells, 2 x 2 pictures; cell number = 4 right + up."""
    archive = empty_archive(16, (1,), 1)
    cells = torch.tensor([0, 5, 10, 3])
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0])
    archive = archive.insert(cells, torch.zeros(4, 1), rewards, torch.zeros(4, 1))
    # 0 = (0, 0) and 5 = (1, 1) share the lower left block; 10 = (2, 2) is upper right, 3 = (0, 3) upper left.
    assert collage(archive, 4, 2).tolist() == [[3, 10], [5, -1]]
    with pytest.raises(DiffalignError, match=r"collage of 5 x 5 pictures"):
        collage(archive, 4, 5)


DIMENSIONS = 32


def world(noises):
    """Reward: near 1 in the last 30 numbers. Features: the first two, among nuisances."""
    reward = -(noises[..., 2:] - 1).square().mean(-1)
    return reward, noises[..., [0, 1, 5, 6]] * torch.tensor([1.5, 1.5, 1.0, 1.0])


def make(rows=1, **options):
    seeds = list(range(rows))
    return QualityDiversity(
        draw(seeds, 1, (DIMENSIONS,), "start")[:, 0],
        seeds,
        QualityDiversityConfig(**{"initial": 40, **options}),
    )


def play(search, rounds):
    for _ in range(rounds):
        search.tell(*world(search.ask()))
    return search


def test_above_random_sampling_at_equal_budget():
    """QD score and coverage on the same axes: 800 candidates of the search against 800 independent noises."""
    search = play(make(3, grid=14, initial=120), 100)
    for row in range(3):
        axes, archive = search._rows[row].axes, search.archives[row]
        noises = draw([row], 800, (DIMENSIONS,), "random")[0]
        rewards, features = world(noises)
        random = empty_archive(196, (DIMENSIONS,), 4)
        random = random.insert(axes.cells(features, 14), noises, rewards, features)
        assert archive.score(-3.0) > 1.2 * random.score(-3.0)
        assert archive.coverage > random.coverage
    assert (search.best[1] > world(search.start)[0]).all()


def test_elites_keep_their_norm():
    search = play(make(), 30)
    norms = search.ask().norm(dim=2)
    stored = search.archives[0].noises[search.archives[0].filled].norm(dim=1)
    assert all((stored - norm).abs().min() < 1e-4 for norm in norms[0])
    assert norms.max() < 9


def test_judgements_replace_the_axes_and_keep_elites():
    search = play(make(grid=6, keep_all=False), 12)
    before = search.archives[0]
    best = before.rewards.max()
    numbers = search.triplets(0, 400)
    assert all(len(set(each)) == 3 for each in numbers.tolist())
    _, features = search.candidates_of(0)
    agreed = search.learn(0, numbers, judged_by_second_axis(features[numbers]))
    assert agreed > 0.7
    assert search.archives[0].rewards.max() == best
    assert set(search.archives[0].noises[search.archives[0].filled][:, 0].tolist()) <= set(
        before.noises[:, 0].tolist()
    )
    weights = search._rows[0].axes.projection.square().sum(1)
    assert weights.argmax() == 3
    play(search, 5)
    search.learn(0, search.triplets(0, 10)[:, :], torch.ones(10, dtype=torch.bool))
    assert len(search._rows[0].second_nearer) == 410


def test_new_axes_place_all_pictures_again():
    """Of 96 pictures none is lost, though the old archive held a part of them."""
    search = play(make(grid=6), 12)
    assert len(search.archives[0].filled) < 40
    noises, features = search.candidates_of(0)
    assert len(noises) == 96
    search.learn(0, torch.tensor([[0, 1, 2]]), torch.tensor([True]))
    rewards, _ = world(noises)
    expected = search.placed(rewards[None], features[None])[0]
    assert torch.equal(search.archives[0].rewards, expected.rewards)


def judged_by_second_axis(triplets):
    """A judge who looks at the last feature alone."""
    seen = triplets[:, :, 3]
    return (seen[:, 0] - seen[:, 2]).abs() < (seen[:, 0] - seen[:, 1]).abs()


def test_triplets_before_there_is_an_archive():
    search = make()
    with pytest.raises(DiffalignError, match="prompt 0 has 0"):
        search.triplets(0, 2)
    play(search, 1)
    assert search.archives == [None]
    numbers = search.triplets(0, 20)
    assert numbers.shape == (20, 3)
    assert search.learn(0, numbers, torch.arange(20) % 2 == 0) >= 0
    assert search.archives[0] is not None


@pytest.mark.parametrize("rounds", [0, 2, 9])
def test_continues_exactly(rounds):
    going = play(make(2), rounds)
    if rounds:
        numbers = going.triplets(0, 30)
        going.learn(0, numbers, torch.arange(30) % 3 == 0)
    stopped = make(2)
    stopped.restore(going.state())
    play(going, 4), play(stopped, 4)
    assert torch.equal(stopped.ask(), going.ask())
    assert set(stopped.state()) == set(going.state())
    for name, value in going.state().items():
        assert torch.equal(stopped.state()[name], value), name


def test_rows_do_not_touch():
    together = play(make(2), 12)
    alone = QualityDiversity(together.start[1:], [1], together.config)
    play(alone, 12)
    assert torch.equal(together.ask()[1], alone.ask()[0])


def test_failures_never_become_elites():
    search = make(2)
    for _ in range(8):
        rewards, features = world(search.ask())
        rewards[0, :3], features[0, 3, 0] = math.nan, math.nan
        rewards[1] = math.nan
        search.tell(rewards, features)
    # Half of 8 x 8 are left to the first row, fewer than 40; the second has nothing.
    assert search.archives == [None, None]
    assert len(search.candidates_of(0)[0]) == 32
    assert search.candidates_of(0)[1].isfinite().all()
    assert len(search.candidates_of(1)[0]) == 0
    assert search.best[1][1] == -math.inf


def test_features_are_needed():
    search = make()
    with pytest.raises(DiffalignError, match=r"features of shape None; expected \[1, 8\]"):
        search.tell(torch.zeros(1, 8))
    with pytest.raises(DiffalignError, match=r"features of shape \[1, 7, 4\]"):
        search.tell(torch.zeros(1, 8), torch.zeros(1, 7, 4))
