"""The report: complete, self-contained, and safe against what prompts contain."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from fakes import Brightness, Lit, flat, lit_comparison
from PIL import Image

from diffalign.config import RunConfig, save_config
from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import compare
from diffalign.evaluation.drift import Drift
from diffalign.evaluation.history import held_out_metrics, read_history, series
from diffalign.evaluation.prompts import EvalPrompt
from diffalign.evaluation.report import data_uri, spread, write_report
from diffalign.evaluation.result import Evaluation, save_evaluation
from diffalign.evaluation.side_effects import side_effects
from diffalign.rewards.encoders import load_encoder

HOSTILE = '<script>alert("x")</script> & <img src=https://evil.example/x.png>'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a history of 20 steps and two sample grids."""
    config = RunConfig.model_validate(
        {
            "name": "demo",
            "model": {"path": "scenes:tiny-sdxl"},
            "data": {"source": "scenes:preferences", "resolution": 64},
            "trainer": {"method": "dpo", "beta": 500.0},
            "optim": {"lr": 1e-4, "steps": 20, "batch_size": 4},
        }
    )
    save_config(config, tmp_path / "config.yaml")
    lines = [
        {"step": s, "loss": 0.7 - s / 100, "implicit_accuracy": 0.5 + s / 50, "margin": s / 10,
         "chosen_delta": -s / 1000, "rejected_delta": s / 1000}
        for s in range(1, 21)
    ]  # fmt: skip
    lines += [
        {"step": s, "held_out/implicit_accuracy": 0.5 + s / 100, "held_out/implicit_accuracy_low": 0.4,
         "held_out/implicit_accuracy_high": 0.75, "held_out/pairs": 200.0, "held_out/margin": None}
        for s in (10, 20)
    ]  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 21, "lo', encoding="utf-8")
    (tmp_path / "samples").mkdir()
    for step in (0, 20):
        Image.new("RGB", (40, 20), "navy").save(tmp_path / "samples" / f"step-{step:06d}.png")
    return tmp_path


def _evaluation() -> Evaluation:
    comparison, base, tuned = lit_comparison()
    settings = {"steps": 4, "guidance": 2.0, "rewards": ["lit"], "versions": {"torch": "9.9"}}
    return Evaluation(comparison, base, tuned, settings, {"implicit_accuracy": 0.7, "pairs": 200.0})


def _assert_self_contained(html: str) -> None:
    loaded = re.findall(r'(?:src|href|srcset|data|action)\s*=\s*["\']?([^"\'\s>]+)', html)
    loaded += re.findall(r"url\(([^)]*)\)|@import\s+([^;]+)", html)
    for target in ("".join(t) for t in loaded):
        assert target.startswith(("data:image/", "#")), target
    assert not re.search(r"<(script|link|iframe|object|embed)\b", html)


def test_training_report_without_an_evaluation(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    _assert_self_contained(html)
    assert "Not evaluated on pictures yet" in html
    assert "70.0 %" in html
    for chart in ("Loss", "Implicit accuracy", "Margin", "Error against the reference"):
        assert f'aria-label="{chart}"' in html
    assert html.count('alt="samples at step') == 2
    assert "beta 500 for errors that are a mean over latent elements" in html


def test_full_report_shows_the_numbers(run: Path) -> None:
    evaluation = _evaluation()
    html = write_report(run, evaluation).read_text(encoding="utf-8")
    _assert_self_contained(html)
    main = evaluation.comparison.main
    assert f"{100 * main.base:.1f} %" in html
    assert f"{100 * main.tuned:.1f} %" in html
    assert f"{main.wins.wins} wins" in html
    assert "Biggest gains" in html
    assert "What was lost" in html
    assert "values per category" in html
    assert html.count("<svg") == html.count("</svg>") == 7
    assert "torch 9.9" in html


def test_prompts_are_escaped(run: Path) -> None:
    rows = [EvalPrompt(HOSTILE, "<b>odd</b>", 1), EvalPrompt(HOSTILE + "!", "<b>odd</b>", 2)]
    base, tuned = flat([0.0, 0.0]), flat([1.0, 1.0])
    comparison = compare(base, tuned, rows, [Lit(), Brightness()])
    evaluation = Evaluation(comparison, base, tuned, {"prompts": HOSTILE}, {})
    html = write_report(run, evaluation).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<b>odd" not in html
    assert "evil.example" in html
    assert "<img src=https" not in html


def test_no_difference_is_said(run: Path) -> None:
    images = flat([0.0, 1.0, 0.0])
    comparison = compare(images, images, [EvalPrompt(str(i)) for i in range(3)], [Lit()])
    html = write_report(run, Evaluation(comparison, images, images, {}, {})).read_text(encoding="utf-8")
    assert "No difference: lit is 33.3 % for both" in html
    assert "Biggest gains" not in html


def test_report_of_a_run_that_has_logged_nothing(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    html = write_report(run).read_text(encoding="utf-8")
    assert "<h2>Training</h2>" not in html
    assert "How to do it again" in html


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"has no config.yaml"):
        write_report(tmp_path)


def test_saved_evaluation_holds_the_same_numbers(run: Path) -> None:
    evaluation = _evaluation()
    save_evaluation(run, evaluation)
    data = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    main = evaluation.comparison.main
    assert data["metrics"]["lit"]["difference"] == main.difference
    assert data["metrics"]["lit"]["interval"] == list(main.interval)
    assert data["implicit_accuracy"]["value"] == 0.7
    lines = (run / "evaluation" / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 24
    assert json.loads(lines[1])["scores"]["lit"] == [0.0, 1.0]
    with Image.open(run / "comparison.png") as grid:
        assert grid.width > 500


def test_history_takes_the_last_record_of_a_step_and_skips_gaps(run: Path) -> None:
    (run / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 1.0}\n{"step": 1, "loss": 3.0}\n'
        '{"step": 2, "loss": 2.0}\n{"step": 3, "loss": null}\n'
    )
    assert series(read_history(run), "loss") == [(1.0, 3.0), (2.0, 2.0)]


def test_held_out_metrics_are_the_last_finite_ones(run: Path) -> None:
    found = held_out_metrics(read_history(run))
    assert found["implicit_accuracy"] == 0.7
    assert "margin" not in found


def test_large_pictures_are_reduced_small_ones_kept_exactly() -> None:
    small = Image.new("RGB", (16, 16), (1, 2, 3))
    kind, data = data_uri(small).split(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as again:
        assert again.getpixel((5, 5)) == (1, 2, 3)
    kind, data = data_uri(Image.new("RGB", (2000, 1000))).split(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as again:
        assert (kind, again.size) == ("data:image/jpeg;base64", (320, 160))


@pytest.mark.parametrize(("total", "expected"), [(0, []), (2, [0, 1]), (5, [0, 2, 4]), (100, [0, 50, 99])])
def test_spread_keeps_the_ends(total: int, expected: list[int]) -> None:
    assert spread(total, 3) == expected


def test_warnings_side_effects_and_losses_are_shown(run: Path) -> None:
    comparison, base, tuned = lit_comparison()
    rows = [EvalPrompt(f"p{i % 9} {HOSTILE}", f"c{i % 2}", i) for i in range(24)]
    comparison = compare(base, tuned, rows, [Lit(), Brightness()])
    drift = Drift(12.5, (10.0, 15.0), 0.0125, 0.08, 24, 8)
    effects = side_effects(base, tuned, rows, load_encoder("pixels:2"))
    warnings = [f"lit and {HOSTILE} share a backbone"]
    evaluation = Evaluation(comparison, base, tuned, {}, {}, warnings, effects, drift)
    html = write_report(run, evaluation).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<img src=https" not in html
    assert html.index("Read this first") < html.index("Measurements") < html.index("Side effects")
    assert html.index("Side effects") < html.index("What was lost") < html.index("Side by side")
    assert "12.5 nats" in html
    assert "10 to 15; 0.013 per latent element" in html
    assert "diversity over seeds" in html
    assert "Prompts that fell most" in html
    assert f"{len(evaluation.lost.flips['lit'].lost)} pictures that were right are wrong now" in html
    assert f"median {comparison.metrics['brightness'].medians[1]:.4g}" in html


def test_no_losses_are_said(run: Path) -> None:
    dark, light = flat([0.1] * 6), flat([0.9] * 6)
    comparison = compare(dark, light, [EvalPrompt(str(i)) for i in range(6)], [Lit()])
    html = write_report(run, Evaluation(comparison, dark, light, {}, {})).read_text(encoding="utf-8")
    assert "No scorer got worse" in html
    assert "Read this first" not in html
    assert "Side effects" not in html


def test_saved_evaluation_gains_the_new_entries(run: Path) -> None:
    evaluation = _evaluation()
    save_evaluation(run, evaluation)
    data = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert set(data) == {
        "warnings", "metrics", "categories", "skipped", "sets", "side_effects", "drift", "lost", "implicit_accuracy",
        "settings",
    }  # fmt: skip
    assert data["lost"]["flips"]["lit"]["right_to_wrong"] == 3
    assert data["drift"] is None
    assert data["skipped"] == {"lit": 0, "brightness": 0}
