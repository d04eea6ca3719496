"""ZO-RankSGD: weights of rankings, running mean, line search, a person's way of telling."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.inference.rank_sgd import (
    RankSGD,
    RankSGDConfig,
    ascent,
    edge_weights,
    read_ranking,
    rewards_of,
)
from diffalign.inference.search import draw

NAN = math.nan


def make(rows: int = 1, **options) -> RankSGD:
    start = draw(range(rows), 1, (8,), "start")[:, 0]
    return RankSGD(start, range(rows), RankSGDConfig(**options))


def reward(noises):
    return noises[..., 0] - noises[..., 1] ** 2


def test_weights_of_a_full_ranking():
    """Six in order: 5, 3, 1, -1, -3, -5 of 15 edges; the release's 6, 4, 2, 0, -2, -4 sum to 6."""
    weights, edges = edge_weights(torch.tensor([[9.0, 8.0, 5.0, 4.0, 1.0, 0.0]]))
    assert weights.tolist() == [[5, 3, 1, -1, -3, -5]]
    assert edges.tolist() == [15]


def test_weights_of_the_best_two_of_five():
    """|E| = k (k - 1) / 2 + k (m - k) = 1 + 6; ranked r: m - 1 - 2 r = 4, 2; the others: -k = -2."""
    weights, edges = edge_weights(torch.tensor([[0.1, 0.9, 0.3, 0.7, 0.2]]), top=2)
    assert weights.tolist() == [[-2, 4, -2, 2, -2]]
    assert edges.tolist() == [7]


def test_equals_and_failures_have_no_edges():
    weights, edges = edge_weights(torch.tensor([[1.0, 1.0, NAN, 0.0], [NAN, NAN, NAN, 3.0]]))
    assert weights.tolist() == [[1, 1, 0, -2], [0, 0, 0, 0]]
    assert edges.tolist() == [2, 0]
    # A failed one does not count among the unranked of a short ranking either.
    weights, edges = edge_weights(torch.tensor([[3.0, NAN, 2.0, 1.0]]), top=1)
    assert weights.tolist() == [[2, 0, -1, -1]]
    assert edges.tolist() == [2]


@pytest.mark.parametrize("top", [None, 1, 3])
def test_weights_sum_to_zero(top):
    rewards = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    assert edge_weights(rewards, top)[0].sum(1).abs().max() == 0


def test_ascent_is_the_mean_over_edges():
    perturbations = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [4.0, 4.0]]])
    weights, edges = edge_weights(torch.tensor([[3.0, 2.0, 1.0]]))
    # Edges 1-2, 1-3, 2-3: (1, -2) + (-3, -4) + (-4, -2) = (-6, -8), over 3.
    torch.testing.assert_close(ascent(perturbations, weights, edges), torch.tensor([[-2.0, -8 / 3]]))


def test_a_common_shift_of_the_queries_does_not_matter():
    noises = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    weights, edges = edge_weights(torch.arange(6.0)[None])
    torch.testing.assert_close(
        ascent(noises + 5, weights, edges), ascent(noises, weights, edges), atol=1e-5, rtol=0
    )


def test_only_the_order_counts():
    plain, bent = make(3), make(3)
    for _ in range(8):
        values = reward(plain.ask())
        plain.tell(values)
        bent.tell(torch.where(values > 0, 64 * values, values / 8))
        assert torch.equal(plain.ask(), bent.ask())


def test_rankings_do_what_rewards_do():
    plain, person = make(2), make(2)
    for _ in range(6):
        values = reward(plain.ask())
        plain.tell(values)
        person.tell_rankings(values.argsort(dim=1, descending=True).tolist())
        assert torch.equal(plain.ask(), person.ask())


def test_line_search_shows_the_previous_best_and_the_current_point():
    search = make(candidates=6, step=2.0, decay=0.5, keep_norm=False)
    queries = search.ask()
    search.tell(torch.tensor([[0.0, 5.0, 1.0, 2.0, 3.0, 4.0]]))
    line, state = search.ask(), search.state()
    assert torch.equal(line[:, 4], queries[:, 1])
    assert torch.equal(line[:, 5], search.start)
    for number, size in enumerate((2.0, 1.0, 0.5, 0.25)):
        torch.testing.assert_close(line[:, number], search.start + size * state["direction"])
    assert search.labels == ["step 2", "step 1", "step 0.5", "step 0.25", "previous best", "current"]


def test_directions_are_averaged_until_a_step_is_taken():
    search = make(keep_norm=False)
    estimates = []
    for _ in range(2):
        noises = search.ask()
        values = reward(noises)
        estimates.append(ascent(noises - search.start[:, None], *edge_weights(values)))
        search.tell(values)
        # Nothing beats the current point, which is last.
        search.tell(torch.tensor([[0.0, 0, 0, 0, 0, 1]]))
    torch.testing.assert_close(search.state()["direction"], (estimates[0] + estimates[1]) / 2)
    assert search.state()["averaged"].tolist() == [2]
    search.tell(reward(search.ask()))
    line = search.ask()
    search.tell(torch.tensor([[0.0, 2, 0, 0, 0, 1]]))
    assert torch.equal(search.state()["point"], line[:, 1])
    assert search.state()["averaged"].tolist() == [0]
    assert search.state()["direction"].abs().max() == 0


def test_a_tie_with_the_current_point_stays():
    search = make()
    search.tell(reward(search.ask()))
    search.tell(torch.ones(1, 6))
    assert torch.equal(search.state()["point"], search.start)
    assert search.state()["averaged"].tolist() == [1]


def test_a_round_that_failed_leaves_the_direction():
    search = make()
    search.tell(torch.full((1, 6), NAN))
    assert search.state()["averaged"].tolist() == [0]
    assert torch.equal(search.ask(), search.start[:, None].expand(1, 6, 8)) or torch.allclose(
        search.ask(), search.start[:, None].expand(1, 6, 8)
    )


def test_an_empty_ranking_says_nothing():
    search = make(2)
    search.tell_rankings([[], [2]])
    assert search.state()["averaged"].tolist() == [0, 1]
    search.tell_rankings([[], [0]])
    assert torch.equal(search.state()["point"][0], search.start[0])
    assert not torch.equal(search.state()["point"][1], search.start[1])


def test_rewards_of_rankings():
    assert rewards_of([[2, 0], []], 2, 4).tolist() == [[3, 0, 4, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("ranking", [[4], [-1], [1, 1]])
def test_bad_rankings(ranking):
    with pytest.raises(DiffalignError, match="different candidate numbers from 0 to 3"):
        rewards_of([ranking], 1, 4)


def test_wrong_number_of_rankings():
    with pytest.raises(DiffalignError, match="got 1 rankings; expected 2"):
        rewards_of([[0]], 2, 4)


def test_what_a_person_types():
    assert read_ranking("3 1", 4) == [2, 0]
    assert read_ranking(" 3,1 > 2 ", 4) == [2, 0, 1]
    assert read_ranking("", 4) == []
    for text in ("5", "0", "one", "2 2", "1.5"):
        with pytest.raises(DiffalignError, match="no ranking; expected different numbers from 1 to 4"):
            read_ranking(text, 4)
