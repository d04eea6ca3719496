import itertools
import json
import math

import pytest
import torch
from few_steps import PROMPTS, RED, Redness, turbo
from PIL import Image

from diffalign.backbones import open_backbone
from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError
from diffalign.evaluation.prompts import EvalPrompt, with_seeds
from diffalign.inference.baseline import EVALUATIONS, SECONDS
from diffalign.inference.budget import Budget, Meter
from diffalign.inference.config import GenerationConfig
from diffalign.inference.methods import METHODS, drive, method_config
from diffalign.inference.noise_file import read_noises
from diffalign.inference.record import write_record
from diffalign.inference.replay import replay
from diffalign.inference.run import optimize
from diffalign.inference.trace import Trace, begun
from diffalign.rewards import RewardOutput, load_reward
from diffalign.sampling.generate import generate_images

ONE = GenerationConfig(steps=1, guidance=0.0, batch_size=4)


def search(method="best_of_n", reward=RED, prompts=PROMPTS, evaluations=6, **options):
    options = {"generation": ONE, "baseline": "none", **options}
    return optimize(
        turbo(), prompts, reward, method=method, budget=Budget(evaluations=evaluations), **options
    )


class Spread:
    """A reward whose uncertainty is its blueness."""

    name, modality, differentiable, kind = "spread", "image", True, "sample"

    def score(self, media, prompts):
        mean = media.mean((2, 3))
        return RewardOutput(mean[:, 0], mean[:, 2])


class Failing:
    """Fails from a call on."""

    name, modality, differentiable, kind = "failing", "image", True, "sample"

    def __init__(self, after, error):
        self.after, self.error, self.calls = after, error, 0

    def score(self, media, prompts):
        self.calls += 1
        if self.calls > self.after:
            raise self.error
        return Redness().score(media, prompts)


@pytest.mark.parametrize("method", [n for n, e in METHODS.items() if e.kind == "search" and n != "evolution"])
def test_every_search_runs_and_never_ends_below_its_start(method):
    found = search(method)
    assert found.evaluations == 6
    assert (found.rewards["after"] >= found.rewards["before"]).all()
    again = replayed(found)
    torch.testing.assert_close(RED.score(again, PROMPTS).mean, found.rewards["after"], atol=1e-5, rtol=0)


def replayed(found):
    from diffalign.inference.generation import Generation

    return Generation(turbo(), [p.text for p in found.prompts], steps=1, guidance=0.0).media(found.noises)


def test_before_is_what_generate_makes_and_the_start_is_left_alone():
    found = search("zero_order")
    rows = with_seeds([EvalPrompt(text) for text in PROMPTS], 0)
    assert list(found.prompts) == rows
    expected = generate_images(turbo(), PROMPTS, [row.seed for row in rows], steps=1, guidance=0.0)
    torch.testing.assert_close(found.media["before"], expected, atol=1e-4, rtol=0)


def test_gradient_methods_leave_the_first_noises_alone():
    """They belong to the baseline, too, whose first picture is the one before."""
    found = optimize(turbo(), PROMPTS, Redness(), method="reno", generation=ONE, budget=Budget(evaluations=4))
    torch.testing.assert_close(replayed(found), found.media["after"], atol=1e-4, rtol=0)
    assert not torch.equal(found.first, found.noises)
    own = replayed(type(found)(**{**found.__dict__, "noises": found.first}))
    torch.testing.assert_close(own, found.media["before"], atol=1e-4, rtol=0)
    assert found.baseline_cost[EVALUATIONS][0] == 4
    assert found.baseline_cost[SECONDS][0] >= 4
    assert (found.rewards[SECONDS] >= found.rewards[EVALUATIONS]).all()
    assert (found.rewards[EVALUATIONS] >= found.rewards["before"] - 1e-6).all()


def test_groups_change_nothing():
    """Prompts are independent, so how many are worked on at once is a matter of memory alone."""
    together = search("zero_order", evaluations=8)
    apart = search("zero_order", evaluations=8, generation=ONE.model_copy(update={"batch_size": 1}))
    torch.testing.assert_close(together.noises, apart.noises, atol=1e-5, rtol=0)
    assert [p.evaluations for p in together.trajectory] == [p.evaluations for p in apart.trajectory] == [4, 8]


def test_a_lower_confidence_bound_is_optimised():
    found = search(reward=Spread(), caution=2.0)
    media = found.media["after"].mean((2, 3))
    torch.testing.assert_close(found.rewards["after"], media[:, 0] - 2 * media[:, 2])
    assert found.reward == "spread - 2 std"
    with pytest.raises(DiffalignError, match=r"caution is 1, but reward 'red' states no uncertainty"):
        search(caution=1.0)


def test_an_ensemble_of_the_rewards_wing_has_gradients_down_to_the_noise():
    spec = {"reward": "wco", "of": ["brightness", "saturation"]}
    found = optimize(
        turbo(), PROMPTS, spec, method={"method": "reno", "iterations": 5}, generation=ONE, baseline="none",
        caution=0.5,
    )  # fmt: skip
    assert (found.rewards["after"] > found.rewards["before"]).all()


def test_held_out_rewards_are_measured_at_all_stages():
    found = search(held_out=[load_reward("brightness"), RED], baseline="evaluations")
    assert list(found.held_out) == ["brightness", "red"]
    assert list(found.held_out["red"]) == ["before", "after", EVALUATIONS]
    assert found.held_out["red"]["after"] == pytest.approx(found.rewards["after"].numpy(), abs=1e-6)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (
            torch.OutOfMemoryError("x"),
            "out of memory with 4 prompts at once, 1 steps and generation.checkpointing=none",
        ),
        (DiffalignError("the judge is gone"), "the judge is gone"),
    ],
)
def test_the_best_so_far_survives(error, message):
    """The first picture and two rounds of one picture per prompt are judged, then it ends."""
    reward = Failing(3, error)
    found = optimize(
        turbo(), PROMPTS, reward, method={"method": "reno", "iterations": 9}, generation=ONE, baseline="both"
    )
    assert message in found.stopped
    assert len(found.trajectory) == 2
    assert (found.rewards["after"] >= found.rewards["before"]).all()
    if isinstance(error, torch.OutOfMemoryError):
        assert "Try generation.batch_size=2, generation.checkpointing=steps" in found.stopped


def test_an_error_before_anything_is_found_is_raised():
    with pytest.raises(DiffalignError, match=r"out of memory .* generation.batch_size=2"):
        search(reward=Failing(0, torch.OutOfMemoryError("x")))
    with pytest.raises(KeyboardInterrupt):
        search(reward=Failing(0, KeyboardInterrupt()))
    with pytest.raises(DiffalignError, match=r"first picture of prompt 1 has the reward nan"):
        search(reward=Redness(nan_for="blue"))


def test_what_does_not_fit_is_refused():
    with pytest.raises(DiffalignError, match=r"unknown method 'renno'.* Did you mean 'reno'"):
        search("renno")
    with pytest.raises(
        DiffalignError, match=r"method.candidate: unknown key; did you mean method.candidates"
    ):
        method_config({"method": "best_of_n", "candidate": 3})
    with pytest.raises(DiffalignError, match=r"judges a set as a whole"):
        search(reward=load_reward({"reward": "vendi", "encoder": "pixels:8"}))
    with pytest.raises(DiffalignError, match="no prompts"):
        search(prompts=[])
    with pytest.raises(DiffalignError, match=r"budget.evaluations is 0; expected a number above 0"):
        Budget(evaluations=0)


def test_a_meter_allows_what_is_left():
    meter = Meter(Budget(evaluations=10), pictures=2)
    meter.spend(4)
    assert meter.affordable(3) == 2
    assert Meter(Budget(seconds=1e-9), 1, running=True).affordable(1) == 0
    assert Meter(Budget(), 1).affordable(5) > 1000


class Counting:
    """A search of numbers: candidate m of round k is k + m / 10."""

    def __init__(self):
        self.told, self.round = [], 0

    def ask(self):
        return (self.round + torch.arange(4) / 10).view(1, 4, 1, 1, 1).expand(1, 4, 4, 16, 16).clone()

    def tell(self, rewards):
        self.told.append(rewards)
        self.round += 1


def test_a_budget_that_ends_in_a_round_tells_nan_for_the_rest():
    from diffalign.inference.generation import Generation
    from diffalign.inference.objective import Objective
    from diffalign.inference.problem import Problem

    generation = Generation(turbo(), PROMPTS[:1], steps=1, guidance=0.0)
    start, meter = generation.start([1]), Meter(Budget(evaluations=6), 1)
    problem, asked = Problem(generation, Objective(RED), meter, start, [1]), Counting()
    drive(asked, problem, begun(meter, start, torch.zeros(1), torch.zeros(1, 3, 64, 64), 0))
    assert [int(rewards.isnan().sum()) for rewards in asked.told] == [0, 2]
    assert meter.evaluations == 6


def test_a_trace_keeps_the_best_and_never_nan():
    media, noises = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 1, 2, 2)
    trace = begun(Meter(Budget(), 2), noises, torch.tensor([0.5, 0.5]), media, shown=1)
    trace.saw(torch.tensor([1.0, math.nan]), media + 1, noises + 1)
    trace.saw(torch.tensor([0.7, 0.1]), media + 0.5, noises + 2)
    assert trace.rewards.tolist() == [1.0, 0.5]
    assert trace.media[:, 0, 0, 0].tolist() == [1.0, 0.0]
    assert trace.noises[:, 0, 0, 0, 0].tolist() == [1.0, 0.0]
    trace.saw(torch.tensor([2.0, 0.2]), media, None)
    assert trace.noises[0].isnan().all()
    assert torch.equal(trace.points[1].best, torch.tensor([1.0, 0.5]))


def test_an_animation_stays_short():
    media, noises = torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 1, 2, 2)
    trace: Trace = begun(Meter(Budget(), 1), noises, torch.zeros(1), media, shown=1)
    for i in range(200):
        trace.saw(torch.zeros(1), media + i / 255, noises)
    levels = [int(frame[0, 0, 0, 0]) for frame in trace.frames]
    assert len(levels) <= 40
    assert len({b - a for a, b in itertools.pairwise(levels)}) == 1
    assert levels[0] == 0
    assert levels[-1] > 180


def test_the_record_holds_it_all_and_replays(tmp_path):
    backbone = turbo()
    found = optimize(
        backbone, PROMPTS, Redness(), method={"method": "reno", "iterations": 4}, generation=ONE,
        held_out=["brightness"], baseline="evaluations",
    )  # fmt: skip
    write_record(found, backbone, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["cost"]["evaluations"] == 4
    assert [len(point["rewards"]) for point in result["trajectory"]] == [2] * 4
    assert result["prompts"][1]["prompt"] == PROMPTS[1]
    assert result["prompts"][0]["noise"]["after"]["norm"] == pytest.approx(32, abs=3)
    assert {"before", "after", "change", "interval", EVALUATIONS} == set(result["summary"]["brightness"])
    text = (tmp_path / "report.md").read_text()
    assert "| redness (optimised) |" in text
    assert "| brightness (held out) |" in text
    for name in ("before", "after", "best_of_n"):
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["0000.png", "0001.png"]
    with Image.open(tmp_path / "during" / "0000.gif") as animation:
        assert animation.n_frames >= 2
    assert Image.open(tmp_path / "during.png").width > Image.open(tmp_path / "during.png").height
    content = read_noises(tmp_path / "noise.safetensors")
    torch.testing.assert_close(replay(backbone, content), found.media["after"], atol=1e-4, rtol=0)
    assert content.seeds == [prompt.seed for prompt in found.prompts]


def test_other_files_and_other_models_are_refused(tmp_path, tiny_sd):
    with pytest.raises(DiffalignError, match="no noise file"):
        read_noises(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(DiffalignError, match=r"holds no noises of diffalign optimize"):
        read_noises(tmp_path / "x.safetensors")
    found, backbone = search(), turbo()
    write_record(found, backbone, tmp_path)
    other = open_backbone(ModelConfig(path=str(tiny_sd)), device="cpu")
    with pytest.raises(DiffalignError, match=r"noises have shape \(1, 4, 16, 16\), .* takes \(1, 4, 8, 8\)"):
        replay(other, read_noises(tmp_path / "noise.safetensors"))
