"""What every search owes its driver: climbing, independence of rows, determinism, exact continuation, failures."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.inference.best_of_n import BestOfN, BestOfNConfig
from diffalign.inference.evolution import Evolution, EvolutionConfig, places
from diffalign.inference.random_search import RandomSearch, RandomSearchConfig
from diffalign.inference.rank_sgd import RankSGD
from diffalign.inference.search import NoiseSearch, best_of, draw, norms, rotated, with_norm
from diffalign.inference.zero_order import ZeroOrder, ZeroOrderConfig

SEARCHES = {
    "best_of_n": BestOfN,
    "random_search": RandomSearch,
    "zero_order": ZeroOrder,
    "evolution": Evolution,
    "rank_sgd": RankSGD,
}
SHAPE = (4, 4, 4)
every = pytest.mark.parametrize("name", SEARCHES)


def make(name: str, seeds=(3, 4), shape=SHAPE) -> NoiseSearch:
    return SEARCHES[name](draw(seeds, 1, shape, "start")[:, 0], seeds)


def quadratic(noises: torch.Tensor) -> torch.Tensor:
    """`-|x - 1|^2 / d`: -2 on average for noise, 0 at best."""
    return -(noises - 1).flatten(2).square().mean(2)


def run(search: NoiseSearch, evaluations: int, reward=quadratic) -> NoiseSearch:
    done = 0
    while done < evaluations:
        candidates = search.ask()
        done += candidates.shape[1]
        search.tell(reward(candidates))
    return search


@every
def test_climbs_a_quadratic_in_64_dimensions(name):
    search = make(name, seeds=range(8))
    before = quadratic(search.start[:, None])[:, 0]
    noises, rewards = run(search, 240).best
    torch.testing.assert_close(rewards, quadratic(noises[:, None])[:, 0])
    # One noise of 240 is the best, and may be the first.
    assert (rewards >= before).all() if name == "best_of_n" else (rewards > before).all()
    # 240 independent noises reach -1.32 on average: a search that learns is far above.
    assert rewards.mean() > (-1.5 if name == "best_of_n" else -0.9)


def test_best_of_n_is_the_expected_maximum():
    """Rewards are the first element: the best of 16 standard normals is 1.766 on average, with a deviation of 0.52."""
    seeds = range(400)
    search = BestOfN(draw(seeds, 1, (2,), "start")[:, 0], seeds, BestOfNConfig(candidates=16))
    _, rewards = run(search, 16, lambda noises: noises[..., 0]).best
    assert rewards.mean() == pytest.approx(1.766, abs=4 * 0.52 / 20)


@every
def test_rows_do_not_touch(name):
    together, alone = run(make(name, (3, 4)), 40), run(make(name, (4,)), 40)
    assert torch.equal(together.best[0][1], alone.best[0][0])
    assert torch.equal(together.ask()[1], alone.ask()[0])


@every
def test_same_seed_same_search_and_another_seed_another(name):
    first, second, other = (run(make(name, seeds), 40) for seeds in ((3, 4), (3, 4), (3, 5)))
    assert torch.equal(first.ask(), second.ask())
    assert not torch.equal(first.ask()[1], other.ask()[1])


@every
def test_global_generators_are_left_alone(name):
    import numpy as np

    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    run(make(name), 40)
    assert (torch.rand(1), np.random.rand()) == expected


@every
@pytest.mark.parametrize("evaluations", [0, 12, 40])
def test_continues_exactly_from_a_state(name, evaluations):
    going = run(make(name), evaluations)
    asked = going.ask()
    stopped = make(name)
    stopped.restore(going.state())
    assert torch.equal(stopped.ask(), asked)
    run(going, 40), run(stopped, 40)
    assert torch.equal(stopped.ask(), going.ask())
    for name, value in going.state().items():
        assert torch.equal(
            stopped.state()[name],
            value,
        ), name


@every
def test_a_state_is_a_copy(name):
    search = run(make(name), 12)
    state = search.state()
    before = {key: value.clone() for key, value in state.items()}
    run(search, 24)
    assert all(torch.equal(state[key].nan_to_num(7), before[key].nan_to_num(7)) for key in state)


@every
def test_asks_the_same_until_told(name):
    search = run(make(name), 12)
    assert torch.equal(search.ask(), search.ask())
    assert search.ask().dtype == torch.float32
    assert search.ask().shape[0] == 2
    assert search.ask().shape[2:] == SHAPE


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_failed_candidates_are_never_chosen(name, bad):
    def reward(noises):
        found = quadratic(noises)
        # Half of all candidates fail, the best of each round among them.
        failed = found >= found.median(1, keepdim=True).values
        return torch.where(failed, bad, found)

    search = make(name)
    for _ in range(6):
        candidates = search.ask()
        told = reward(candidates)
        search.tell(told)
    noises, rewards = search.best
    assert rewards.isfinite().all()
    assert noises.isfinite().all()
    torch.testing.assert_close(rewards, quadratic(noises[:, None])[:, 0])


@every
def test_goes_on_after_rounds_without_any_reward(name):
    search = make(name)
    for _ in range(3):
        search.tell(torch.full(search.ask().shape[:2], math.nan))
    noises, rewards = search.best
    assert torch.equal(noises, search.start)
    assert (rewards == -math.inf).all()
    assert run(search, 240).best[1].mean() > -1.6


@every
def test_one_row_may_fail_alone(name):
    search, other = make(name), make(name)
    for _ in range(6):
        rewards = quadratic(search.ask())
        search.tell(torch.stack([torch.full_like(rewards[0], math.nan), rewards[1]]))
        other.tell(quadratic(other.ask()))
    assert torch.equal(search.best[0][1], other.best[0][1])


@every
def test_candidates_stay_on_the_shell(name):
    search = run(make(name), 120)
    ratio = norms(search.ask(), lead=2).flatten() / 8
    assert ((ratio > 0.6) & (ratio < 1.4)).all()
    if name in ("zero_order", "rank_sgd", "evolution"):
        expected = norms(search.start).flatten()
        torch.testing.assert_close(
            norms(search.ask(), 2).flatten(1), expected[:, None].expand(2, search.ask().shape[1])
        )


@every
def test_wrong_shape_of_rewards(name):
    search = make(name)
    with pytest.raises(DiffalignError, match=r"rewards of shape \[1, 1\]; expected \[2, "):
        search.tell(torch.zeros(1, 1))


def test_number_of_seeds():
    with pytest.raises(DiffalignError, match="2 starting noises and 1 seeds"):
        BestOfN(torch.zeros(2, 3), [0])


@pytest.mark.parametrize("name", ["best_of_n", "random_search", "zero_order", "evolution"])
def test_the_start_is_the_first_candidate(name):
    search = make(name)
    assert torch.equal(search.ask()[:, 0], search.start)


def test_best_of_n_draws_the_same_noises_in_rounds_of_any_size():
    start = draw([5], 1, (3,), "start")[:, 0]
    one = BestOfN(start, [5], BestOfNConfig(candidates=6)).ask()[0]
    many = BestOfN(start, [5], BestOfNConfig(candidates=2))
    parts = []
    for _ in range(3):
        parts.append(many.ask()[0])
        many.tell(torch.zeros(1, 2))
    assert torch.equal(torch.cat(parts), one)


def test_best_of_takes_the_first_of_equals_and_no_nan():
    noises = torch.arange(6.0).view(2, 3, 1)
    rewards = torch.tensor([[math.nan, 2.0, 2.0], [math.nan, math.nan, math.nan]])
    found, values = best_of(noises, rewards)
    assert found.tolist() == [[1.0], [3.0]]
    assert values.tolist() == [2.0, -math.inf]


def test_rotation_by_hand():
    """(3, 4) turned towards (-4, 3), cosine 0.6 and sine 0.8: 0.6 (3, 4) + 0.8 (-4, 3) = (-1.4, 4.8)."""
    turned = rotated(torch.tensor([[3.0, 4.0]]), torch.tensor([[-4.0, 3.0]]), 0.6)
    torch.testing.assert_close(turned, torch.tensor([[-1.4, 4.8]]))
    # Only the part at right angles gives the direction.
    same = rotated(
        torch.tensor([[3.0, 4.0]]), torch.tensor([[-4.0, 3.0]]) + 7 * torch.tensor([[3.0, 4.0]]), 0.6
    )
    torch.testing.assert_close(same, turned)
    parallel = rotated(torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]]), 0.6)
    assert parallel.isfinite().all()


def test_with_norm_by_hand():
    scaled = with_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[10.0], [1.0]]))
    assert scaled.tolist() == [[6.0, 8.0], [0.0, 0.0]]


def test_neighbours_are_at_the_fixed_angle():
    search = make("zero_order")
    search.tell(torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 2))
    cosine = torch.nn.functional.cosine_similarity(
        search.start.flatten(1)[:, None], search.ask().flatten(2), dim=2
    )
    torch.testing.assert_close(cosine, torch.full((2, 4), 0.95))


def test_zero_order_moves_only_to_better_neighbours():
    search = make("zero_order")
    search.tell(torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 2))
    asked = search.ask()
    search.tell(torch.tensor([[0.9, 0.8, 0.7, math.nan], [0.0, 0.0, 2.0, 0.0]]))
    assert torch.equal(search.state()["pivot"][0], search.start[0])
    assert torch.equal(search.state()["pivot"][1], asked[1, 2])


def test_zero_order_begins_anew_without_patience_and_keeps_the_best():
    start = draw([1], 1, (64,), "start")[:, 0]
    search = ZeroOrder(start, [1], ZeroOrderConfig(patience=2))
    for rewards in ([5.0, 0, 0, 0], [1.0, 1, 1, 1], [1.0, 1, 1, 1]):
        assert torch.equal(search.state()["pivot"], start)
        search.tell(torch.tensor([rewards]))
    pivot = search.state()["pivot"]
    assert not torch.equal(pivot, start)
    assert torch.equal(search.ask()[:, 0], pivot)
    search.tell(torch.tensor([[2.0, 1, 1, 1]]))
    assert search.state()["pivot_reward"].tolist() == [2.0]
    assert search.best[1].tolist() == [5.0]


def test_random_search_keeps_the_best_pivots():
    start = draw([1], 1, (64,), "start")[:, 0]
    search = RandomSearch(start, [1], RandomSearchConfig(candidates=4, pivots=2, fresh=0.25, angle=(20, 20)))
    first = search.ask()[0]
    search.tell(torch.tensor([[1.0, 4.0, math.nan, 3.0]]))
    assert search.state()["pivot_rewards"].tolist() == [[4.0, 3.0]]
    cosine = torch.nn.functional.cosine_similarity(search.ask()[0][:, None], first[[1, 3]][None], dim=2)
    # The first candidate is fresh; the others take turns from the best pivot at the end.
    expected = math.cos(math.radians(20))
    assert cosine[0].abs().max() < 0.5
    assert [round(float(cosine[i, p]), 4) for i, p in ((3, 0), (2, 1), (1, 0))] == [round(expected, 4)] * 3


def test_random_search_refuses_angles():
    for angle in ((0, 10), (30, 20), (10, 91)):
        with pytest.raises(ValueError, match="expected two rising values in"):
            RandomSearchConfig(angle=angle)


def test_places_by_hand():
    assert places(torch.tensor([0.5, math.nan, 2.0, 0.5])).tolist() == [1.0, 3.0, 0.0, 2.0]


def test_evolution_sees_only_the_order_of_rewards():
    plain, bent = make("evolution"), make("evolution")
    run(plain, 60)
    run(bent, 60, lambda noises: torch.where((found := quadratic(noises)) < -1.5, 64 * found, found / 8))
    assert torch.equal(plain.ask(), bent.ask())


def test_evolution_starts_with_samples_of_the_right_length():
    """sqrt(1 - 0.6^2) start + 0.6 xi has the norm of noise; without rescaling to check it."""
    start = draw(range(4), 1, (900,), "start")[:, 0]
    config = EvolutionConfig(sigma=0.6, candidates=16, keep_norm=False)
    found = Evolution(start, range(4), config).ask()[:, 1:]
    assert float(norms(found, 2).mean()) == pytest.approx(30.0, abs=0.5)
    cosine = torch.nn.functional.cosine_similarity(found, start[:, None], dim=2)
    assert float(cosine.mean()) == pytest.approx(0.8, abs=0.01)


def test_evolution_with_diagonal_covariance_climbs():
    start = draw(range(2), 1, (1100,), "start")[:, 0]
    search = run(Evolution(start, range(2), EvolutionConfig(candidates=12)), 120)
    assert search._strategies[0].opts["CMA_diagonal"] is True
    assert search.best[1].mean() > -1.8


def test_evolution_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cma", None)
    with pytest.raises(DiffalignError, match=r"pip install 'diffalign\[search\]'"):
        make("evolution")
