from dataclasses import dataclass, field

import pytest
import torch
from engine_fakes import Picture, assemble, run_config
from safetensors.torch import load_file

from diffalign.engine import train
from diffalign.errors import DiffalignError
from diffalign.evaluation.monitor import Look
from diffalign.metrics import read_metrics

COURSE = {0: 0.2, 2: 0.5, 4: 0.9, 6: 0.6, 8: 0.3, 10: 0.2, 12: 0.1}


@dataclass
class FakeMonitor:
    """Gives the gold score of the step it is at, for four prompts."""

    course: dict
    step: object = None
    prepared: list = field(default_factory=list)

    def prepare(self, folder, *, fresh, write):
        self.prepared.append((folder.name, fresh, write))

    def first_look(self):
        return self.look_at(0)

    def look(self):
        return self.look_at(self.step())

    def look_at(self, step):
        gold = [self.course[step] + 0.01 * i for i in range(4)]
        return Look({"monitor/gold": gold[0]}, gold, torch.zeros(4, 3, 2, 2))

    def grid(self, look):
        return Picture()


def watched(tmp_path, course, *overrides, resume=False):
    """Train the linear model with a monitor whose gold score follows `course`."""
    config = run_config(tmp_path, "evaluation.every=2", *overrides)
    monitor = FakeMonitor(course)

    def parts(config, parallel, reporter):
        ingredients = assemble(config, parallel, reporter)
        ingredients.monitor = monitor
        seen = [0]

        def loss(batch, inner=ingredients.trainer.loss):
            if batch.draw.seed == config.seed:
                seen[0] = batch.draw.step + 1
            return inner(batch)

        monitor.step = lambda: seen[0]
        ingredients.trainer.loss = loss
        return ingredients

    return train(config, resume=resume, assemble=parts), monitor


def gold_log(result):
    return {
        r["step"]: r["monitor/gold"]
        for r in read_metrics(result.folder / "metrics.jsonl")
        if "monitor/gold" in r
    }


def test_off_by_default_every_look_is_logged_and_shown(tmp_path):
    result, monitor = watched(tmp_path, COURSE)
    assert result.step == 12
    assert result.stopped is None
    assert gold_log(result) == pytest.approx(COURSE)
    assert monitor.prepared == [("monitor", True, True)]
    assert len(list((result.folder / "samples").glob("step-*.png"))) == 7


def test_stops_when_gold_falls_and_final_holds_the_best_weights(tmp_path):
    options = ("evaluation.monitor.stop=when_gold_falls", "checkpoint.every=100", "checkpoint.keep_last=1")
    result, _ = watched(tmp_path, COURSE, *options)
    assert result.step == 8
    assert "best, at step 4" in result.stopped
    assert result.exit_code == 0
    best = load_file(result.folder / "checkpoints" / "step-000004" / "trainable.safetensors")
    final = load_file(result.folder / "final" / "trainable.safetensors")
    last = load_file(result.folder / "checkpoints" / "step-000008" / "trainable.safetensors")
    assert all(torch.equal(final[k], best[k]) for k in best)
    assert not all(torch.equal(final[k], last[k]) for k in last)


def test_a_resumed_run_stops_where_the_whole_one_does(tmp_path):
    stop = "evaluation.monitor.stop=when_gold_falls"
    watched(tmp_path, COURSE, stop, "optim.steps=6", "checkpoint.every=6", "optim.schedule=constant")
    # Its last look was a fall; the one after it is the second.
    result, monitor = watched(
        tmp_path, COURSE, stop, "optim.steps=12", "checkpoint.every=6", "optim.schedule=constant", resume=True
    )
    assert monitor.prepared == [("monitor", False, True)]
    assert result.step == 8
    assert result.stopped is not None


def test_final_best_takes_the_checkpoint_of_the_chosen_metric(tmp_path):
    options = ("evaluation.best_metric=monitor/gold", "checkpoint.final=best", "checkpoint.every=100")
    result, _ = watched(tmp_path, COURSE, *options)
    best = load_file(result.folder / "checkpoints" / "step-000004" / "trainable.safetensors")
    final = load_file(result.folder / "final" / "trainable.safetensors")
    assert all(torch.equal(final[k], best[k]) for k in best)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.monitor.stop=when_gold_falls"], "evaluation.every above 0"),
        (["checkpoint.final=best", "checkpoint.keep_best=false"], "needs checkpoint.keep_best"),
    ],
)
def test_options_that_cannot_work_together_are_refused(tmp_path, overrides, message):
    with pytest.raises((DiffalignError, ValueError), match=message):
        run_config(tmp_path, *overrides)
