"""A scorer that may fail: one clear error, or the failing samples left out and counted."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Literal, get_args

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Reward, RewardOutput, facts_of
from diffalign.rewards.combine.members import check_batch
from diffalign.rewards.combine.wrapper import Of, Wrapper, only

OnError = Literal["raise", "skip"]
_KEPT = 1000  # reasons remembered; the count goes on


@dataclass(frozen=True)
class Skipped:
    """A sample without a score: its prompt and why."""

    prompt: str
    reason: str


def ask(reward: Reward, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
    """A reward's answer; whatever it raises becomes one message that names it.

    Raises:
        DiffalignError: the reward failed.
    """
    try:
        return reward.score(media, prompts)
    except DiffalignError:
        raise
    except Exception as error:
        raise _failure(reward.name, prompts, error) from error


class Guarded(Wrapper):
    """The same reward, whose failures (an exception, NaN or infinity, a wrong shape, no answer in time) are contained.

    With `raise`, a failure is one `DiffalignError` that names the scorer, the samples and the cause. With `skip`, a
    failing batch is halved until the failing samples are found; they get NaN, all others their score, and `skipped`
    counts them, with the latest `reasons`. Gradients never pass through a skipped sample. A batch that gets no answer
    in time is skipped as a whole, since halving would wait once per half; so is a set, which has no samples to spare.

    Args:
        of: one reward. on_error: raise or skip.
        retries: further tries after an exception or a timeout, `wait` seconds apart, doubling each time.
        timeout: seconds to wait for a score. The scorer then runs in a thread that cannot be stopped, only
            abandoned: meant for remote scorers, whose own timeout should be shorter. None waits for ever.
    """

    def __init__(
        self,
        of: Of,
        on_error: OnError = "raise",
        retries: int = 0,
        wait: float = 1.0,
        timeout: float | None = None,
    ) -> None:
        inner = only(of, "guarded")
        super().__init__(inner, getattr(inner, "name", "guarded"))
        if on_error not in get_args(OnError):
            raise DiffalignError(
                f"guard of reward {self.name!r}: on_error is {on_error!r}; expected raise or skip"
            )
        if retries < 0 or wait < 0 or (timeout is not None and not timeout > 0):
            raise DiffalignError(
                f"guard of reward {self.name!r}: retries {retries}, wait {wait}, timeout {timeout}; expected "
                "retries and wait of at least 0 and a positive timeout"
            )
        self.on_error, self.retries, self.wait, self.timeout = on_error, retries, wait, timeout
        self.facts = facts_of(self.of[0])
        self.scored = 0
        self.skipped = 0
        self.reasons: deque[Skipped] = deque(maxlen=_KEPT)

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score media `[B, ...]`; with `skip`, NaN where a sample could not be scored, and an empty batch is no error.

        Raises:
            DiffalignError: a failure, with `raise`; as many prompts as media are needed in any case.
        """
        if self.on_error == "skip" and len(media) == len(prompts) == 0:
            return RewardOutput(torch.empty(0))
        check_batch(self.name, media, prompts)
        self.scored += len(prompts)
        if self.on_error == "skip":
            return self._salvaged(media, list(prompts))
        output = self._attempt(media, prompts)
        bad = _not_finite(output)
        if bad.any():
            failing = [prompts[i] for i in bad.nonzero().flatten().tolist()]
            raise DiffalignError(
                f"reward {self.name!r} gave no finite score for {len(failing)} of {len(prompts)} samples "
                f"({_some(failing)}). Look at these pictures, or set on_error: skip to go on without them"
            )
        return output

    def summary(self) -> str:
        """How many samples were skipped and why, in a sentence."""
        counts = Counter(one.reason for one in self.reasons).most_common(3)
        why = "; ".join(f"{n} x {reason}" for reason, n in counts)
        return f"{self.name}: {self.skipped} of {self.scored} samples skipped" + (f" ({why})" if why else "")

    def _attempt(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """A score of the right shape, after as many tries as are allowed."""
        for tries_left in range(self.retries, -1, -1):
            try:
                return _checked(self._call(media, prompts), len(prompts))
            except Exception as error:
                if tries_left:
                    time.sleep(self.wait * 2 ** (self.retries - tries_left))
                    continue
                raise _failure(self.name, prompts, error) from error
        raise AssertionError("unreachable: the last try returns or raises")

    def _call(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        inner = self.of[0]
        if self.timeout is None:
            return inner.score(media, prompts)
        return _within(self.timeout, lambda: inner.score(media, prompts))

    def _salvaged(self, media: Tensor, prompts: list[str]) -> RewardOutput:
        """Scores of all samples that can be scored, NaN for the others, which are noted."""
        output, reason, late = None, "", False
        try:
            output = self._attempt(media, prompts)
        except DiffalignError as error:
            # Only words are kept: the traceback would hold the failed batch's memory while its halves are scored.
            reason, late = _said(error.__cause__), isinstance(error.__cause__, TimeoutError)
        if output is None and (len(prompts) == 1 or self.kind == "set" or late):
            self._note(prompts, reason)
            return RewardOutput(torch.full((len(prompts),), torch.nan, device=media.device))
        if output is None:
            half = len(prompts) // 2
            first = self._salvaged(media[:half], prompts[:half])
            return _joined(first, self._salvaged(media[half:], prompts[half:]))
        return self._without_bad(output, media, prompts)

    def _without_bad(self, output: RewardOutput, media: Tensor, prompts: list[str]) -> RewardOutput:
        """The output with NaN where a score is not finite, without gradient there."""
        bad = _not_finite(output)
        if not bad.any():
            return output
        self._note([prompts[i] for i in bad.nonzero().flatten().tolist()], "the score is NaN or infinite")
        if output.mean.requires_grad and not bad.all() and self.kind == "sample":
            # Masking would still multiply a gradient of 0 by the NaN inside; so the good ones are scored alone.
            good = (~bad).nonzero().flatten()
            rescored = self._salvaged(media[good.to(media.device)], [prompts[i] for i in good.tolist()])
            return _spread(rescored, good, len(prompts))
        return _masked(output, bad)

    def _note(self, prompts: Sequence[str], reason: str) -> None:
        self.skipped += len(prompts)
        self.reasons.extend(Skipped(prompt, reason) for prompt in prompts)


def _within(seconds: float, call: Callable[[], RewardOutput]) -> RewardOutput:
    """The result of a call in a thread of its own, under this thread's gradient mode."""
    results: list[RewardOutput | BaseException] = []
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def work() -> None:
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                results.append(call())
        except BaseException as error:
            results.append(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def _checked(output: object, n: int) -> RewardOutput:
    """The output if every tensor in it has one number per sample."""
    if not isinstance(output, RewardOutput):
        raise TypeError(f"it returned a {type(output).__name__}; expected a RewardOutput")
    named = {"mean": output.mean, "std": output.std, **output.parts}
    for name, value in named.items():
        if value is not None and tuple(value.shape) != (n,):
            raise ValueError(f"it returned {name} of shape {tuple(value.shape)}; expected ({n},)")
    return output


def _failure(name: str, prompts: Sequence[str], error: Exception) -> DiffalignError:
    return DiffalignError(
        f"reward {name!r} failed on a batch of {len(prompts)} samples ({_some(prompts)}): {_said(error)}"
    )


def _said(error: BaseException | None) -> str:
    return str(error) if isinstance(error, DiffalignError) else f"{type(error).__name__}: {error}"


def _some(prompts: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(prompts) - shown} more" if len(prompts) > shown else ""
    return "prompts " + ", ".join(repr(prompt) for prompt in prompts[:shown]) + more


def _not_finite(output: RewardOutput) -> Tensor:
    bad = ~output.mean.isfinite()
    return bad if output.std is None else bad | ~output.std.isfinite()


def _masked(output: RewardOutput, bad: Tensor) -> RewardOutput:
    """The output with NaN for bad samples, cut off from the graph where nothing good is left in it."""
    std = None if output.std is None else output.std.detach().masked_fill(bad, torch.nan)
    parts = {name: part.detach() for name, part in output.parts.items()}
    return RewardOutput(output.mean.detach().masked_fill(bad, torch.nan), std, parts)


def _joined(first: RewardOutput, second: RewardOutput) -> RewardOutput:
    """Two halves of a batch; std and parts that only one has are NaN in the other."""

    def pair(a: Tensor | None, b: Tensor | None) -> Tensor:
        rows = (_or_nan(a, first), _or_nan(b, second))
        return torch.cat([rows[0], rows[1].to(rows[0].device)])

    has_std = first.std is not None or second.std is not None
    names = dict.fromkeys([*first.parts, *second.parts])
    return RewardOutput(
        pair(first.mean, second.mean),
        pair(first.std, second.std) if has_std else None,
        {name: pair(first.parts.get(name), second.parts.get(name)) for name in names},
    )


def _or_nan(value: Tensor | None, output: RewardOutput) -> Tensor:
    return torch.full_like(output.mean, torch.nan) if value is None else value


def _spread(output: RewardOutput, rows: Tensor, n: int) -> RewardOutput:
    """Scores of some rows put at their places among n, NaN elsewhere."""

    def placed(value: Tensor) -> Tensor:
        empty = torch.full((n,), torch.nan, device=value.device, dtype=value.dtype)
        return empty.index_put((rows.to(value.device),), value)

    std = None if output.std is None else placed(output.std)
    return RewardOutput(placed(output.mean), std, {name: placed(v) for name, v in output.parts.items()})
