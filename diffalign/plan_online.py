"""What an online run draws: rounds, samples, and the network passes that drawing takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Drawing:
    """The samples of a run.

    Fields:
        rounds: of the run. samples: of a round, over all processes. passes: network passes of a sample.
        steps: optimiser steps of a round.
    """

    rounds: int
    samples: int
    passes: int
    steps: int

    @classmethod
    def of(cls, options: Any, steps: int, told_guidance: bool = False) -> Drawing:
        """What `steps` optimiser steps of an online method with these options draw.

        Args:
            told_guidance: whether a guided prediction takes one pass, since the network is told its scale.
        """
        each = options.updates * options.passes
        guided = 2 if options.sampling.guidance > 1 and not told_guidance else 1
        samples = options.prompts_per_round * options.samples
        return cls(-(-steps // each), samples, options.sampling.steps * guided, each)

    @property
    def total(self) -> int:
        """Samples of the whole run."""
        return self.rounds * self.samples

    def flops(self, forward: float) -> float:
        """Floating-point operations of drawing; `forward` are those of one network pass over one sample."""
        return self.total * self.passes * forward

    def lines(self) -> Iterator[tuple[str, str]]:
        """What a person reads."""
        yield "rounds", f"{self.rounds:,} of {self.samples} samples and {self.steps} optimiser steps"
        yield "samples", f"{self.total:,}, {self.passes} network passes each to draw"
