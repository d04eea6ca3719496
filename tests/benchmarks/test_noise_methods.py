import sys
from pathlib import Path

import pytest

# Benchmarks are not part of the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.noise_methods import (
    BEST_OF_N,
    COST,
    EVALUATIONS,
    GROUPS,
    command,
    diversity_table,
    folder_name,
    table,
)
from diffalign.inference.config import load_optimize_recipe
from diffalign.inference.methods import METHODS, method_config

ROWS = [(group, row) for group, setting in GROUPS.items() for row in setting.rows]


def overrides_of(group, row):
    words = command(group, row, Path("runs"), None)
    return words[4], words[5 : words.index("--num-prompts")]


@pytest.mark.parametrize(("group", "row"), ROWS)
def test_every_row_is_a_valid_run(group, row):
    recipe, overrides = overrides_of(group, row)
    config = load_optimize_recipe(recipe, overrides)
    options = method_config(config.method)
    if group == "methods":
        assert (config.generation.steps, config.generation.guidance) == (8, 4)
        gradient = METHODS[options.method].kind in ("gradient", "hybrid")
        # A gradient method makes a third as many pictures, each with a backward pass of twice the cost.
        if options.method in ("universal_guidance", "noisy_reward"):
            assert config.budget.evaluations == 10 * COST
        elif gradient:
            assert (config.budget.evaluations, options.iterations) == (None, 10)
        else:
            assert config.budget.evaluations == EVALUATIONS


def test_folders_differ():
    names = [folder_name(*row) for row in ROWS]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() for name in names)


def found(before, after, judged):
    prompts = [
        {"reward": {"before": b, "after": a}, "held_out": {"scenes-judge": {"before": 0.0, "after": j}}}
        for b, a, j in zip(before, after, judged, strict=True)
    ]
    cost = {"evaluations": 512, "backwards": 0, "seconds": 8.0}
    return {"reward": "r", "cost": cost, "prompts": prompts}


def test_a_row_shows_its_gain_and_its_lead_over_best_of_n():
    done = {
        BEST_OF_N: found([1, 1], [2, 2], [0, 0]),
        "zero-order": found([1, 1], [2.5, 2.5], [1, 1]),
    }
    lines = table(done)
    expected = f"| {BEST_OF_N} | 512 + 0 | 4.0 | 2.00 | +1.00 (+1.00 to +1.00) |  | 0 % | +0 (+0 to +0) |"
    assert lines[2] == expected
    assert "| 2.50 | +1.50 (+1.50 to +1.50) | +0.50 (+0.50 to +0.50) | 100 % |" in lines[3]
    assert lines[-1] == "Before: 1.00 (of the first row's reward), judge 0 %."


def test_archives_are_compared_with_independent_noises():
    notes = {"coverage": 0.6, "coverage_independent": 0.5, "qd_score": 20.0, "qd_score_independent": 15.0}
    lines = diversity_table({"640 pictures": {"prompts": [{"notes": notes}] * 3}})
    assert lines[2] == "| 640 pictures | 3 | coverage | 0.60 | 0.50 | +0.10 (+0.10 to +0.10) |"
    assert lines[3] == "| 640 pictures | 3 | qd_score | 20 | 15 | +5 (+5 to +5) |"
