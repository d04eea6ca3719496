import json
import sys
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

# Benchmarks are not part of the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import scorer_agreement, scorers
from diffalign.rewards import load_reward
from diffalign.samples.preferences import Pair, write_pairs
from diffalign.samples.scenes import Placed, draw
from diffalign.samples.train_scorers import read_pairs

RED, BLUE = (draw((Placed("circle", color, 30, 34, 11),)) for color in ("red", "blue"))
STAR = draw((Placed("star", "red", 30, 34, 11),))


@pytest.fixture
def pairs_file(tmp_path):
    rows = [
        Pair("a red circle", (RED, BLUE), 1.0),
        Pair("a blue circle", (RED, BLUE), 1.0),
        Pair("a yellow square", (RED, BLUE), 0.0),
        Pair("a red circle", (STAR, RED), 0.0),
    ]
    write_pairs(tmp_path / "pairs.parquet", rows)
    return tmp_path / "pairs.parquet"


def run(main, *arguments):
    app = Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_gold_is_the_judge_not_the_label(pairs_file):
    assert scorer_agreement.gold_labels(read_pairs(pairs_file)).tolist() == [1, 0, 0.5, 0]


def test_opinions_are_about_the_first_picture_against_the_second(pairs_file):
    found = scorer_agreement.opinions(read_pairs(pairs_file))
    clip = load_reward("scenes-clip")
    first, second = (
        clip.score(
            torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255, ["a red circle"]
        ).mean
        for picture in (RED, BLUE)
    )
    # The stored pictures are JPEGs.
    assert found["scenes-clip"].margin[0] == pytest.approx((first - second).item(), abs=0.05)
    assert (found["scenes-clip"].probability > 0.5).tolist() == (found["scenes-clip"].margin > 0).tolist()
    members = [found[f"scenes-preference {i}"].margin for i in range(5)]
    assert found["scenes-ensemble"].margin == pytest.approx(sum(members) / 5, abs=1e-5)


def test_agreement_prints_writes_and_draws(pairs_file, tmp_path):
    output = run(
        scorer_agreement.main,
        *("--pairs", pairs_file, "--plot", tmp_path / "plot.png", "--json", tmp_path / "result.json"),
    )
    assert "4 pairs, 1 of them tied by the judge" in output
    # Of the three decided pairs one label is wrong.
    assert "66.7 % of the labels" in output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["scorers"]["scenes-clip"]["judge"]["accuracy"]["n"] == 3
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_throughput_of_a_tiny_scorer(tmp_path):
    reward = load_reward("scenes-clip")
    row = scorers.measure(reward, size=64, count=3, repeats=1, warmup=0, device="cpu")
    assert row["batched"] > 0
    assert row["ratio"] == pytest.approx(row["batched"] / row["one by one"])
    path = tmp_path / "result.json"
    output = run(scorers.main, *("--repeats", 1, "--warmup", 0, "--batch", 2, "--large", "", "--json", path))
    assert "pictures per second" in output
    assert [row["scorer"] for row in json.loads(path.read_text())["rows"]] == list(scorers.TINY)


def test_both_ways_of_the_throughput_benchmark_give_the_same_scores():
    reward = load_reward("scenes-ensemble")
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ways = scorers.runs(reward, pictures, ["a red circle", "a star", "two blue squares"])
    torch.testing.assert_close(ways["batched"](), torch.cat(ways["one by one"]()), atol=1e-5, rtol=1e-5)
