"""Tables, budgets and curves of the benchmarks of online methods; nothing is trained and nothing is timed."""

import json
import sys
from pathlib import Path

import pytest

# Benchmarks are not part of the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import learning_curves, online_methods
from benchmarks.online_methods import (
    OPTIMISED,
    RECIPES,
    Run,
    budget,
    chosen,
    commands,
    curve,
    duration,
    smoothed,
    table,
)
from diffalign.config import load_recipe, trainer_config


@pytest.mark.parametrize("run", chosen(None, list(OPTIMISED), [0, 1]), ids=lambda run: run.name)
def test_every_cell_is_a_valid_recipe_with_the_budget_asked_for(run, tmp_path):
    train, evaluate = commands(run, tmp_path, 4096, 64)
    config = load_recipe(train[4], train[5:])
    options = trainer_config(config)
    assert (config.name, config.seed) == (run.name, run.seed)
    judged = {"reward": "scenes-judge", "measure": "score"}
    ensemble = OPTIMISED["ensemble"]["trainer.reward"]
    assert (
        options.reward
        == {"judge": judged, "preference": "scenes-preference", "ensemble": ensemble}[run.reward]
    )
    assert options.uncertainty == (1.0 if run.reward == "ensemble" else 0.0)
    rounds = config.optim.steps / (options.updates * options.passes)
    drawn = rounds * options.prompts_per_round * options.samples
    assert 0.9 * 4096 <= drawn <= 1.1 * 4096
    assert evaluate[3:] == [
        "evaluate",
        str(tmp_path / run.name),
        "--rewards",
        "scenes-judge,scenes-preference",
    ]


def test_cells_have_names_of_their_own_and_unknown_methods_are_refused():
    runs = chosen(None, list(OPTIMISED), [0, 1])
    assert len({run.name for run in runs}) == len(runs) == 2 * len(OPTIMISED) * len(RECIPES)
    with pytest.raises(ValueError, match="should be of: PRDP"):
        chosen(["ppo"], ["judge"], [0])
    with pytest.raises(ValueError, match="should be of: judge, preference"):
        chosen(None, ["scenes-judge"], [0])


def test_an_interrupted_cell_is_resumed(tmp_path):
    run = Run("RAFT", "judge", 0)
    assert "--resume" not in commands(run, tmp_path, 100, 8)[0]
    (tmp_path / run.name / "checkpoints").mkdir(parents=True)
    assert commands(run, tmp_path, 100, 8)[0][-1] == "--resume"


def test_curves_count_samples_up_to_the_end_of_each_round(tmp_path):
    run = Run("RAFT", "judge", 0)
    _, each = budget(RECIPES["RAFT"], 1)
    (tmp_path / run.name).mkdir()
    lines = [
        {"step": 0, "round/number": 0, "round/reward": 0.5, "seconds": 3.0},
        {"step": 1, "loss": 1.0, "seconds": 4.0},
        {"step": 4, "round/number": 1, "round/reward": 0.75, "seconds": 7.0},
    ]
    (tmp_path / run.name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curve(tmp_path, run) == {"samples": [each, 2 * each], "seconds": [3.0, 7.0], "reward": [0.5, 0.75]}


def test_the_table_shows_an_interval_for_one_seed_and_the_spread_for_several():
    def judged(points):
        each = {"difference": points / 100, "interval": [points / 100 - 0.02, points / 100 + 0.02]}
        names = {name for name, _ in online_methods.COLUMNS.values()}
        return {"metrics": dict.fromkeys(names, each), "drift": {"kl": points}}

    runs = [Run("RAFT", "judge", 0), Run("RAFT", "judge", 1), Run("NFT", "judge", 0)]
    done = dict(zip(runs, map(judged, (4, 6, 3)), strict=True))
    curves = {key: {"samples": [64, 128], "seconds": [5.0, 9.0], "reward": [0.0, 1.0]} for key in runs}
    lines = table(done, curves, dict(zip(runs, (9.0, 11.0, 3.0), strict=True)))
    assert lines[2].startswith("| RAFT | judge | +5.0 ± 1.4 (+4.0, +6.0) |")
    assert lines[3].startswith("| NFT | judge | +3.0 (+1.0 to +5.0) |")
    assert lines[2].endswith("| 5.0 | 128 | 10 |")
    assert [line.count("|") for line in lines] == [9] * 4


def test_seconds_are_those_of_the_last_line(tmp_path):
    run = Run("RAFT", "judge", 0)
    (tmp_path / run.name).mkdir()
    lines = [{"step": 0, "round/reward": 0.5, "seconds": 3.0}, {"step": 4, "loss": 1.0, "seconds": 8.0}]
    (tmp_path / run.name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert duration(tmp_path, run) == 8.0


def test_running_means():
    assert smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_a_watched_run_is_a_valid_recipe(tmp_path):
    words = learning_curves.command("inpo", "tiny-sdxl", tmp_path, 40, 10, 32)
    config = load_recipe(words[4], words[5:])
    assert (config.evaluation.every, config.evaluation.monitor.num_prompts, config.optim.steps) == (
        10,
        32,
        40,
    )
    assert config.trainer["method"] == "inpo"


def test_looks_are_read_in_order(tmp_path):
    lines = [
        {"step": 0, "monitor/scenes-judge": 0.5, "monitor/kl": 0.0},
        {"step": 5, "loss": 0.1},
        {"step": 10, "monitor/scenes-judge": 0.6, "monitor/kl": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert learning_curves.curve(tmp_path) == [(0, 0.5, 0.0), (10, 0.6, 4.0)]
