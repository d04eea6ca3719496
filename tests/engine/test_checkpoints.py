import errno
import json

import pytest
import torch
from torch import nn

from diffalign.engine import checkpoints as module
from diffalign.engine.checkpoints import (
    Checkpoint,
    checkpoints,
    load_checkpoint,
    newest_valid,
    optimizer_tensors,
    prune,
    restore_optimizer,
    restore_parameters,
    run_weights,
    save_checkpoint,
)
from diffalign.errors import DiffalignError
from diffalign.metrics import MetricsLog, read_metrics, truncate_metrics


def small(value=1.0):
    tensors = {"w": torch.full((3,), value), "half": torch.ones(2, dtype=torch.bfloat16)}
    return Checkpoint({"trainable": tensors, "optimizer": {"w/step": torch.tensor(4.0)}}, {"seed": 3})


def test_round_trip(tmp_path):
    folder = save_checkpoint(tmp_path, 12, small(2.5))
    assert folder == tmp_path / "step-000012"
    loaded = load_checkpoint(folder)
    assert loaded.state["seed"] == 3
    assert loaded.tensors["trainable"]["w"].tolist() == [2.5, 2.5, 2.5]
    assert loaded.tensors["trainable"]["half"].dtype == torch.bfloat16
    assert loaded.tensors["optimizer"]["w/step"].item() == 4


def test_no_file_is_a_pickle(tmp_path):
    folder = save_checkpoint(tmp_path, 1, small())
    assert sorted(p.name for p in folder.iterdir()) == [
        "optimizer.safetensors",
        "state.json",
        "trainable.safetensors",
    ]


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 1, small(1.0))
    save_checkpoint(tmp_path, 1, small(7.0))
    assert load_checkpoint(tmp_path / "step-000001").tensors["trainable"]["w"][0] == 7
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no state", "half a state"])
def test_damaged_newest_is_passed_over_with_a_warning(tmp_path, damage):
    save_checkpoint(tmp_path, 1, small())
    folder = save_checkpoint(tmp_path, 2, small())
    weights, state = folder / "trainable.safetensors", folder / "state.json"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-4])
    elif damage == "flipped":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    elif damage == "no state":
        state.unlink()
    else:
        state.write_text(state.read_text()[:20])
    warnings = []
    assert newest_valid(tmp_path, warnings.append) == tmp_path / "step-000001"
    assert len(warnings) == 1
    assert "step-000002" in warnings[0]


def test_unfinished_folders_are_not_checkpoints(tmp_path):
    save_checkpoint(tmp_path, 3, small())
    (tmp_path / ".step-000004.partial").mkdir()
    (tmp_path / "step-notes").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000003"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), None])
def test_full_disk_keeps_older_checkpoints_and_leaves_nothing_behind(tmp_path, monkeypatch, error):
    from safetensors import SafetensorError

    save_checkpoint(tmp_path, 1, small())
    raised = error or SafetensorError("Error while serializing: No space left on device (os error 28)")

    def full(tensors, path):
        path.write_bytes(b"half")
        raise raised

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(DiffalignError, match=r"disk is full.*Earlier checkpoints are untouched.*--resume"):
        save_checkpoint(tmp_path, 2, small())
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert newest_valid(tmp_path) == tmp_path / "step-000001"


def test_little_space_is_announced_before_writing(tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    warnings = []
    save_checkpoint(tmp_path, 1, small(), warnings.append)
    assert len(warnings) == 1
    assert "free" in warnings[0]


def test_prune_keeps_newest_and_best(tmp_path):
    for step in (1, 2, 3, 4, 10):
        save_checkpoint(tmp_path, step, small())
    prune(tmp_path, keep_last=2, best_steps=[2])
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000002", "step-000004", "step-000010"]
    prune(tmp_path, keep_last=1, best_steps=[])
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000010"]


def test_run_weights_prefers_the_final_ones(tmp_path):
    with pytest.raises(DiffalignError, match="no trained weights"):
        run_weights(tmp_path)
    save_checkpoint(tmp_path / "checkpoints", 5, small())
    assert run_weights(tmp_path).parent.name == "step-000005"
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "trainable.safetensors").write_bytes(b"x")
    assert run_weights(tmp_path).parent.name == "final"


def trained(make):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3))
    optimizer = make([p])
    for _ in range(3):
        p.grad = torch.randn(4, 3)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.AdamW(p, lr=0.1), lambda p: torch.optim.Adafactor(p, lr=0.1)],
    ids=["adamw", "adafactor"],
)
def test_optimizer_state_round_trip(make):
    p, optimizer = trained(make)
    tensors, scalars = optimizer_tensors(optimizer, ["p"], [p])
    json.dumps(scalars)
    copy = nn.Parameter(p.detach().clone())
    fresh = make([copy])
    restore_optimizer(fresh, ["p"], [copy], tensors, scalars)
    gradient = torch.randn(4, 3)
    p.grad, copy.grad = gradient.clone(), gradient.clone()
    optimizer.step()
    fresh.step()
    assert torch.equal(p, copy)


def test_quantised_state_keeps_its_dtype():
    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p] = {"step": 3, "state1": torch.arange(4, dtype=torch.uint8), "absmax": torch.ones(1)}
    tensors, scalars = optimizer_tensors(optimizer, ["p"], [p])
    fresh = torch.optim.SGD([p], lr=0.1)
    restore_optimizer(fresh, ["p"], [p], tensors, scalars)
    assert fresh.state[p]["state1"].dtype == torch.uint8
    assert fresh.state[p]["step"] == 3


def test_weights_of_another_model_are_refused():
    value = torch.zeros(2, 3)
    with pytest.raises(DiffalignError, match=r"another model.*2 weights differ.*b"):
        restore_parameters(
            ["a", "b"], [value, value], {"a": torch.zeros(2, 3), "b": torch.zeros(3), "c": value}
        )


def test_metrics_beyond_the_resumed_step_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step), "bad": float("nan")})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    truncate_metrics(tmp_path / "metrics.jsonl", 2)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["bad"] is None
    truncate_metrics(tmp_path / "metrics.jsonl", 0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
