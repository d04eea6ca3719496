"""Win rates, ranks and disagreement inside groups; transforms against base scores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from combine_fakes import Channel, colours
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import DiffalignError
from diffalign.rewards.combine.base_scores import BaseScores
from diffalign.rewards.combine.groups import (
    disagreement,
    group_win_rate,
    most_disputed,
    rank_average,
    win_rate_among,
    win_rate_std,
)
from diffalign.rewards.combine.transforms import (
    log_sigmoid,
    log_sigmoid_slope,
    par,
    par_slope,
    reference_percentile,
)

NAN = math.nan
SCORES = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=8)


def test_win_rates_by_hand() -> None:
    rates = group_win_rate(torch.tensor([[1.0, 2.0, 2.0], [5.0, 5.0, 5.0]]))
    assert rates.tolist() == [[0.0, 0.75, 0.75], [0.5, 0.5, 0.5]]


def test_win_rates_of_a_flat_batch_stay_inside_groups() -> None:
    groups = torch.tensor([0, 1, 0, 2])
    assert win_rate_among(torch.tensor([1.0, 9.0, 3.0, 0.0]), groups).tolist() == [0.0, 0.5, 1.0, 0.5]


def test_unknown_scores_take_no_part() -> None:
    rates = group_win_rate(torch.tensor([[1.0, NAN, 3.0]]))[0]
    assert rates[0] == 0.0
    assert rates[2] == 1.0
    assert rates[1].isnan()


@given(SCORES)
@settings(max_examples=50, deadline=None)
def test_win_rates_average_one_half_and_ignore_scale_and_order(row: list[float]) -> None:
    scores = torch.tensor([row])
    rates = group_win_rate(scores)
    assert rates.mean().item() == pytest.approx(0.5, abs=1e-6)
    assert torch.allclose(group_win_rate(torch.exp(scores)), rates)
    assert torch.allclose(group_win_rate(scores.flip(1)).flip(1), rates)


def test_uncertain_win_rates() -> None:
    groups = torch.zeros(2, dtype=torch.long)
    # A gap of 1 between two stds of 1 / sqrt 2: p = Phi(1) = 0.84134, sqrt(p (1 - p)) = 0.36536.
    std = win_rate_std(torch.tensor([1.0, 0.0]), torch.full((2,), math.sqrt(0.5)), groups)
    assert std.tolist() == pytest.approx([0.36536] * 2, abs=1e-4)
    assert win_rate_std(torch.tensor([1.0, 0.0]), torch.zeros(2), groups).tolist() == [0.0, 0.0]


def test_rank_average_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [100.0, 900.0, 100.0]])
    assert rank_average(scores).tolist() == [0.125, 0.75, 0.625]


def test_disagreement_finds_the_sample_only_the_proxy_likes() -> None:
    proxy = torch.tensor([[3.0, 2.0, 1.0]])
    auxiliaries = torch.tensor([[[1.0, 2.0, 3.0]], [[1.0, 3.0, 2.0]]])
    u = disagreement(proxy, auxiliaries)
    assert u.tolist() == [[1.0, -0.25, -0.75]]
    assert most_disputed(u, 0.1).tolist() == [[True, False, False]]
    assert most_disputed(u, 0.6).tolist() == [[True, True, False]]
    with pytest.raises(ValueError, match="share of samples is 0"):
        most_disputed(u, 0)


def test_log_sigmoid_by_hand() -> None:
    # log sigmoid(0) = -log 2; log sigmoid(log 3) = log(3/4).
    scores = torch.tensor([1.0, 1 + math.log(3), -99.0])
    assert log_sigmoid(scores, 1.0).tolist() == pytest.approx(
        [-math.log(2), math.log(0.75), -100.0], abs=1e-5
    )
    assert log_sigmoid(torch.tensor(3.0), 1.0, 2.0).item() == pytest.approx(-math.log1p(math.exp(-1)))


def test_a_sum_of_log_sigmoids_wants_all_rewards_good() -> None:
    balanced, lopsided = torch.tensor([2.0, 2.0]), torch.tensor([10.0, -2.0])
    assert lopsided.sum() > balanced.sum()
    assert log_sigmoid(lopsided, 0.0).sum() < log_sigmoid(balanced, 0.0).sum()


def test_par_is_the_mean_preference_over_references() -> None:
    references = torch.tensor([[0.0, math.log(3)], [0.0, NAN]])
    # sigmoid(0) and sigmoid(-log 3) = 1/4.
    assert par(torch.zeros(2), references).tolist() == pytest.approx([0.375, 0.5])
    assert par(torch.tensor([1e4, -1e4]), references).tolist() == [1.0, 0.0]


def test_slopes_are_the_derivatives() -> None:
    scores = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    references = torch.tensor([[0.1, 0.7], [0.2, NAN], [1.0, 3.0]], dtype=torch.float64)
    grad = torch.autograd.grad(log_sigmoid(scores, 0.2, 0.5).sum(), scores)[0]
    assert torch.allclose(grad, log_sigmoid_slope(scores.detach(), 0.2, 0.5))
    grad = torch.autograd.grad(par(scores, references, 2.0).sum(), scores)[0]
    assert torch.allclose(grad, par_slope(scores.detach(), references, 2.0))


def test_percentiles() -> None:
    rows = torch.tensor([[1.0, 3.0, NAN], [0.0, 5.0, 10.0]])
    # Mean 2, std sqrt 2; mean 5, std 5; z(0.85) = 1.036433.
    expected = [2 + 1.036433 * math.sqrt(2), 5 + 1.036433 * 5]
    assert reference_percentile(rows).tolist() == pytest.approx(expected, abs=1e-5)
    assert reference_percentile(rows, 0.5, "empirical").tolist() == [2.0, 5.0]
    with pytest.raises(ValueError, match="percentile is 85"):
        reference_percentile(rows, 85)


def _table() -> BaseScores:
    return BaseScores("red", {"a": [1.0, 3.0], "b": [10.0]})


def test_base_scores_fall_back_on_all_prompts() -> None:
    references = _table().references(["a", "b", "never seen"])
    assert references.shape == (3, 3)
    assert references[0, :2].tolist() == [1.0, 3.0]
    assert references[0, 2].isnan()
    assert references[1].tolist() == references[2].tolist() == [1.0, 3.0, 10.0]


def test_base_scores_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "tables" / "red.json"
    _table().save(path)
    assert BaseScores.load(path) == _table()
    assert [p.name for p in path.parent.iterdir()] == ["red.json"]


def test_base_scores_collect_leaves_out_failures() -> None:
    media = colours((0.25, 0, 0), (NAN, 0, 0), (0.75, 0, 0))
    table = BaseScores.collect(Channel(0), [(media, ["a", "a", "b"]), (media[:1], ["b"])])
    assert table == BaseScores("channel-0", {"a": [0.25], "b": [0.75, 0.25]})


def test_base_scores_refuse_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(DiffalignError, match="cannot read base scores"):
        BaseScores.load(path)
    path.write_text("[1")
    with pytest.raises(DiffalignError, match="not JSON"):
        BaseScores.load(path)
    path.write_text('{"reward": "red"}')
    with pytest.raises(DiffalignError, match="not a table of base scores"):
        BaseScores.load(path)
    with pytest.raises(DiffalignError, match="hold 0 scores; expected at least 2"):
        BaseScores("red").references(["a"])
