"""A failing scorer: one clear error, or a counted skip; nothing else is lost."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import pytest
import torch
from combine_fakes import Channel, SetReward, colours
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards import FunctionReward, Reward, RewardOutput, facts_of, load_reward
from diffalign.rewards.combine.weighted_sum import WeightedSum
from diffalign.rewards.guard import Guarded, ask

PROMPTS = ["a", "b", "c", "d", "e"]
MEDIA = colours(*((0.1 * i, 0.0, 0.0) for i in range(1, 6)))
SCORES = [0.1, 0.2, 0.3, 0.4, 0.5]


class Moody(Channel):
    """Fails in a chosen way for chosen prompts, and remembers the batches it was asked for."""

    def __init__(self, failing: str, how: str = "raise", std: float | None = None) -> None:
        super().__init__(0, name="moody", std=std)
        self.failing, self.how = failing, how
        self.asked: list[str] = []

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        self.asked.append("".join(prompts))
        bad = torch.tensor([prompt in self.failing for prompt in prompts])
        if not bad.any():
            return super().score(media, prompts)
        if self.how == "raise":
            raise ValueError("cannot read it")
        if self.how == "shape":
            return RewardOutput(torch.zeros(len(prompts) + 1))
        if self.how == "type":
            return torch.zeros(len(prompts))  # type: ignore[return-value]
        output = super().score(media, prompts)
        if self.how == "nan-std":
            return RewardOutput(output.mean, torch.where(bad, math.nan, 1.0))
        # The NaN arises inside the graph, as in a real scorer.
        mean = output.mean * torch.where(bad, torch.tensor(math.inf if self.how == "inf" else math.nan), 1.0)
        return RewardOutput(mean, output.std, {"part": mean})


class Flaky(Channel):
    """Works from the third call on."""

    calls = 0

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        self.calls += 1
        if self.calls < 3:
            raise ConnectionError("connection refused")
        return super().score(media, prompts)


class Silent(Channel):
    """Answers only when released."""

    def __init__(self) -> None:
        super().__init__(0, name="silent")
        self.release = threading.Event()
        self.calls = 0

    def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
        self.calls += 1
        self.release.wait(30)
        return super().score(media, prompts)


def _expected(failing: str) -> list[float]:
    return [math.nan if p in failing else s for p, s in zip(PROMPTS, SCORES, strict=True)]


def _approx(values: list[float]):
    return pytest.approx(values, nan_ok=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "raise",
            r"reward 'moody' failed on a batch of 5 samples \(prompts 'a', 'b', 'c' and 2 more\): "
            r"ValueError: cannot read it",
        ),
        ("shape", r"moody.*returned mean of shape \(6,\); expected \(5,\)"),
        ("type", r"moody.*returned a Tensor; expected a RewardOutput"),
        ("nan", r"'moody' gave no finite score for 2 of 5 samples \(prompts 'b', 'e'\)"),
        ("inf", r"'moody' gave no finite score for 2 of 5 samples \(prompts 'b', 'e'\)"),
        ("nan-std", r"'moody' gave no finite score for 2 of 5 samples \(prompts 'b', 'e'\)"),
    ],
)
def test_a_failure_is_one_clear_error(how: str, message: str) -> None:
    with pytest.raises(DiffalignError, match=message):
        Guarded(Moody("be", how)).score(MEDIA, PROMPTS)


def test_the_cause_stays_attached() -> None:
    with pytest.raises(DiffalignError) as caught:
        Guarded(Moody("a")).score(MEDIA, PROMPTS)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("how", ["raise", "shape", "type", "nan", "inf", "nan-std"])
@pytest.mark.parametrize("failing", ["a", "be", "abcde"])
def test_skipping_loses_nothing_else(how: str, failing: str) -> None:
    guard = Guarded(Moody(failing, how, std=0.25), on_error="skip")
    output = guard.score(MEDIA, PROMPTS)
    assert output.mean.tolist() == _approx(_expected(failing))
    assert guard.skipped == len(failing)
    assert [one.prompt for one in guard.reasons] == list(failing)
    if failing != "abcde" and how != "nan-std":
        assert output.std.tolist() == _approx([math.nan if p in failing else 0.25 for p in PROMPTS])
    guard.score(MEDIA[2:4], ["f", "g"])
    assert guard.skipped == len(failing)
    assert guard.summary().startswith(f"moody: {len(failing)} of 7 samples skipped ({len(failing)} x ")


def test_parts_of_the_others_are_kept() -> None:
    output = Guarded(Moody("c", "raise"), on_error="skip").score(MEDIA, PROMPTS)
    assert output.parts["doubled"].tolist() == _approx([0.2, 0.4, math.nan, 0.8, 1.0])


def test_a_batch_is_halved_and_good_halves_are_scored_once() -> None:
    scorer = Moody("e")
    Guarded(scorer, on_error="skip").score(MEDIA, PROMPTS)
    assert scorer.asked == ["abcde", "ab", "cde", "c", "de", "d", "e"]


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_gradients_of_the_others_are_untouched(how: str) -> None:
    media = MEDIA.clone().requires_grad_()
    mean = Guarded(Moody("b", how), on_error="skip").score(media, PROMPTS).mean
    mean[~mean.isnan()].sum().backward()
    plain = MEDIA.clone().requires_grad_()
    Channel(0).score(plain, PROMPTS).mean.sum().backward()
    assert torch.equal(media.grad[[0, 2, 3, 4]], plain.grad[[0, 2, 3, 4]])
    assert media.grad[1].abs().max() == 0


def test_an_empty_batch_is_an_error_or_nothing() -> None:
    with pytest.raises(DiffalignError, match="'moody' got 0 media and 0 prompts"):
        Guarded(Moody("")).score(MEDIA[:0], [])
    guard = Guarded(Moody(""), on_error="skip")
    assert guard.score(MEDIA[:0], []).mean.shape == (0,)
    assert guard.skipped == 0
    with pytest.raises(DiffalignError, match="got 5 media and 2 prompts"):
        guard.score(MEDIA, ["a", "b"])


def test_retries_pass_over_a_passing_failure() -> None:
    guard = Guarded(Flaky(0), retries=2, wait=0)
    assert guard.score(MEDIA, PROMPTS).mean.tolist() == pytest.approx(SCORES)
    assert guard.of[0].calls == 3
    with pytest.raises(DiffalignError, match="ConnectionError: connection refused"):
        Guarded(Flaky(0), retries=1, wait=0).score(MEDIA, PROMPTS)


def test_no_answer_in_time() -> None:
    scorer = Silent()
    try:
        with pytest.raises(DiffalignError, match=r"'silent' failed.*TimeoutError: no answer within 0.05 s"):
            Guarded(scorer, timeout=0.05).score(MEDIA, PROMPTS)
        guard = Guarded(scorer, on_error="skip", timeout=0.05)
        assert guard.score(MEDIA, PROMPTS).mean.isnan().all()
        assert guard.skipped == 5
        assert scorer.calls == 2  # Halving would have waited nine times more.
    finally:
        scorer.release.set()
    assert Guarded(scorer, timeout=30).score(MEDIA, PROMPTS).mean.tolist() == pytest.approx(SCORES)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_thread_of_a_timeout_keeps_the_gradient_mode(enabled: bool) -> None:
    media = MEDIA.clone().requires_grad_()
    with torch.set_grad_enabled(enabled):
        assert Guarded(Channel(0), timeout=30).score(media, PROMPTS).mean.requires_grad is enabled


def test_errors_in_the_thread_are_reported_too() -> None:
    with pytest.raises(DiffalignError, match="ValueError: cannot read it"):
        Guarded(Moody("a"), timeout=30).score(MEDIA, PROMPTS)


def test_a_set_is_skipped_as_a_whole() -> None:
    class FailingSet(SetReward):
        def score(self, media: Tensor, prompts: Sequence[str]) -> RewardOutput:
            raise ValueError("singular")

    guard = Guarded(FailingSet(0), on_error="skip")
    assert guard.score(MEDIA, PROMPTS).mean.isnan().all()
    assert guard.skipped == 5


def test_a_guard_is_transparent_and_nests() -> None:
    guard = Guarded(Channel(0))
    assert isinstance(guard, Reward)
    assert guard.name == "channel-0"
    assert guard.differentiable
    assert facts_of(guard).scale == "0 to 1"
    total = WeightedSum([Guarded(Moody("b"), on_error="skip"), Channel(0)])
    assert total.score(MEDIA, PROMPTS).mean.tolist() == _approx([0.2, math.nan, 0.6, 0.8, 1.0])


def test_running_statistics_survive_skipped_samples() -> None:
    total = WeightedSum([Guarded(Moody("b"), on_error="skip")], normalise="running")
    mean = total.score(MEDIA, PROMPTS).mean
    assert total.panel.normaliser.moments.count.tolist() == [4.0]
    assert mean.isnan().tolist() == [False, True, False, False, False]


def test_bad_options_are_refused() -> None:
    with pytest.raises(DiffalignError, match="on_error is 'ignore'; expected raise or skip"):
        load_reward({"reward": "guarded", "of": "combine_fakes:Channel", "on_error": "ignore"})
    with pytest.raises(DiffalignError, match="timeout 0; expected"):
        Guarded(Channel(0), timeout=0)
    with pytest.raises(DiffalignError, match="wraps one reward; got a list of 2"):
        Guarded([Channel(0), Channel(1)])


def test_ask_names_the_reward_that_raised_and_keeps_its_own_messages():
    def boom(images, prompts):
        raise RuntimeError("scorer exploded")

    def told(images, prompts):
        raise DiffalignError("give me an endpoint")

    with pytest.raises(DiffalignError, match=r"'boom'.*scorer exploded"):
        ask(FunctionReward(boom), torch.zeros(2, 3, 4, 4), ["a", "b"])
    with pytest.raises(DiffalignError, match=r"^give me an endpoint$"):
        ask(FunctionReward(told), torch.zeros(2, 3, 4, 4), ["a", "b"])
