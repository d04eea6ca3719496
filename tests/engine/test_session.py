import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import engine_fakes
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffalign.config import OptimConfig
from diffalign.engine.optim import (
    LossScale,
    WeightAverage,
    build_optimizer,
    gradient_norm,
    learning_rate,
    rescale_gradients,
)
from diffalign.engine.session import prefetched, train
from diffalign.engine.signals import StopSignals
from diffalign.errors import DiffalignError
from diffalign.metrics import Meter, is_better, log_every, read_metrics
from diffalign.progress import Reporter
from diffalign.randomness import Draw


def run(folder, *overrides, resume=False):
    config = engine_fakes.run_config(folder, *overrides)
    return train(config, resume=resume, assemble=engine_fakes.assemble, reporter=Reporter(enabled=False))


def weights(folder):
    return load_file(folder / "run" / "final" / "trainable.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def numbers(folder):
    """Logged lines without the fields that measure time and memory."""
    dropped = ("seconds", "pairs_per_second", "peak_memory_gb")
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in dropped} for line in lines]


@pytest.fixture(autouse=True)
def _one_thread():
    """Runs in this process sum in the same order as those in child processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_child(
    folder: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a run in a process of its own; forking one whose threads have computed can hang."""
    command = [sys.executable, engine_fakes.__file__, str(folder), *arguments]
    return subprocess.Popen(command, env={**os.environ, **(environment or {})})


def test_run_folder_has_what_the_readers_expect(tmp_path):
    result = run(tmp_path, "evaluation.every=5", "evaluation.prompts=x")
    folder = tmp_path / "run"
    assert result.step == 12
    assert result.exit_code == 0
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints", "config.yaml", "final", "metrics.jsonl", "samples", "tb"
    ]  # fmt: skip
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [
        f"step-{step:06d}.png" for step in (0, 5, 10, 12)
    ]
    first = read_metrics(folder / "metrics.jsonl")[0]
    expected = {
        "loss",
        "implicit_accuracy",
        "margin",
        "grad_norm",
        "lr",
        "pairs_per_second",
        "peak_memory_gb",
    }
    assert expected <= first.keys()
    assert first["step"] == 1
    assert result.metrics["held_out/implicit_accuracy"] == pytest.approx(
        read_metrics(folder / "metrics.jsonl")[-1]["held_out/implicit_accuracy"]
    )


def test_training_learns(tmp_path):
    run(tmp_path, "optim.steps=150", "optim.lr=0.05", "model.lora.dropout=0", "evaluation.every=1")
    losses = [line["held_out/loss"] for line in numbers(tmp_path) if "held_out/loss" in line]
    assert losses[-1] < 0.2 * losses[0]


def test_interrupted_run_equals_uninterrupted_to_the_bit(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", "optim.steps=12", "trainer.signal_at=5")
    assert not (tmp_path / "b" / "run" / "final").exists()
    run(tmp_path / "b", "trainer.signal_at=5", resume=True)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def test_killed_twice_and_resumed_equals_uninterrupted(tmp_path):
    """kill -9 in steps 6 and 10 (checkpoints every 4 steps)."""
    run(tmp_path / "a")
    for kill_at in (6, 10):
        child = in_child(tmp_path / "b", "--resume", environment={"KILL_AT": str(kill_at)})
        assert child.wait() == -signal.SIGKILL
        assert not (tmp_path / "b" / "run" / "final").exists()
    run(tmp_path / "b", resume=True)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    a, b = (load_file(tmp_path / x / "run/checkpoints/step-000012/optimizer.safetensors") for x in "ab")
    assert same(a, b)


def test_longer_run_continues_a_finished_one(tmp_path):
    options = ("optim.schedule=constant",)
    run(tmp_path / "a", "optim.steps=20", *options)
    run(tmp_path / "b", *options)
    result = run(tmp_path / "b", "optim.steps=20", *options, resume=True)
    assert result.step == 20
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    run(tmp_path)
    before = weights(tmp_path)
    assert run(tmp_path, resume=True).step == 12
    assert same(before, weights(tmp_path))


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    options = ("model.lora.dropout=0",)
    run(tmp_path / "a", "optim.batch_size=8", *options)
    run(tmp_path / "b", "optim.batch_size=2", "optim.accumulation=4", *options)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-5)


def test_existing_run_is_not_overwritten(tmp_path):
    run(tmp_path)
    with pytest.raises(DiffalignError, match=r"already holds a run \(step-000012\).*--resume"):
        run(tmp_path)


def test_resume_refuses_other_numbers_and_names_the_keys(tmp_path):
    run(tmp_path)
    with pytest.raises(DiffalignError) as caught:
        run(tmp_path, "optim.lr=0.5", "trainer.beta=2", "optim.batch_size=3", resume=True)
    message = str(caught.value)
    assert "optim.lr: 0.01 -> 0.5" in message
    assert "trainer.beta: 1.0 -> 2.0" in message
    assert "4 -> 3" in message


def test_resume_accepts_the_same_step_split_otherwise(tmp_path):
    run(tmp_path, "optim.steps=8")
    assert run(tmp_path, "optim.batch_size=2", "optim.accumulation=2", resume=True).step == 12


def test_resume_without_checkpoint_starts_afresh(tmp_path):
    assert run(tmp_path, resume=True).step == 12


def test_nonfinite_steps_are_skipped_and_counted(tmp_path):
    result = run(tmp_path, "trainer.nan_from=4", "trainer.nan_until=6", "optim.max_nonfinite=3")
    assert result.skipped == 2
    assert result.step == 12
    lines = {line["step"]: line for line in numbers(tmp_path) if "lr" in line}
    assert lines[12]["skipped_steps"] == 2
    assert "loss" not in lines[5]
    assert all(torch.isfinite(w).all() for w in weights(tmp_path).values())


def test_skipped_step_leaves_weights_and_moments_alone(tmp_path):
    run(tmp_path / "a", "optim.steps=4", "optim.schedule=constant")
    run(tmp_path / "b", "optim.steps=5", "optim.schedule=constant", "trainer.nan_from=4")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_too_many_nonfinite_steps_abort_after_saving(tmp_path):
    with pytest.raises(DiffalignError) as caught:
        run(tmp_path, "trainer.nan_from=5", "optim.max_nonfinite=3")
    message = str(caught.value)
    assert "3 steps in a row" in message
    assert "step 8 of 12" in message
    assert "loss nan" in message
    assert "learning rate" in message
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-000008" / "trainable.safetensors")
    run(tmp_path / "good", "optim.steps=5", "optim.schedule=constant", "optim.warmup=0")
    assert all(torch.isfinite(w).all() for w in saved.values())


def test_sigterm_saves_and_gives_143(tmp_path):
    result = run(tmp_path, "trainer.signal_at=2")
    assert result.exit_code == 143
    assert result.step == 3
    assert (tmp_path / "run" / "checkpoints" / "step-000003" / "state.json").is_file()


def test_full_disk_while_writing_the_result_keeps_the_checkpoint(tmp_path, monkeypatch):
    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffalign.engine.session.save_file", full)
    with pytest.raises(DiffalignError, match=r"final: the disk is full"):
        run(tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if "final" in p.name) == []
    assert run(tmp_path, resume=True).step == 12
    assert weights(tmp_path)


def test_second_interrupt_raises_at_once():
    messages = []
    # A test run started in the background inherits an ignored SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopSignals(messages.append) as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        assert len(messages) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    run(
        tmp_path,
        "evaluation.every=2", "evaluation.best_metric=held_out/loss", "checkpoint.every=2",
        "checkpoint.keep_last=1", "optim.lr=2.0", "optim.schedule=constant", "optim.warmup=0", "optim.clip=0",
    )  # fmt: skip
    lines = [line for line in numbers(tmp_path) if "held_out/loss" in line]
    best = min(lines, key=lambda line: line["held_out/loss"])["step"]
    assert best != 12, "the test needs a run whose last evaluation is not the best"
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"step-{best:06d}", "step-000012"]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000012" / "state.json").read_text())
    assert state["counters"]["best_step"] == best


def test_unmeasured_best_metric_is_an_error(tmp_path):
    with pytest.raises(DiffalignError, match=r"evaluation\.best_metric is 'x'.*held_out/implicit_accuracy"):
        run(tmp_path, "evaluation.best_metric=x")


def test_average_is_saved_resumed_and_exported(tmp_path):
    options = ("model.tune=full", "optim.ema=0.9")
    run(tmp_path / "a", *options)
    run(tmp_path / "b", *options, "trainer.signal_at=5")
    run(tmp_path / "b", *options, "trainer.signal_at=5", resume=True)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    last = tmp_path / "a" / "run" / "checkpoints" / "step-000012"
    assert same(weights(tmp_path / "a"), load_file(last / "ema.safetensors"))
    assert not same(weights(tmp_path / "a"), load_file(last / "trainable.safetensors"))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_optimizers_resume_exactly(tmp_path, optimizer):
    options = (f"optim.optimizer={optimizer}", "trainer.signal_at=6")
    run(tmp_path / "a", f"optim.optimizer={optimizer}")
    run(tmp_path / "b", *options)
    run(tmp_path / "b", *options, resume=True)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def two_processes(folder: Path, environment: dict[str, str], *arguments: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        **environment,
    }  # fmt: skip
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    children = [in_child(folder, *arguments, environment=rank) for rank in ranks]
    assert [child.wait() for child in children] == [0, 0]


SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    "environment",
    [{}, SHARDED, {**SHARDED, "FSDP_RESHARD_AFTER_FORWARD": "false"}],
    ids=["ddp", "fsdp2", "zero2"],
)
def test_two_processes_at_half_the_batch_equal_one(tmp_path, environment):
    common = ("model.lora.dropout=0", "optim.accumulation=2")
    run(tmp_path / "one", "optim.batch_size=4", *common)
    two_processes(tmp_path / "two", environment, "optim.batch_size=2", *common)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)
    for a, b in zip(numbers(tmp_path / "one"), numbers(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_two_processes_resume_a_run_of_one(tmp_path):
    run(tmp_path / "one", "model.lora.dropout=0")
    run(tmp_path / "two", "model.lora.dropout=0", "optim.steps=6", "optim.schedule=cosine")
    shutil.rmtree(tmp_path / "two")
    run(tmp_path / "two", "model.lora.dropout=0", "trainer.signal_at=5")
    options = ("model.lora.dropout=0", "trainer.signal_at=5", "optim.batch_size=2")
    two_processes(tmp_path / "two", SHARDED, *options, "--resume")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)


def test_deepspeed_is_refused_with_the_alternative(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(DiffalignError, match=r"zero2\.yaml"):
        run(tmp_path)


def optim(**values):
    return OptimConfig(**{"lr": 1.0, "steps": 10, "batch_size": 1, **values})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535533906, 0.5, 0.1464466094]),
    ],
)
def test_learning_rate(schedule, expected):
    config = optim(schedule=schedule, warmup=2, steps=6)
    assert [learning_rate(config, s) for s in range(6)] == pytest.approx(expected)


def parameter(values, gradient):
    p = nn.Parameter(torch.tensor(values))
    p.grad = torch.tensor(gradient)
    return p


def test_clipping_and_loss_scale():
    """Gradients (3, 4) at loss scale 2 are (1.5, 2) of norm 2.5; clipped to norm 1 they are (.6, .8)."""
    p = parameter([0.0, 0.0], [3.0, 4.0])
    assert gradient_norm([p], 2.0).item() == pytest.approx(2.5)
    rescale_gradients([p], 2.5, clip=1.0, scale=2.0)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]), atol=1e-6, rtol=0)


def test_no_clipping_below_the_limit_or_when_off():
    p = parameter([0.0], [3.0])
    rescale_gradients([p], 3.0, clip=5.0, scale=1.0)
    rescale_gradients([p], 3.0, clip=0.0, scale=1.0)
    assert p.grad.item() == 3.0


def test_loss_scale_halves_on_overflow_and_doubles_after_an_interval():
    scale = LossScale.for_precision(torch.float16)
    scale.interval = 2
    assert scale.value == 65536
    scale.update(False)
    assert scale.value == 32768
    scale.update(True)
    scale.update(True)
    assert scale.value == 65536
    fixed = LossScale.for_precision(torch.bfloat16)
    fixed.update(False)
    assert fixed.value == 1


def test_weight_average_by_hand():
    """Decay min(.9, 1/10) then min(.9, 2/11): 1 -> .1 * 1 + .9 * 2 = 1.9 -> (2 * 1.9 + 9 * 3) / 11."""
    p = nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage([p], 0.9)
    for updates, value in enumerate((2.0, 3.0)):
        p.data.fill_(value)
        average.update(updates)
    assert average.shadow[0].item() == pytest.approx((2 * 1.9 + 9 * 3.0) / 11)
    with average.applied():
        assert p.item() == pytest.approx(2.8)
    assert p.item() == 3.0


def test_optimizer_errors_say_what_to_do():
    with pytest.raises(DiffalignError, match=r"nothing to train.*model\.lora\.targets"):
        build_optimizer(optim(), [])
    with pytest.raises(DiffalignError, match=r"adamw8bit.*needs a CUDA GPU"):
        build_optimizer(optim(optimizer="adamw8bit"), [nn.Parameter(torch.zeros(1))])
    with pytest.raises(DiffalignError, match="float32"):
        build_optimizer(optim(), [nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))])


def test_meter_forgets_discarded_rows():
    meter = Meter()
    meter.add({"loss": torch.tensor([1.0, 3.0])})
    meter.commit()
    meter.add({"loss": torch.tensor([float("nan")])})
    meter.discard()
    names, sums, rows = meter.totals()
    assert (names, [s.item() for s in sums], rows) == (["loss"], [4.0], 2)
    assert meter.totals() == ([], [], 0)


def test_better_direction_follows_the_name():
    assert is_better("held_out/implicit_accuracy", 0.6, 0.5)
    assert not is_better("held_out/loss", 0.6, 0.5)
    assert is_better("held_out/loss", 0.4, 0.5)
    assert not is_better("held_out/implicit_accuracy", float("nan"), None)


def test_log_lines_are_about_a_hundred():
    assert [log_every(steps) for steps in (12, 150, 2000, 100_000)] == [1, 1, 20, 50]


def draws(n):
    return [Draw(0, i, [i], [0], 1) for i in range(n)]


def test_prefetch_keeps_the_order_and_raises_errors_here():
    assert list(prefetched(draws(7), lambda d: d.step, depth=3)) == list(range(7))

    def broken(draw):
        if draw.step == 2:
            raise DiffalignError("shard is gone")
        return draw.step

    stream = prefetched(draws(5), broken)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(DiffalignError, match="shard is gone"):
        next(stream)
