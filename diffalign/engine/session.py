"""The loop around a trainer: steps, logging, evaluation, checkpoints, resume, clean stops, the final files.

A run is a function of its configuration: the records of step s, their noise and times, and the learning rate
follow from (seed, s). So there is no data-loader or generator state to save, and a run that was killed and
resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffalign.config import RunConfig, save_config, with_trainer_defaults
from diffalign.engine.assembly import Ingredients, assemble
from diffalign.engine.checkpoints import (
    Checkpoint,
    load_checkpoint,
    prune,
    readable_disk_errors,
    save_checkpoint,
    step_folder,
)
from diffalign.engine.optim import learning_rate
from diffalign.engine.parallel import Parallel
from diffalign.engine.resume import (
    binding_config,
    changed_versions,
    check_resumable,
    open_folder,
    starting_point,
)
from diffalign.engine.run import Batch, Outcome, Run, Share, prefetched
from diffalign.engine.signals import StopSignals
from diffalign.engine.watching import Watch
from diffalign.engine.wording import introduction, nonfinite_message
from diffalign.errors import DiffalignError
from diffalign.metrics import MetricsLog, is_better, log_every, peak_memory
from diffalign.progress import Reporter, numbers_line
from diffalign.versions import versions


@dataclass
class RunResult:
    """How a run ended.

    Fields:
        folder: the run folder. step: cumulative steps done. metrics: newest value of every logged number.
        skipped: steps left out because they were not finite. signal: what stopped the run early, or None.
        stopped: why the stop rule ended the run, or None.
    """

    folder: Path
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    signal: int | None = None
    stopped: str | None = None

    @property
    def exit_code(self) -> int:
        """0, or 128 plus the signal as shells count it (130 for Ctrl-C, 143 for SIGTERM)."""
        return 0 if self.signal is None else 128 + self.signal


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    assemble: Callable[[RunConfig, Parallel, Reporter], Ingredients] = assemble,
    reporter: Reporter | None = None,
) -> RunResult:
    """Train, or continue a run, in `config.folder`.

    Args:
        resume: continue from the newest valid checkpoint; a run without any starts from the beginning.
        assemble: builds model, trainer and data; tests pass a small one.
        reporter: where messages and progress go.

    Raises:
        DiffalignError: bad input, a run that cannot be resumed, a full disk, too many non-finite steps.
        KeyboardInterrupt: a second Ctrl-C, which does not wait for the step to end.
    """
    config = with_trainer_defaults(config)
    parallel = Parallel()
    with reporter or Reporter() as reporter:
        reporter.enabled = reporter.enabled and parallel.is_main
        start = starting_point(config, resume, reporter.say)
        if start is not None:
            check_resumable(start.state, config, batch_of_step(config, parallel.world))
        # All processes have looked before the first one writes.
        parallel.agree(0.0)
        if parallel.is_main:
            open_folder(config.folder, fresh=start is None)
            save_config(config, config.folder / "config.yaml")
        parallel.agree(0.0)
        session = Session(config, parallel, assemble(config, parallel, reporter), reporter)
        if start is not None:
            session.restore(start)
        with session.signals:
            return session.run_to_end()


def batch_of_step(config: RunConfig, world: int) -> int:
    """Pairs of one optimiser step over all micro-steps and processes."""
    return config.optim.batch_size * config.optim.accumulation * world


class Session:
    """One call of `train`: a run with its log, progress and stop signals."""

    def __init__(
        self,
        config: RunConfig,
        parallel: Parallel,
        parts: Ingredients,
        reporter: Reporter,
    ):
        self.config, self.parallel, self.parts = config, parallel, parts
        self.reporter, self.signals = reporter, StopSignals(reporter.say)
        self.run = Run(config, parallel, parts.backbone, parts.trainer, parts.curriculum, parts.smoothing)
        self.latest: dict[str, float] = {}
        self.log: MetricsLog | None = None
        self.saved_step: int | None = None
        self.watch = Watch(parts.monitor, parts.pictures, config.evaluation.monitor, reporter.say)
        self._evaluated_step = 0
        self._train_seconds, self._norms = 0.0, 0.0
        self._logged_pairs, self._logged_step = 0, 0

    def restore(self, start: Checkpoint) -> None:
        """Continue from a checkpoint."""
        self.run.restore(start)
        self.saved_step = self.run.counters.step
        if self.parts.rounds is not None:
            self.parts.rounds.restore(self.run.counters.step, start.tensors, start.state["rounds"])
        if "gold_rule" in start.state:
            self.watch.rule.restore(start.state["gold_rule"])
        self.reporter.say(f"resuming after step {self.saved_step} of {self.config.optim.steps}")
        changed = changed_versions(start.state)
        if changed:
            self.reporter.say(f"package versions changed, so the last digits may too: {', '.join(changed)}")

    def run_to_end(self) -> RunResult:
        """The loop, then the final evaluation and files; or a checkpoint when asked to stop."""
        if self.parallel.is_main:
            self.log = MetricsLog(self.config.folder, self.run.counters.step)
        try:
            for line in introduction(self.config, self.run, self.parts):
                self.reporter.say(line)
            if self._loop():
                return self._stopped()
            self._finish()
            return self._result()
        finally:
            if self.log is not None:
                self.log.close()

    def _loop(self) -> bool:
        """Steps up to the last one; True when a signal stopped it."""
        run, steps = self.run, self.config.optim.steps
        fresh = run.counters.step == 0
        self.watch.start(self.config.folder / "monitor", fresh, self.parallel.is_main)
        if fresh:
            values, image = self.watch.first()
            self._show(image)
            if values:
                self._write(values)
        stored = self._stored_batches()
        self._logged_pairs, self._logged_step = run.counters.pairs, run.counters.step
        run.network.train()
        while run.counters.step < steps:
            share, batches = self._next(stored)
            began = time.perf_counter()
            outcome = run.step(batches, lambda: self.signals.received is not None, share)
            self._train_seconds += time.perf_counter() - began
            self._norms += outcome.grad_norm if outcome.finite else 0.0
            self._after_step(outcome)
            if outcome.stop and run.counters.step < steps:
                return True
            if self.watch.reason:
                break
        return False

    def _stored_batches(self) -> Iterator[Batch]:
        """Batches of stored data, fetched ahead; none for a method that draws its own."""
        if self.parts.rounds is not None:
            return iter(())
        return prefetched(self.run.draws(len(self.parts.cache)), self.parts.trainer.fetch)

    def _next(self, stored: Iterator[Batch]) -> tuple[Share | None, Iterator[Batch]]:
        """Size and micro-batches of the next step; an online method draws a round for it when one is due."""
        rounds, step = self.parts.rounds, self.run.counters.step
        if rounds is None:
            return None, stored
        found = rounds.prepare(step)
        if found:
            self._write(found)
        share, batches = rounds.share(step)
        return share, batches

    def _after_step(self, outcome: Outcome) -> None:
        step, config = self.run.counters.step, self.config
        if self.parts.rounds is not None and outcome.finite:
            self.parts.trainer.after_step(step - 1)
        if step == 1 or step % log_every(config.optim.steps) == 0 or step == config.optim.steps:
            self._log_training()
        self.reporter(self.config.name, step, config.optim.steps, numbers_line(self.latest))
        if self.run.counters.skipped_in_a_row >= config.optim.max_nonfinite:
            self._save()
            raise DiffalignError(nonfinite_message(self.config, self.run, outcome))
        improved = False
        if config.evaluation.every and step % config.evaluation.every == 0 and step < config.optim.steps:
            improved = self._evaluate()
        if step % config.checkpoint.every == 0 or improved:
            self._save()

    def _log_training(self) -> None:
        counters = self.run.counters
        values = self.run.mean_metrics()
        pairs = counters.pairs - self._logged_pairs
        steps = max(1, counters.step - self._logged_step)
        values |= {
            "grad_norm": self._norms / steps,
            "lr": learning_rate(self.config.optim, counters.step - 1),
            "pairs_per_second": pairs / max(self._train_seconds, 1e-9),
            "peak_memory_gb": peak_memory(self.parallel.device),
            "skipped_steps": float(counters.skipped),
            "pairs": float(counters.pairs),
        }
        self._train_seconds, self._norms = 0.0, 0.0
        self._logged_pairs, self._logged_step = counters.pairs, counters.step
        self._write(values)

    def _write(self, values: dict[str, float]) -> None:
        self.latest |= values
        if self.log is not None:
            self.log.write(self.run.counters.step, values)

    def _averaged(self) -> Any:
        """Inside this block the model carries the averaged weights, if there are any."""
        return nullcontext() if self.run.average is None else self.run.average.applied()

    def _evaluate(self) -> bool:
        """Held-out metrics and sample pictures; True when a new best checkpoint is to be kept."""
        counters, name = self.run.counters, self.parts.best_metric or self.config.evaluation.best_metric
        self._evaluated_step = counters.step
        with self._averaged():
            values = self.parts.evaluate() if self.parts.evaluate else {}
            watched, image = self.watch.look(counters.step)
            self._show(image)
            values = {**values, **watched}
        if not values:
            return False
        self._write(values)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k == name)
        self.reporter.say(f"step {counters.step}: {shown}" if shown else f"step {counters.step}: evaluated")
        if name not in values:
            raise DiffalignError(
                f"evaluation.best_metric is {name!r}, which is not measured; "
                f"measured: {', '.join(sorted(values))}"
            )
        keep = self.watch.is_best(counters.step)
        if is_better(name, values[name], counters.best_value):
            counters.best_value, counters.best_step = values[name], counters.step
            keep = True
        return keep and self.config.checkpoint.keep_best

    def _show(self, image: Any) -> None:
        """Keep a picture of the current step, and show it in TensorBoard."""
        step = self.run.counters.step
        if self.log is not None and image is not None:
            path = self.config.folder / "samples" / f"step-{step:06d}.png"
            image.save(path)
            self.log.picture(step, "samples", path)

    def _save(self) -> None:
        """Checkpoint of the current step; when writing fails, all processes stop together."""
        counters = self.run.counters
        if self.saved_step == counters.step:
            return
        checkpoint = self.run.snapshot()
        checkpoint.state |= {
            "config": binding_config(self.config),
            "versions": versions(),
            "gold_rule": self.watch.rule.state(),
        }
        if self.parts.rounds is not None:
            checkpoint.tensors |= self.parts.rounds.tensors(counters.step)
            checkpoint.state["rounds"] = self.parts.rounds.values()
        failure: DiffalignError | None = None
        if self.parallel.is_main:
            root = self.config.folder / "checkpoints"
            try:
                save_checkpoint(root, counters.step, checkpoint, self.reporter.say)
                prune(root, self.config.checkpoint.keep_last, self._best_steps())
            except DiffalignError as error:
                failure = error
        (failed,) = self.parallel.agree(float(failure is not None))
        if failed:
            raise failure or DiffalignError("the main process could not write a checkpoint; see its message")
        self.saved_step = counters.step

    def _best_steps(self) -> list[int]:
        """Steps whose checkpoints stay: the best by the chosen metric, and by the gold score when it may stop."""
        if not self.config.checkpoint.keep_best:
            return []
        best = self.run.counters.best_step
        return [*([] if best is None else [best]), *self.watch.best_steps()]

    def _stopped(self) -> RunResult:
        self._save()
        self.reporter.say(
            f"stopped after step {self.run.counters.step} of {self.config.optim.steps}; the state is saved. "
            "Run the same command with --resume to continue."
        )
        # A process that was told by another one reports the gentler of the two signals.
        return self._result(self.signals.received or 15)

    def _finish(self) -> None:
        # The evaluation may take long and be interrupted; the training before it is safe then.
        self._save()
        if self._evaluated_step != self.run.counters.step and (self._evaluate() or self.watch.may_stop):
            # A new best, or a look that the stop rule of a longer run must remember.
            self.saved_step = None
            self._save()
        if self.watch.reason:
            self.reporter.say(f"stopped: {self.watch.reason}")
        self._choose_final()
        with self._averaged():
            weights = self.run.weights()
            if self.parallel.is_main:
                self._write_final(weights)
        if self.parallel.is_main and self.parts.report is not None:
            self.parts.report()

    def _choose_final(self) -> None:
        """Load the weights that `final/` is to hold, when they are not the last ones."""
        counters, config = self.run.counters, self.config
        best = counters.best_step if config.checkpoint.final == "best" else counters.step
        chosen = self.watch.rule.best_step if self.watch.reason else best
        if chosen is None or chosen == counters.step:
            return
        folder = step_folder(config.folder / "checkpoints", chosen)
        if not folder.is_dir():
            self.reporter.say(f"final/ holds the last weights; the best look, step {chosen}, was not kept")
            return
        self.run.restore(load_checkpoint(folder))
        self.run.counters = counters
        self.reporter.say(f"final/ holds the weights of step {chosen}")

    def _write_final(self, weights: dict[str, torch.Tensor]) -> None:
        """`final/`, complete or not at all."""
        final = self.config.folder / "final"
        temporary = final.with_name(".final.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        with readable_disk_errors(final):
            try:
                temporary.mkdir()
                save_file(weights, temporary / "trainable.safetensors")
                # Exports read whole weights out of the model, which no process holds when they are sharded.
                if self.parts.export is not None and not self.parallel.sharded:
                    self.parts.export(temporary)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
        self.reporter.say(f"finished: {final}")
        if self.parallel.sharded:
            self.reporter.say(f"`diffalign export {self.config.folder}` writes files for other tools")

    def _result(self, signal: int | None = None) -> RunResult:
        counters = self.run.counters
        return RunResult(
            self.config.folder, counters.step, dict(self.latest), counters.skipped, signal, self.watch.reason
        )
