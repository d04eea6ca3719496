import json
import math
import sys
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

# Benchmarks are not part of the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import timing
from benchmarks.dpo_step import Settings, main, modes, open_step, run_config

CPU = torch.device("cpu")


def test_steps_take_turns_and_warmup_does_not_count():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.interleaved(steps, repeats=3, warmup=1, device=CPU)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratio_is_the_median_over_rounds():
    # In the rounds: 2, 4 and 1 times as fast; the ratio of the medians would be 3.
    seconds = {"plain": [2.0, 12.0, 3.0], "ours": [1.0, 3.0, 3.0]}
    assert timing.ratios(seconds, "plain") == {"plain": 1.0, "ours": 2.0}


def test_memory_of_a_fresh_process_starts_low():
    block = bytearray(300_000_000)
    assert timing.resident_memory() > 300
    assert timing.in_fresh_process(timing.peak_resident_memory) < timing.resident_memory()
    del block


def test_every_mode_runs_and_is_written(tmp_path, tiny_sdxl):
    app = Typer()
    app.command()(main)
    result = tmp_path / "result.json"
    options = ["--pairs", "2", "--repeats", "1", "--warmup", "0", "--device", "cpu", "--no-memory"]
    run = CliRunner().invoke(app, [*options, "--model", str(tiny_sdxl), "--json", str(result)])
    assert run.exit_code == 0, run.output
    written = json.loads(result.read_text())
    assert [row["mode"] for row in written["rows"]] == [
        "reference-style, fp32",
        "ours, fp32",
        "ours, bf16",
        "ours, fp32, cached reference",
        "ours, bf16, cached reference",
    ]
    assert written["rows"][0]["ratio"] == 1.0
    assert all(row["pairs_per_second"] == 2 / row["seconds"] for row in written["rows"])
    assert {"device", "threads", "torch"} <= written["machine"].keys()


def test_compiled_modes_compile_our_steps_only(tiny_sdxl, tmp_path):
    chosen = modes(["fp32", "bf16"], compiled=True)
    assert [mode.name for mode in chosen if mode.compiled] == [
        "ours, fp32, compiled",
        "ours, bf16, compiled",
        "ours, fp32, cached reference, compiled",
        "ours, bf16, cached reference, compiled",
    ]
    settings = Settings(str(tiny_sdxl), "scenes:preferences", "attention", 2, "cpu", str(tmp_path))
    assert [run_config(mode, settings).model.compile for mode in chosen] == [mode.compiled for mode in chosen]


def test_the_reference_style_step_is_diffusion_dpo(tiny_sdxl):
    """At step 0 policy and reference agree, so the loss is log 2; training then changes it."""
    settings = Settings(str(tiny_sdxl), "scenes:preferences", "attention", 2, "cpu", "unused")
    step = open_step(modes(["fp32"])[0], settings)
    assert step() == pytest.approx(math.log(2), abs=1e-4)
    assert step() != pytest.approx(math.log(2), abs=1e-9)
