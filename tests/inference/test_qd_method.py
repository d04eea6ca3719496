"""QDHF as a method: what it is given, what it reports, its files, its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from few_steps import PROMPTS, RED, folder, turbo
from PIL import Image

from diffalign import cli
from diffalign.errors import DiffalignError
from diffalign.inference.budget import Budget, Meter
from diffalign.inference.config import GenerationConfig
from diffalign.inference.diversity import Axes, judged_by
from diffalign.inference.generation import Generation
from diffalign.inference.noise_file import read_noises
from diffalign.inference.objective import Objective
from diffalign.inference.problem import Problem
from diffalign.inference.qd import QualityDiversity, QualityDiversityConfig, empty_archive
from diffalign.inference.qdhf import (
    QDHF,
    SCENES,
    Eyes,
    QDHFConfig,
    independent,
    lowest,
    sheet_of,
)
from diffalign.inference.run import optimize
from diffalign.inference.search import draw
from diffalign.inference.trace import begun
from diffalign.rewards import FunctionReward
from diffalign.rewards.encoders import PixelEncoder

ONE = GenerationConfig(steps=1, guidance=0.0, batch_size=16)
SMALL = {
    "method": "qd",
    "encoder": "pixels:2",
    "initial": 12,
    "grid": 4,
    "refits": [0, 0.5],
    "judgements": 40,
    "sheet": 2,
}


def found(evaluations=40, reward=RED, **options):
    return optimize(
        turbo(), PROMPTS, reward, method={**SMALL, **options}, generation=ONE, budget=Budget(evaluations=evaluations),
        baseline="none",
    )  # fmt: skip


def problem_of(reward=RED, budget=None):
    generation = Generation(turbo(), PROMPTS, steps=1, guidance=0.0, batch_size=16)
    start = generation.start([1, 2])
    return Problem(generation, Objective(reward), Meter(budget or Budget(), 2), start, [1, 2])


@pytest.fixture(scope="module")
def run():
    """A short run by RED with axes from 2 x 2 pixels, and its parts: problem, trace, method."""
    problem = problem_of(budget=Budget(evaluations=40))
    trace = begun(problem.meter, problem.start, torch.zeros(2), torch.zeros(2, 3, 64, 64), 0)
    QDHF(QDHFConfig(**SMALL)).run(problem, trace)
    return problem, trace


def test_figures_of_both_archives_are_noted(run):
    problem, trace = run
    notes = trace.notes
    names = {"coverage", "qd_score", "coverage_independent", "qd_score_independent", "floor", "agreement"}
    assert set(notes) == names
    assert all(values.shape == (2,) and values.isfinite().all() for values in notes.values())
    for name in ("coverage", "coverage_independent"):
        assert ((notes[name] > 0) & (notes[name] <= 1)).all()
        assert torch.equal(notes[name] * 16, (notes[name] * 16).round())
    assert problem.meter.evaluations == 40, "independent noises and the sheet do not count as the method's"
    assert [point.evaluations for point in trace.points] == [8, 16, 24, 32, 40]
    # With pixels judged by the same pixels, two axes keep most of the order.
    assert (notes["agreement"] >= 0.5).all()


def test_qd_score_is_above_the_floor_of_everything_seen(run):
    """At most (cells filled) x (best - floor), at least best - floor."""
    _, trace = run
    best, notes = trace.rewards, trace.notes
    assert (notes["qd_score"] >= best - notes["floor"] - 1e-5).all()
    assert (notes["qd_score"] <= 16 * notes["coverage"] * (best - notes["floor"]) + 1e-5).all()


def test_sheets_show_elites_with_their_rewards_and_noises(run):
    problem, trace = run
    assert set(trace.sheets) == {0, 1}
    for row, sheet in trace.sheets.items():
        shown = [i for i, label in enumerate(sheet.labels) if label]
        assert sheet.pictures.shape == (4, 3, 64, 64)
        assert len(sheet.noises) == len(shown) >= 2
        again = problem.generation.media(sheet.noises, [row] * len(shown))
        torch.testing.assert_close(again, sheet.pictures[shown], atol=1e-5, rtol=0)
        labels = [float(sheet.labels[i]) for i in shown]
        assert labels == pytest.approx(RED.score(again, [""] * len(again)).mean.tolist(), rel=6e-3)
        empty = [i for i in range(4) if i not in shown]
        assert (sheet.pictures[empty] == 1).all()


def test_a_search_climbs_and_keeps_different_pictures():
    """Reward: the mean. Diversity: which half is brighter. Elites of other cells differ, and all rise."""
    backbone = problem_of()
    method = QDHF(QDHFConfig(**{**SMALL, "judgements": 0, "sigma": 0.7, "sheet": 0}))
    problem = Problem(
        backbone.generation, backbone.objective, Meter(Budget(evaluations=120), 2), backbone.start, [1, 2]
    )
    trace = begun(problem.meter, problem.start, torch.full((2,), -1.0), torch.zeros(2, 3, 64, 64), 0)
    method.run(problem, trace)
    assert (trace.notes["qd_score"] > trace.notes["qd_score_independent"]).all()
    assert (trace.notes["coverage"] >= trace.notes["coverage_independent"]).all()
    assert trace.notes["agreement"].isnan().all(), "nobody judged"
    assert trace.sheets == {}


def test_eyes_see_every_candidate_in_its_place():
    problem = problem_of(budget=Budget(evaluations=3))
    eyes = Eyes(QDHFConfig(encoder="pixels:2", proxy="pixels:1"), problem)
    noises = draw([1, 2], 5, problem.first.shape[1:], "x")
    judged, features, similar = eyes.judge(noises)
    assert features.shape == (2, 5, 12)
    assert similar.shape == (2, 5, 3)
    assert features[:, 3:].isnan().all(), "the budget reaches three"
    for row in range(2):
        media = problem.generation.media(problem.full(noises[row, :3], [row] * 3), [row] * 3)
        torch.testing.assert_close(features[row, :3], PixelEncoder(2).embed(media), atol=1e-5, rtol=0)
        torch.testing.assert_close(similar[row, :3], PixelEncoder(1).embed(media), atol=1e-5, rtol=0)
    torch.testing.assert_close(judged.rewards[:, :3], similar[:, :3, 0], atol=1e-5, rtol=0)


def test_the_proxy_judges_by_its_own_features(monkeypatch):
    """Triplets are of elites, and each of them is judged by what the proxy saw of that very picture."""
    asked = []

    def spy(features):
        asked.append(features)
        return judged_by(features)

    monkeypatch.setattr("diffalign.inference.qdhf.judged_by", spy)
    run = found(16, proxy="pixels:1", refits=[0.0])
    assert [each.shape for each in asked] == [(40, 3, 3)] * 2
    assert run.notes["agreement"].isfinite().all()


def test_independent_noises_are_as_many_and_cost_nothing_of_the_budget():
    problem = problem_of(budget=Budget(evaluations=1))
    eyes = Eyes(QDHFConfig(encoder="pixels:2"), problem)
    rewards, features = independent(problem, eyes, 11)
    assert rewards.shape == (2, 11)
    assert features.shape == (2, 11, 12)
    assert rewards.isfinite().all()
    assert len(set(rewards[0].tolist())) == 11
    assert problem.meter.evaluations == 0


def test_other_pictures_are_placed_on_the_axes_of_a_search():
    """Features (x, y) in the box from 0 to 1 with 2 x 2 cells: 0 = lower left, 3 = upper right."""
    search = QualityDiversity(torch.zeros(2, 1), [0, 1], QualityDiversityConfig(grid=2))
    assert search.placed(torch.zeros(2, 1), torch.zeros(2, 1, 2)) == [None, None]
    axes = Axes(torch.zeros(2), torch.eye(2), torch.zeros(2), torch.ones(2))
    search._rows[0] = search._placed(search._rows[0].__class__(
        torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, 2), torch.empty(0, 3, 2), torch.empty(0)
    ), axes)  # fmt: skip
    features = torch.tensor([[[0.1, 0.2], [0.2, 0.1], [0.9, 0.9], [0.9, 0.1], [0.1, torch.nan]]])
    rewards = torch.tensor([[1.0, 2.0, 3.0, torch.nan, 9.0]])
    archive, nothing = search.placed(rewards.repeat(2, 1), features.repeat(2, 1, 1))
    assert nothing is None
    assert archive.rewards.tolist() == [2.0, float("-inf"), float("-inf"), 3.0]
    assert (archive.coverage, archive.score(1.0)) == (0.5, 3.0)


def test_axes_are_learned_at_shares_of_the_rounds():
    """12 first noises are 2 rounds of 8; 96 pictures leave 10 more: after 0, 1, 2 and 5 of these."""
    method = QDHF(QDHFConfig(initial=12))
    assert method._refits(problem_of(budget=Budget(evaluations=96))) == {2, 3, 4, 7}
    # Without a budget of evaluations: 80 rounds, of which 78 are left.
    assert method._refits(problem_of(budget=Budget(seconds=9))) == {2, 9, 21, 41}
    assert QDHF(QDHFConfig(judgements=0))._refits(problem_of()) == set()


def test_the_floor_is_the_lowest_of_both_and_never_a_failure():
    told = torch.tensor([[1.0, torch.nan, 3.0], [4.0, 5.0, -torch.inf]])
    assert lowest(told, torch.tensor([[2.0], [-1.0]])).tolist() == [1.0, -1.0]
    assert lowest(told, None).tolist() == [1.0, 4.0]


def test_a_sheet_by_hand():
    """2 x 2 cells, elites at lower right (2) and upper left (1): two places stay white."""
    problem = problem_of()
    archive = empty_archive(4, problem.first.shape[1:], 2)
    noises = draw([7], 2, problem.first.shape[1:], "x")[0]
    archive = archive.insert(torch.tensor([2, 1]), noises, torch.tensor([0.5, 0.25]), torch.zeros(2, 2))
    sheet = sheet_of(archive, QDHFConfig(grid=2, sheet=9), problem, 1)
    assert list(sheet.labels) == ["0.25", "", "", "0.5"]
    assert sheet.columns == 2
    assert torch.equal(sheet.noises[:, 0], noises.flip(0))


def test_the_folder_holds_figures_sheets_and_noises_to_replay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = [
        "optimize",
        str(folder("sdxl-turbo")),
        "--prompt",
        PROMPTS[0],
        "--reward",
        "brightness",
        "--method",
        "qd",
    ]
    options = [
        "method.encoder=pixels:2",
        "method.initial=8",
        "method.grid=4",
        "method.sheet=3",
        "baseline=none",
    ]
    assert cli.run([*line, "--budget", "24", "--out", "o", *options]) == 0
    result = json.loads(Path("o/result.json").read_text())
    notes = result["prompts"][0]["notes"]
    assert 0 < notes["coverage"] <= 1
    assert notes["qd_score"] > 0
    assert "coverage_independent" in notes
    text = Path("o/report.md").read_text()
    assert f"| coverage | {notes['coverage']:.4g} |" in text
    assert f"![{PROMPTS[0]}](archive/0000.png)" in text
    picture = Image.open("o/archive/0000.png")
    assert picture.width == 3 * 128 + 4 * 10
    count = len(read_noises(Path("o/archive/0000.safetensors")).noises)
    assert 1 < count <= 9
    assert cli.run(["optimize", "--replay", "o/archive/0000.safetensors", "--out", "again"]) == 0
    assert len(list(Path("again").iterdir())) == count


def test_what_does_not_fit_is_refused():
    assert "the budget allows 6 pictures per prompt, but method.initial is 12" in found(6).stopped
    assert "unknown encoder 'pixel:2'" in found(encoder="pixel:2").stopped
    failing = FunctionReward(
        lambda images, prompts: [float("nan") if "two" in p else 1.0 for p in prompts], "half"
    )
    with pytest.raises(DiffalignError, match="first picture of prompt 1 has the reward nan"):
        found(reward=failing)


def test_a_prompt_whose_pictures_fail_has_no_archive_and_the_others_do():
    class Later:
        """Scores the first pictures; fails on one prompt after them."""

        name, modality, differentiable, kind, calls = "later", "image", False, "sample", 0

        def score(self, media, prompts):
            self.calls += 1
            scores = RED.score(media, prompts)
            bad = torch.tensor(["two" in p and self.calls > 1 for p in prompts])
            return type(scores)(torch.where(bad, torch.nan, scores.mean))

    run = found(24, reward=Later())
    assert run.failures == {1: "fewer than method.initial=12 pictures could be judged"}
    assert run.notes["coverage"].isfinite().tolist() == [True, False]
    assert set(run.sheets) == {0}


def test_the_embedded_world_has_its_own_encoder():
    problem = problem_of()
    problem.generation.backbone.config = problem.generation.backbone.config.model_copy(
        update={"path": "scenes:x"}
    )
    assert Eyes(QDHFConfig(), problem).encoder.name == SCENES
