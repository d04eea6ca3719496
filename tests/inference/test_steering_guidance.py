import math

import pytest
import torch
from few_steps import PROMPTS, RED, Redness, turbo
from steered import DEVIATION, Pixel, SeenPixel, gaussian, noise, problem, ran

from diffalign.errors import DiffalignError
from diffalign.inference.config import GenerationConfig
from diffalign.inference.noise_file import check_replayable, read_noises
from diffalign.inference.record import write_record
from diffalign.inference.run import optimize
from diffalign.inference.steering.guidance import (
    Pull,
    Push,
    UniversalGuidance,
    UniversalGuidanceConfig,
    pushed,
)
from diffalign.inference.steering.noisy_reward import NoisyReward, NoisyRewardConfig
from diffalign.inference.steering.walk import Walk, renoised
from diffalign.process import Process
from diffalign.rewards import RewardOutput

FOUR = GenerationConfig(steps=4, guidance=0.0, batch_size=8)
STRONG = {"method": "universal_guidance", "strength": 1e4, "clip": 0.2}
FLOW = Process("flow")


@pytest.fixture(scope="module")
def model():
    """One for all tests: nothing of it changes."""
    return turbo()


def steered(backbone, method, reward, **options):
    options = {"generation": FOUR, "baseline": "none", **options}
    return optimize(backbone, PROMPTS, reward, method=method, **options)


def pulled(shape, value, t, process=FLOW):
    x, prediction = torch.randn(2, *shape).unbind()
    x, prediction, gradient = x[None], prediction[None], torch.full((1, *shape), value)
    return Pull(prediction, gradient, torch.zeros(1)), x, torch.tensor([t])


def test_the_velocity_moves_by_strength_times_t_over_one_minus_t():
    """Flow-NRG's equation: at t = 0.75, gradient 0.1 and w = 2 the velocity falls by 2 x 3 x 0.1."""
    pull, x, t = pulled((4, 8, 8), 0.1, 0.75)
    found = pushed(FLOW, pull, x, t, Push(2.0, None, (0, 1)))
    torch.testing.assert_close(found, pull.prediction - 0.6)


def test_the_score_moves_by_the_gradient_whatever_is_predicted():
    """-eps / sigma is the score: eps falls by sigma s g."""
    table = torch.linspace(0.99, 0.01, 10, dtype=torch.float64)
    for prediction in ("epsilon", "sample", "v_prediction"):
        process = Process(prediction, table)
        pull, x, t = pulled((4, 8, 8), 0.1, 6)
        before = process.to_eps(pull.prediction, x, t)
        after = process.to_eps(pushed(process, pull, x, t, Push(2.0, None, (0, 1))), x, t)
        sigma = math.sqrt(1 - table[6])
        torch.testing.assert_close(after, before - 0.2 * sigma, atol=1e-4, rtol=0)


def test_a_clip_bounds_the_change_of_the_noise():
    pull, x, t = pulled((4, 8, 8), 1.0, 0.5)
    eps = FLOW.to_eps(pull.prediction, x, t)
    moved = FLOW.to_eps(pushed(FLOW, pull, x, t, Push(1e6, 0.3, (0, 1))), x, t)
    assert float((moved - eps).norm() / eps.norm()) == pytest.approx(0.3, rel=1e-4)
    small = FLOW.to_eps(pushed(FLOW, pull, x, t, Push(1e-3, 0.3, (0, 1))), x, t)
    torch.testing.assert_close(small, eps - 0.5e-3)


def test_where_nothing_pulls_the_prediction_stays_to_the_bit():
    for value, t in ((0.0, 0.5), (1.0, 1.0)):
        pull, x, times = pulled((4, 8, 8), value, t)
        assert torch.equal(pushed(FLOW, pull, x, times, Push(1.0, None, (0, 1))), pull.prediction)


def test_noise_comes_back_by_the_forward_process():
    """On a flow from t = 0.2 to 0.6: alpha 0.8 to 0.4, so half is kept and sqrt(0.36 - 0.01) is fresh."""
    x, z, one = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 2.0), torch.ones(1)
    found = renoised(FLOW, x, 0.6 * one, 0.2 * one, z)
    assert found.item() == pytest.approx(1.5 + 2 * math.sqrt(0.35), rel=1e-5)
    assert renoised(FLOW, x, one, 0.2 * one, z).item() == pytest.approx(2.0)


def shifted(path, method, kernel=None, steps=25):
    """What guidance adds to pictures of the same noises `[B, 3, h, w]`, and the counts."""
    found, trace = problem(gaussian(path), Pixel(), ["x", "y", "z"], steps, kernel=kernel)
    before = trace.media.clone()
    method(found).run(found, trace)
    return trace.media - before, found


@pytest.mark.parametrize("world", ["tiny_sd", "tiny_sd3"])
@pytest.mark.parametrize("random", [False, True])
def test_linear_rewards_of_gaussians_rise_by_what_the_tilt_says(world, random, request):
    """Everything is linear, so each pixel moves by the same amount whatever its noise: the rewarded one by s var, all
    others not at all. Both methods know the same gradient. The samplers are good to some percent in 25 steps."""
    path = request.getfixturevalue(world)
    kernel = None if not random else noise("flow_sde", 0.7) if world == "tiny_sd3" else noise()
    universal, found = shifted(
        path, lambda _: UniversalGuidance(UniversalGuidanceConfig(strength=2.0, clip=None)), kernel
    )
    gain = universal[:, 0, 1, 2].clone()
    assert gain.tolist() == pytest.approx([2 * DEVIATION**2] * 3, rel=0.2)
    assert float(gain.max() - gain.min()) < 1e-3
    universal[:, 0, 1, 2] = 0
    assert float(universal.abs().max()) < 1e-4
    assert (found.meter.evaluations, found.meter.backwards) == (25, 25)

    def noisy(problem):
        process = problem.generation.backbone.process
        problem.objective.reward = SeenPixel(process)
        return NoisyReward(NoisyRewardConfig(strength=2.0, clip=None))

    also, found = shifted(path, noisy, kernel)
    torch.testing.assert_close(also[:, 0, 1, 2], gain, atol=1e-3, rtol=0)
    assert (found.meter.evaluations, found.meter.backwards) == (25, 0)


def test_recurrence_keeps_the_sample_and_costs_its_turns(tiny_sd):
    found, trace = problem(gaussian(tiny_sd), Pixel(), ["x"] * 32, 20, kernel=noise())
    options = UniversalGuidanceConfig(strength=2.0, clip=None, recurrence=3, window=(0.0, 0.5))
    UniversalGuidance(options).run(found, trace)
    # Steps 0 to 10 lie in the window.
    assert (found.meter.evaluations, found.meter.backwards) == (20 + 11 * 2, 33)
    gain = trace.points[-1].rewards.mean().item() - 0.5
    assert 0.3 < gain < 2 * DEVIATION**2 + 0.3
    rest = trace.media[:, 1:]
    assert rest.std().item() == pytest.approx(DEVIATION, abs=0.15)


def test_a_strength_of_zero_is_plain_sampling(model):
    found = steered(model, {**STRONG, "strength": 0}, Redness())
    torch.testing.assert_close(found.trajectory[-1].rewards, found.rewards["before"], atol=1e-5, rtol=0)
    assert (found.evaluations, found.backwards) == (4, 4)


def test_rewards_of_a_real_pipeline_rise_and_no_noise_is_claimed(model, tmp_path):
    found = steered(model, STRONG, Redness())
    assert (found.rewards["after"] > found.rewards["before"] + 1e-3).all()
    assert found.noises.isnan().all()
    # Four looks on the way, and the picture.
    assert len(found.trajectory) == 5
    write_record(found, model, tmp_path)
    assert "no noise gives them again" in (tmp_path / "report.md").read_text()
    with pytest.raises(DiffalignError, match="found by steering the sampler"):
        check_replayable(read_noises(tmp_path / "noise.safetensors"))


def test_seeds_decide_and_batches_do_not(model):
    whole = steered(model, STRONG, Redness())
    apart = steered(model, STRONG, Redness(), generation=FOUR.model_copy(update={"batch_size": 1}))
    torch.testing.assert_close(apart.media["after"], whole.media["after"], atol=1e-4, rtol=0)
    assert (apart.evaluations, apart.backwards) == (whole.evaluations, whole.backwards) == (4, 4)


def test_the_budget_is_kept(tiny_sd):
    """9 evaluations: two turns of each of four steps, not three; 16 leave four for one more run of one turn."""
    method = UniversalGuidance(UniversalGuidanceConfig(recurrence=3))
    assert ran(tiny_sd, method, evaluations=9)[0].meter.evaluations == 8
    found, _ = ran(tiny_sd, method, evaluations=16)
    assert (found.meter.evaluations, found.generation.evaluations) == (16, 32)
    assert ran(tiny_sd, method, evaluations=3)[1].points == []


def test_when_time_is_over_the_rest_is_plain(tiny_sd, monkeypatch):
    asked = []
    monkeypatch.setattr(Walk, "late", property(lambda self: asked.append(1) or len(asked) > 1))
    meter = ran(tiny_sd, UniversalGuidance())[0].meter
    assert (meter.evaluations, meter.backwards) == (4, 1)


def test_a_prompt_without_a_gradient_goes_on_alone(model):
    """The first call judges the first picture; from the second on the reward of one prompt has no gradient."""
    found = steered(model, STRONG, Redness(nan_for="blue", after=1, gradient_only=True))
    assert list(found.failures) == [1]
    assert "at step 0; the picture is not guided" in found.failures[1]
    assert found.rewards["after"][1] == pytest.approx(float(found.rewards["before"][1]), abs=1e-5)
    assert found.rewards["after"][0] > found.rewards["before"][0]


class Noisy(Redness):
    """Judges noisy latents by the mean of their first channel, without gradients if told so."""

    def __init__(self, detached=False):
        super().__init__()
        self.detached, self.times = detached, []

    def score_step(self, latents, times, prompts):
        assert len(latents) == len(times) == len(prompts)
        self.times.append(int(times[0]))
        score = latents[:, 0].mean((1, 2))
        return score.detach() if self.detached else score


class OnlyNoisy(Noisy):
    """A scorer of its own, which is never asked about pictures."""

    def score(self, media, prompts):
        return RewardOutput(torch.full((len(media),), math.nan))


def test_a_reward_of_noisy_latents_is_told_the_time(model):
    reward = Noisy()
    found = steered(model, {"method": "noisy_reward", "window": (0.0, 0.5)}, reward)
    assert reward.times == [999, 749, 499]
    assert found.noises.shape == found.first.shape
    assert (found.evaluations, found.backwards) == (4, 0)
    plain = steered(model, {"method": "noisy_reward", "strength": 0}, Noisy())
    torch.testing.assert_close(plain.trajectory[-1].rewards, plain.rewards["before"], atol=1e-5, rtol=0)
    assert float((found.trajectory[-1].rewards - plain.trajectory[-1].rewards).abs().min()) > 1e-5


def test_another_scorer_of_noisy_latents_may_be_named(model):
    spec = f"{__name__}:OnlyNoisy"
    found = steered(model, {"method": "noisy_reward", "scorer": spec}, RED)
    assert found.trajectory[-1].rewards.isfinite().all()
    assert not torch.equal(found.trajectory[-1].rewards, found.rewards["before"])


def test_rewards_that_cannot_guide_are_refused(model):
    with pytest.raises(
        DiffalignError, match=r"universal_guidance needs gradients, but reward 'red' has none.*svdd"
    ):
        steered(model, "universal_guidance", RED)
    with pytest.raises(
        DiffalignError, match=r"'redness' has no method `score_step.*method=universal_guidance"
    ):
        steered(model, "noisy_reward", Redness())
    found = steered(model, "noisy_reward", Noisy(detached=True))
    assert "has to be differentiable in latents" in found.stopped
