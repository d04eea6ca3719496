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
    averaged,
    chosen,
    commands,
    curve,
    drawn_samples,
    duration,
    table,
)
from diffalign.config import load_recipe, save_config, trainer_config


@pytest.mark.parametrize("run", chosen(None, list(OPTIMISED), [0, 1]), ids=lambda run: run.name)
def test_every_cell_is_a_valid_recipe_with_the_budget_asked_for(run, tmp_path):
    train, evaluate = commands(run, tmp_path, 4096, 64)
    config = load_recipe(train[4], train[5:])
    options = trainer_config(config)
    assert (config.name, config.seed) == (run.name, run.seed)
    share = {"reward": "scenes-judge", "measure": "score"}
    judged = "scenes-judge" if run.method == "DDPO" else share
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


@pytest.fixture
def finished(tmp_path):
    """A run of four rounds with looks at the start, in the middle and at the end."""
    run = Run("RLCM", "judge", 0)
    folder = tmp_path / run.name
    folder.mkdir()
    save_config(load_recipe("scenes/rlcm"), folder / "config.yaml")
    lines = [
        {"step": 0, "round/reward": 0.5, "seconds": 4.0},
        {"step": 0, "monitor/scenes-judge-score": 0.5, "seconds": 3.0},
        {"step": 1, "loss": 1.0, "seconds": 5.0},
        *({"step": 16 * n, "round/reward": 0.5, "seconds": 9.0} for n in (1, 2, 3)),
        {"step": 32, "monitor/scenes-judge-score": 0.52, "seconds": 20.0},
        {"step": 64, "monitor/scenes-judge-score": 0.55, "seconds": 43.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run, tmp_path


def test_curves_are_gains_at_looks_over_samples_drawn_before(finished):
    run, folder = finished
    found = curve(folder, run)
    assert found["samples"] == [0, 2048, 4096]
    assert found["seconds"] == [0.0, 17.0, 40.0]
    assert found["gain"] == pytest.approx([0.0, 2.0, 5.0])
    assert (drawn_samples(folder, run), duration(folder, run)) == (4096, 43.0)


def test_curves_of_seeds_are_averaged_look_by_look_and_drawn(tmp_path):
    one = {"samples": [0, 64], "seconds": [0.0, 2.0], "gain": [0.0, 3.0]}
    two = {"samples": [0, 64, 128], "seconds": [0.0, 4.0, 8.0], "gain": [0.0, 5.0, 9.0]}
    assert averaged([one, two]) == {"samples": [0, 64], "seconds": [0.0, 3.0], "gain": [0.0, 4.0]}
    runs = {Run("RLCM", "judge", 0): one, Run("RLCM", "judge", 1): two}
    unwatched = {Run("NFT", "judge", 0): {"samples": [], "seconds": [], "gain": []}}
    online_methods.draw(runs | unwatched, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_table_shows_an_interval_for_one_seed_and_the_spread_for_several():
    def judged(points):
        each = {"difference": points / 100, "interval": [points / 100 - 0.02, points / 100 + 0.02]}
        names = {name for name, _ in online_methods.COLUMNS.values()}
        return {"metrics": dict.fromkeys(names, each), "drift": {"kl": points}}

    runs = [Run("RAFT", "judge", 0), Run("RAFT", "judge", 1), Run("NFT", "judge", 0)]
    done = dict(zip(runs, map(judged, (4, 6, 3)), strict=True))
    lines = table(done, dict.fromkeys(runs, 128), dict(zip(runs, (9.0, 11.0, 3.0), strict=True)))
    assert lines[2].startswith("| RAFT | judge | +5.0 ± 1.4 (+4.0, +6.0) |")
    assert lines[3].startswith("| NFT | judge | +3.0 (+1.0 to +5.0) |")
    assert lines[2].endswith("| 5.0 | 128 | 10 |")
    assert [line.count("|") for line in lines] == [9] * 4


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
