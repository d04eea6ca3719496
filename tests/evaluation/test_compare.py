"""Comparisons of known pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fakes import Brightness, Lit, flat, lit_comparison, prompts

from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import compare, compare_models
from diffalign.evaluation.examples import biggest_gains, biggest_losses, random_rows
from diffalign.evaluation.prompts import EvalPrompt
from diffalign.evaluation.wording import verdict


def test_known_pictures_give_known_numbers() -> None:
    result = compare(flat([0, 0, 1, 1]), flat([1, 1, 1, 0]), prompts(4), [Lit()])
    metric = result.main
    assert (metric.name, metric.binary) == ("lit", True)
    assert (metric.base, metric.tuned, metric.difference) == (0.5, 0.75, 0.25)
    assert (metric.wins.wins, metric.wins.ties, metric.wins.losses) == (2, 1, 1)
    assert metric.n == metric.prompts == 4
    assert metric.change == "no difference"


def test_same_pictures_are_no_difference() -> None:
    images = torch.rand(6, 3, 4, 4)
    result = compare(images, images, prompts(6), [Brightness()])
    assert all(m.difference == 0 and m.change == "no difference" for m in result.metrics.values())
    assert result.main.wins.rate == 0.5
    assert verdict(result).startswith("No difference: brightness is ")


def test_better_and_worse_mirror_each_other() -> None:
    dark, light = flat([0.1] * 20), flat([0.8] * 20)
    assert compare(dark, light, prompts(20), [Lit()]).main.change == "better"
    assert compare(light, dark, prompts(20), [Lit()]).main.change == "worse"


def test_categories_hold_their_own_prompts() -> None:
    base = flat([0.0] * 8)
    tuned = flat([1.0, 0.0] * 4)
    result = compare(base, tuned, prompts(8), [Lit()])
    assert result.categories["even"]["lit"].difference == 1.0
    assert result.categories["odd"]["lit"].difference == 0.0
    assert [m["lit"].n for m in result.categories.values()] == [4, 4]


def test_category_with_one_prompt_is_left_out() -> None:
    rows = [EvalPrompt("a", "one"), EvalPrompt("b", "two"), EvalPrompt("c", "two")]
    assert list(compare(flat([0, 0, 0]), flat([1, 0, 1]), rows, [Lit()]).categories) == ["two"]


def test_parts_become_metrics_only_where_they_apply_to_all() -> None:
    result = compare(flat([0.2] * 4), flat([0.4] * 4), prompts(4), [Brightness()])
    assert list(result.metrics) == ["brightness", "brightness/red"]
    assert np.isnan(result.scores["brightness/some"].base).all()
    assert result.main.scorer_std == (0.25, 0.25)


def test_seeds_of_a_prompt_are_one_cluster() -> None:
    rows = [EvalPrompt(f"p{i // 5}", seed=i) for i in range(20)]
    noise = torch.linspace(0, 0.3, 4).repeat_interleave(5).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    grouped = compare(flat([0.3] * 20), 0.3 + noise, rows, [Brightness()]).main
    assert (grouped.n, grouped.prompts) == (20, 4)
    alone = compare(flat([0.3] * 20), 0.3 + noise, prompts(20), [Brightness()]).main
    width, alone_width = np.diff(grouped.interval)[0], np.diff(alone.interval)[0]
    assert width > 1.5 * alone_width


def test_json_has_the_promised_numbers_and_no_nan() -> None:
    result, _, _ = lit_comparison()
    data = json.loads(json.dumps(result.as_json(), allow_nan=False))
    metric = data["metrics"]["lit"]
    assert {"base", "tuned", "difference", "interval", "n", "win_rate", "wins", "ties", "losses"} <= set(
        metric
    )
    low, high = metric["interval"]
    assert low <= metric["difference"] <= high
    assert set(data["categories"]) == {"even", "odd"}


class _Broken(Lit):
    name = "broken"

    def score(self, media, prompts):  # type: ignore[no-untyped-def]
        output = super().score(media, prompts)
        output.mean[0] = float("nan")
        return output


class _OfSets(Lit):
    kind = "set"


@pytest.mark.parametrize(
    ("tuned", "rewards", "message"),
    [
        (flat([1.0]), [Lit()], "2 base pictures, 1 tuned pictures and 2 prompts"),
        (flat([1.0, 1.0]), [], "no reward"),
        (flat([1.0, 1.0]), [_Broken()], "broken: base: 1 of 2 scores are not finite"),
        (flat([1.0, 1.0]), [_OfSets()], "judges image as sets"),
    ],
)
def test_what_cannot_be_compared_is_refused(tuned: torch.Tensor, rewards: list, message: str) -> None:
    with pytest.raises(DiffalignError, match=message):
        compare(flat([0.0, 0.0]), tuned, prompts(2), rewards)


def test_examples_are_the_extremes() -> None:
    result, _, _ = lit_comparison()
    scores = result.scores["lit"]
    gains, losses = biggest_gains(result, 5), biggest_losses(result, 5)
    assert len(gains) == 5
    assert all(scores.base[i] == 0 and scores.tuned[i] == 1 for i in gains)
    assert losses == [0, 9, 18]
    assert random_rows(result, 7) == random_rows(result, 7)
    assert len(set(random_rows(result, 100))) == 24


def test_no_gains_are_shown_when_there_are_none() -> None:
    images = flat([0.0, 1.0])
    assert biggest_gains(compare(images, images, prompts(2), [Lit()]), 5) == []


def test_verdict_says_what_was_lost() -> None:
    base = flat([1.0, 0.0] * 15)
    tuned = flat([0.0, 1.0] * 10 + [1.0, 1.0] * 5)
    text = verdict(compare(base, tuned, prompts(30), [Lit()]))
    assert "What was lost: lit for even fell by 66.7 points." in text
    assert "15 pictures that were wrong are right now, 10 that were right are wrong now." in text


def test_a_long_list_of_losses_is_cut() -> None:
    light, dark = flat([0.9] * 24), flat([0.1] * 24)
    result = compare(light, dark, prompts(24, ("a", "b", "c")), [Lit(), Brightness()])
    # Two metrics beside the main one, and three categories of two rewards: eight losses.
    assert verdict(result).count(" fell by ") == 4
    assert "; and 4 more." in verdict(result)


def test_same_model_twice_makes_the_same_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare_models` gives both models the same prompts and seeds, batch by batch."""
    calls: list[tuple[str, list[str], list[int]]] = []

    def generate(model, texts, seeds, *, steps, guidance, batch_size):  # type: ignore[no-untyped-def]
        calls.append((model, texts, seeds))
        return torch.stack([torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in seeds])

    monkeypatch.setattr("diffalign.evaluation.pictures.generate_images", generate)
    result, base, tuned = compare_models(
        "a", "b", prompts(5), [Brightness()], steps=2, guidance=1.0, batch_size=4, seed=0, seeds_per_prompt=2
    )
    assert [(m, len(t)) for m, t, _ in calls] == [("a", 4), ("a", 4), ("a", 2), ("b", 4), ("b", 4), ("b", 2)]
    assert [c[1:] for c in calls[:3]] == [c[1:] for c in calls[3:]]
    assert torch.equal(base[0:10], tuned[0:10])
    assert (result.main.n, result.main.prompts, result.main.change) == (10, 5, "no difference")
