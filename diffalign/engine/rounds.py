"""The collecting side of an online run: when samples are drawn, and which rows an optimiser step learns from.

What happens in a step is a function of the weights before its round and of (seed, step): a checkpoint in the middle of
a round holds its samples, one between rounds holds none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffalign.config import RunConfig
from diffalign.engine.parallel import Parallel
from diffalign.engine.run import Batch, Share
from diffalign.errors import DiffalignError
from diffalign.progress import Reporter
from diffalign.randomness import Draw
from diffalign.sampling.collection import Choose, Collected, Collector
from diffalign.sampling.prompt_choice import PromptChooser
from diffalign.trainers.online import places_of_step, updates_of
from diffalign.trainers.online_rows import Rows

# Rounds in a row without a usable sample before a run gives up.
PATIENCE = 3
# Groups of tensors in a checkpoint.
SAMPLES, METHOD, BEFORE, REWARD = "round", "method", "method_before", "reward"


class Rounds:
    """Draws rounds when they are due, and hands out their rows step by step.

    Args:
        trainer: an online trainer. collector: draws this process's part of a round.
        choose: the prompts of a round.
    """

    def __init__(
        self,
        config: RunConfig,
        parallel: Parallel,
        trainer: Any,
        collector: Collector,
        choose: Choose,
        reporter: Reporter,
    ) -> None:
        self.config, self.parallel, self.trainer = config, parallel, trainer
        self.collector, self.choose, self.reporter = collector, choose, reporter
        trainer.gather = parallel.gather
        options = trainer.config
        self.steps = updates_of(options)
        self.failed_in_a_row = 0
        self._rows: Any = None
        self._spare: Any = None
        self._before: tuple[dict[str, Tensor], dict[str, Any]] = ({}, {})

    def prepare(self, step: int) -> dict[str, float]:
        """Before optimiser step `step`: draw a round when one is due, and say what it was like.

        Raises:
            DiffalignError: too many samples without a reward, round after round.
        """
        number, part = divmod(step, self.steps)
        if part or (self._rows is not None and self.trainer.collected.round == number):
            return {}
        self.collector.calibrate()
        label = f"round {number + 1}"
        sampler = self.trainer.sampler(number)
        with self.trainer.drawing(number):
            collected = self.collector.collect(
                number, self.choose, sampler, lambda done, total: self.reporter(label, done, total)
            )
        return self._learn(collected)

    def share(self, step: int) -> tuple[Share, Iterator[Batch]]:
        """The size of an optimiser step and its micro-batches on this process; every process must call this."""
        rows = self._of_step(step)
        size = self.config.optim.batch_size
        numbers = self._rows.number[rows]
        everyone = self.parallel.gather(numbers).sort().values
        most = max(self._everywhere(len(rows)))
        share = Share(-(-most // size), len(everyone))
        self.trainer.begin(rows.tolist())
        return share, self._batches(step, rows, numbers, everyone, share.micro_steps)

    def tensors(self, step: int) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint after `step` steps holds of the method and of an unfinished round.

        Every process must call this.
        """
        own, _ = self.trainer.state()
        found = {METHOD: own} if own else {}
        learned = self.collector.reward.state_dict()
        found |= {REWARD: learned} if learned else {}
        if step % self.steps and self._rows is not None:
            samples = self.trainer.collected.tensors()
            found[SAMPLES] = {
                name: self.parallel.gather(value.contiguous()) for name, value in samples.items()
            }
            found |= {BEFORE: self._before[0]} if self._before[0] else {}
        return found

    def values(self) -> dict[str, Any]:
        """The JSON-able part of the same."""
        own = {"method": self.trainer.state()[1], "before": self._before[1], "failed": self.failed_in_a_row}
        return own | ({"prompts": self.choose.state()} if isinstance(self.choose, PromptChooser) else {})

    def restore(self, step: int, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> None:
        """Continue after `step` steps."""
        if isinstance(self.choose, PromptChooser):
            self.choose.restore(values["prompts"])
        if REWARD in tensors:
            self.collector.reward.load_state_dict(tensors[REWARD])
        if SAMPLES in tensors:
            number = step // self.steps
            self.trainer.restore(tensors.get(BEFORE, {}), values["before"])
            places = self.collector.places()
            mine = torch.isin(tensors[SAMPLES]["places"], torch.tensor(places))
            own = {name: value[mine] for name, value in tensors[SAMPLES].items()}
            self._learn(self.collector.restored(number, own, self.trainer.sampler(number)))
        self.trainer.restore(tensors.get(METHOD, {}), values["method"])
        self.failed_in_a_row = values["failed"]

    def _learn(self, collected: Collected) -> dict[str, float]:
        tensors, values = self.trainer.state()
        self._before = {name: value.detach().cpu().clone() for name, value in tensors.items()}, values
        known = self.parallel.gather(collected.rewards)
        good = known.isfinite()
        if collected.std is not None and good.any():
            collected = replace(collected, mean_std=float(self.parallel.gather(collected.std)[good].mean()))
        self.trainer.collected = collected
        failed = 1.0 - float(good.float().mean())
        found = _moments(known[good]) | {"round/number": float(collected.round)}
        found |= self._part_means(collected)
        found |= {f"round/{name}_seconds": value for name, value in collected.seconds.items()}
        if failed:
            found["round/failed"] = failed
        if failed > self.trainer.config.max_failed:
            self._count_failure(failed)
            self._rows = Rows(torch.zeros(0).long(), torch.zeros(0).long())
            return found
        self.failed_in_a_row = 0
        self._rows, measured = self.trainer.learn(collected)
        if isinstance(self.choose, PromptChooser):
            chosen = self.parallel.gather(collected.chosen)
            measured = measured | self.choose.observe(collected.round, chosen, known)
        return found | {f"round/{name}": value for name, value in measured.items()}

    def _part_means(self, collected: Collected) -> dict[str, float]:
        """Means of what the reward is made of, over the samples that have them; none if a process has no parts."""
        found: dict[str, float] = {}
        if len(set(self._everywhere(len(collected.parts)))) > 1:
            return found
        for name in sorted(collected.parts):
            values = self.parallel.gather(collected.parts[name]).double()
            if values.isfinite().any():
                found[f"round/part/{name}"] = float(values[values.isfinite()].mean())
        return found

    def _count_failure(self, failed: float) -> None:
        """Leave a round out.

        Raises:
            DiffalignError: it is the last straw.
        """
        self.failed_in_a_row += 1
        said = f"the reward gave no score to {failed:.0%} of a round's samples; it is left out."
        if self.failed_in_a_row >= PATIENCE:
            raise DiffalignError(
                f"{PATIENCE} rounds in a row: {said} Look at pictures of the model with `diffalign generate`, and at "
                "the reward with `diffalign score`. The last checkpoint is from before these rounds."
            )
        self.reporter.say(said)

    def _of_step(self, step: int) -> Tensor:
        """Rows `[r]` of an optimiser step on this process: those of whole groups."""
        places, group = places_of_step(self.trainer.config, step), self._rows.group
        return ((group >= places.start) & (group < places.stop)).nonzero().flatten()

    def _batches(
        self, step: int, rows: Tensor, numbers: Tensor, everyone: Tensor, micro_steps: int
    ) -> Iterator[Batch]:
        """Micro-batches; a process with fewer rows than another one fills up with rows that do not count."""
        size, total = self.config.optim.batch_size, len(everyone)
        positions = torch.searchsorted(everyone, numbers).tolist()
        local, number = rows.tolist(), numbers.tolist()
        for index in range(micro_steps):
            part = range(index * size, min((index + 1) * size, len(local)))
            places = [positions[i] for i in part]
            chosen, ids = [local[i] for i in part], [number[i] for i in part]
            draw = Draw(self.config.seed, step, ids, places, total)
            if chosen:
                self._spare = self.trainer.batch(chosen, draw)
            yield self._spare if chosen else self._filler()

    def _filler(self) -> Batch:
        """A batch that does not count, for a process that has no rows left while others have.

        Raises:
            DiffalignError: this process never had any.
        """
        if self._spare is None:
            raise DiffalignError(
                "one process has nothing to learn from while others have: all samples of its groups are alike. Raise "
                "trainer.prompts_per_round or trainer.samples."
            )
        ignored: Batch = replace(
            self._spare, draw=replace(self._spare.draw, positions=[-1] * len(self._spare.draw))
        )
        return ignored

    def _everywhere(self, value: int) -> list[int]:
        return [int(v) for v in self.parallel.gather(torch.tensor([value])).tolist()]


def _moments(rewards: Tensor) -> dict[str, float]:
    if not len(rewards):
        return {}
    values = rewards.double()
    return {"round/reward": float(values.mean()), "round/reward_std": float(values.std(correction=0))}
