import pytest
import torch
from few_steps import PROMPTS, RED, turbo
from steered import DEVIATION, MEAN, Pixel, gaussian, problem

from diffalign.errors import DiffalignError
from diffalign.inference.config import GenerationConfig
from diffalign.inference.run import optimize
from diffalign.inference.steering.paths import Paths, PathsConfig, Round, plan
from diffalign.rewards import RewardOutput

FOUR = GenerationConfig(steps=4, guidance=0.0, batch_size=8)


class Indifferent(Pixel):
    """Every picture is as good as any other."""

    def score(self, media, prompts):
        return RewardOutput(torch.zeros(len(media)))


class Failing(Pixel):
    """No number for the dark half of the pictures."""

    def score(self, media, prompts):
        value = media[:, 0, 1, 2]
        return RewardOutput(torch.where(value > MEAN, value, torch.nan))


@pytest.fixture(scope="module")
def model():
    """One for all tests: nothing of it changes."""
    return turbo()


def searched(path, config, reward, prompts=64, steps=20, evaluations=None):
    found, trace = problem(
        gaussian(path), reward, ["x"] * prompts, steps, batch_size=4096, evaluations=evaluations
    )
    before = trace.rewards.clone()
    Paths(config).run(found, trace)
    return found, trace, before


def test_the_rounds_of_twenty_steps():
    """start 0.85 is step 17, back 0.6 are 12 steps, advance 0.05 is one; a look that is not the end costs a call."""
    expected = [Round(17, 5, 18, True), Round(18, 6, 19, True), Round(19, 7, 20, False)]
    steps = plan(PathsConfig(), 20)
    assert (steps.first, steps.rounds) == (17, expected)
    # 13 + 1, 13 + 1 and 13 calls of 2 x 4 states, after 17 of 2.
    assert steps.calls(2, 4) == 2 * 17 + 8 * 41


@pytest.mark.parametrize("steps", [2, 3, 7, 50])
@pytest.mark.parametrize(("start", "back", "advance"), [(0.1, 1.0, 0.3), (1.0, 0.1, 0.01), (0.5, 0.5, 1.0)])
def test_rounds_go_back_and_end_at_the_end(steps, start, back, advance):
    found = plan(PathsConfig(start=start, back=back, advance=advance), steps)
    assert 1 <= found.first < steps
    begins = [one.begin for one in found.rounds]
    ends = [one.end for one in found.rounds]
    assert begins == [found.first, *ends[:-1]]
    assert ends[-1] == steps
    assert all(one.back < one.begin < one.end for one in found.rounds)


def test_what_it_costs(tiny_sd):
    """As planned; with a budget fewer candidates, and nothing where not even one fits."""
    config = PathsConfig(start=0.5, back=0.5, advance=0.25)
    found, trace, _ = searched(tiny_sd, config, Pixel(), prompts=2, steps=4)
    # Step 2, then 0 to 3 with a look and 1 to 4: 2 (2 + 4 (4 + 3)).
    assert found.meter.evaluations == found.generation.evaluations / 2 == 60
    assert [point.evaluations for point in trace.points] == [2 * 2 + 8 * 4, 60]
    assert searched(tiny_sd, config, Pixel(), 2, 4, evaluations=50)[0].meter.evaluations == 2 * (2 + 3 * 7)
    assert searched(tiny_sd, config, Pixel(), 2, 4, evaluations=17)[0].meter.evaluations == 0
    # A second run follows while there is money for it.
    assert searched(tiny_sd, config, Pixel(), 2, 4, evaluations=90)[0].meter.evaluations == 60 + 2 * (2 + 7)


def test_without_a_preference_pictures_stay_those_of_the_model(tiny_sd):
    """Noising again and going on keeps the distribution: here a Gaussian, up to the steps' size."""
    config = PathsConfig(survivors=1, candidates=1, back=0.5, advance=0.1)
    found, trace = problem(gaussian(tiny_sd), Pixel(), ["x"] * 512, 50, batch_size=4096)
    trace.rewards.fill_(-torch.inf)
    Paths(config).run(found, trace)
    pixels = trace.media[:, :, :4, :4]
    assert pixels.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert pixels.std().item() == pytest.approx(DEVIATION, rel=0.05)


def test_selection_raises_the_reward(tiny_sd):
    """The best of 8 independent pictures would gain 1.42 deviations; rounds that build on each other gain more."""
    _, trace, before = searched(tiny_sd, PathsConfig(back=0.4), Pixel(), prompts=128)
    gain = (trace.points[-1].rewards - MEAN).mean().item() / DEVIATION
    assert gain > 1.6
    assert (trace.rewards >= before).all()


def test_indifference_chooses_nothing(tiny_sd):
    _, trace, _ = searched(tiny_sd, PathsConfig(), Indifferent(), prompts=2)
    assert trace.rewards.tolist() == [0, 0]


def test_states_without_a_score_do_not_go_on(tiny_sd):
    found, trace = problem(gaussian(tiny_sd), Pixel(), ["x"] * 32, 20, batch_size=4096)
    found.objective.reward = Failing()
    Paths(PathsConfig(back=0.3)).run(found, trace)
    assert (trace.points[-1].rewards > MEAN).float().mean() > 0.9


def test_seeds_decide_and_batches_do_not(model):
    def run(**options):
        options = {"generation": FOUR, "baseline": "none", **options}
        return optimize(model, PROMPTS, RED, method={"method": "paths", "candidates": 3}, **options)

    whole, apart = run(), run(generation=FOUR.model_copy(update={"batch_size": 1}))
    torch.testing.assert_close(apart.rewards["after"], whole.rewards["after"], atol=1e-4, rtol=0)
    assert (whole.rewards["after"] > whole.rewards["before"]).any()
    assert not torch.equal(run(seed=1).rewards["after"], whole.rewards["after"])
    # No noise gives a picture that was noised on its way.
    changed = whole.rewards["after"] > whole.rewards["before"]
    assert whole.noises[changed].isnan().all()


def test_one_step_has_no_way_back(model):
    with pytest.raises(DiffalignError, match=r"paths goes back some steps.*has 1.*random_search"):
        optimize(model, PROMPTS, RED, method="paths", generation=FOUR.model_copy(update={"steps": 1}))
