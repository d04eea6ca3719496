"""The study of loops of curation: what it reads of a run, trends, figures. The theory: test_curation.py."""

import json
import sys
from pathlib import Path

import pytest

# Benchmarks are not part of the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import self_consuming as study
from diffalign.errors import DiffalignError


def run_folder(folder: Path, numbers: list[int]) -> Path:
    """A run whose round n had mean n and deviation n / 2."""
    folder.mkdir()
    lines = [{"step": 0, "loss": 1.0}]
    for n in numbers:
        lines.append(
            {
                "step": n,
                "round/number": n,
                "round/reward": n,
                "round/reward_std": n / 2,
                "round/kept_reward": n + 1,
                "round/part/brightness": n / 10,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_rounds_are_read_once_each_and_in_order(tmp_path):
    found = study.run_rounds(run_folder(tmp_path / "run", [0, 1, 1, 2]))
    assert found == {
        "round": [0, 1, 2],
        "reward": [0, 1, 2],
        "variance": [0, 0.25, 1],
        "kept_reward": [1, 2, 3],
    }


def test_parts_of_the_reward_are_read_and_unknown_ones_refused(tmp_path):
    run = run_folder(tmp_path / "run", [0, 1, 2])
    assert study.run_rounds(run, ["brightness"])["brightness"] == [0, 0.1, 0.2]
    with pytest.raises(DiffalignError, match="no part 'colour' of its reward; it has: brightness"):
        study.run_rounds(run, ["colour"])
    study.main(tmp_path / "out", [run], rounds=3, part=["brightness"])
    numbers = json.loads((tmp_path / "out" / "self_consuming.json").read_text())
    assert numbers["runs"]["run"]["brightness"] == [0, 0.1, 0.2]


@pytest.mark.parametrize("lines", ["", '{"step": 1, "loss": 0.5}\n'])
def test_a_folder_without_rounds_is_refused(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(DiffalignError, match="no rounds"):
        study.run_rounds(tmp_path)
    with pytest.raises(DiffalignError, match="no rounds"):
        study.run_rounds(tmp_path / "nowhere")


def test_a_trend_is_the_rise_of_the_fitted_line():
    assert study.trend([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(4.0)
    assert study.trend([1.0, 3.0, 1.0]) == pytest.approx(0.0)


def test_the_study_writes_figures_and_numbers(tmp_path):
    study.main(tmp_path / "out", [run_folder(tmp_path / "run", [0, 1])], rounds=3)
    numbers = json.loads((tmp_path / "out" / "self_consuming.json").read_text())
    assert [len(course["reward"]) for course in numbers["theory"]] == [4] * len(study.SETTINGS)
    assert numbers["runs"]["run"]["reward"] == [0, 1]
    pure, mixed = numbers["theory"][0], numbers["theory"][2]
    assert pure["favoured"][0] == pytest.approx(0.5)
    assert pure["favoured"][3] > mixed["favoured"][3] > 0.5
    assert all((tmp_path / "out" / name).stat().st_size > 5_000 for name in ("theory.png", "runs.png"))
