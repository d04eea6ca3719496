import math

import pytest
import torch
from few_steps import PROMPTS, RED, Redness, turbo
from steered import DEVIATION, MEAN, Pixel, gaussian, noise, problem, ran

from diffalign.backbones import open_backbone
from diffalign.config import ModelConfig
from diffalign.inference.config import GenerationConfig
from diffalign.inference.generation import Generation, ready
from diffalign.inference.run import optimize
from diffalign.inference.steering.demon import Demon, DemonConfig, mixture
from diffalign.inference.steering.svdd import SVDD, SVDDConfig
from diffalign.inference.steering.walk import Look, Walk
from diffalign.sampling.transition import Kernel

FOUR = GenerationConfig(steps=4, guidance=0.0, batch_size=8)
METHODS = ["svdd", "demon"]


@pytest.fixture(scope="module")
def model():
    """One for all tests: nothing of it changes."""
    return turbo()


def steered(backbone, method, reward=RED, **options):
    options = {"generation": FOUR, "baseline": "none", **options}
    return optimize(backbone, PROMPTS, reward, method=method, **options)


def gained(path, method, prompts=16, steps=20):
    """Mean gain of the reward over plain samples of the same noises, in the Gaussian world."""
    found, trace = problem(gaussian(path), Pixel(), ["x"] * prompts, steps, kernel=noise(), batch_size=2048)
    before = trace.rewards.clone()
    method.run(found, trace)
    return (trace.points[-1].rewards - before).mean().item(), found.meter.evaluations


@pytest.mark.parametrize("method", METHODS)
def test_one_candidate_is_plain_sampling(method, model):
    found = steered(model, {"method": method, "candidates": 1})
    assert found.evaluations == 4
    torch.testing.assert_close(found.trajectory[-1].rewards, found.rewards["before"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world", ["turbo", "flow"])
def test_the_noises_give_the_picture_again(method, world, model, tiny_sd3):
    """The last step of a flow's SDE draws noise, too, and its candidates are finished pictures."""
    generation, backbone = FOUR, model
    if world == "flow":
        backbone = open_backbone(ModelConfig(path=str(tiny_sd3), precision="fp32"), device="cpu")
        generation = FOUR.model_copy(update={"kernel": "flow_sde", "steps": 5, "guidance": 3.0})
    found = steered(backbone, {"method": method, "candidates": 5}, generation=generation)
    assert (found.rewards["after"] > found.rewards["before"]).any()
    kernel = Kernel("flow_sde") if world == "flow" else None
    again = Generation(backbone, PROMPTS, steps=generation.steps, guidance=generation.guidance, kernel=kernel)
    with ready(backbone):
        media = again.media(found.noises)
    torch.testing.assert_close(media, found.media["after"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_seeds_decide_and_batches_do_not(method, model):
    options = {"method": method, "candidates": 3}
    whole = steered(model, options)
    apart = steered(model, options, generation=FOUR.model_copy(update={"batch_size": 1}))
    # Demon measures rewards by their own deviation, here a thousandth, so that rounding is seen in its noises.
    torch.testing.assert_close(apart.noises, whole.noises, atol=0.02, rtol=0)
    assert not torch.equal(steered(model, options, seed=1).noises, whole.noises)


def test_what_it_costs(tiny_sd):
    """4 steps that draw noise, but the candidates of the last are finished. SVDD with 5: 1 + 3 x 5; Demon: 4 + 3 x 5,
    with a look ahead of two calls one more for each candidate of the first two steps (the third leaves one step)."""

    def cost(method, evaluations=None):
        found, _ = ran(tiny_sd, method, evaluations=evaluations)
        assert found.generation.evaluations == 2 * found.meter.evaluations
        return found.meter.evaluations

    assert cost(SVDD(SVDDConfig(candidates=5))) == 16
    assert cost(Demon(DemonConfig(candidates=5))) == 19
    assert cost(Demon(DemonConfig(candidates=5, look_ahead=2))) == 29
    # Shares 0.5 and 1 of 4 steps: the third and the fourth.
    assert cost(SVDD(SVDDConfig(candidates=5, window=(0.5, 1.0)))) == 4 + 4
    assert cost(Demon(DemonConfig(candidates=5, window=(0.5, 1.0)))) == 4 + 5
    # Of 11 evaluations: SVDD 4 + 3 (m - 1), so 3 candidates; Demon 4 + 3 m, so 2. What is left is too little for more.
    assert cost(SVDD(), 11) == 10
    assert cost(Demon(), 11) == 10


@pytest.mark.parametrize(
    ("method", "calls"), [(SVDD(SVDDConfig(candidates=5)), 8), (Demon(DemonConfig(candidates=5)), 9)]
)
def test_when_time_is_over_the_rest_is_plain(method, calls, tiny_sd, monkeypatch):
    asked = []
    monkeypatch.setattr(Walk, "late", property(lambda self: asked.append(1) or len(asked) > 1))
    assert ran(tiny_sd, method)[0].meter.evaluations == calls


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_that_fails_leaves_the_plain_picture(method, model):
    found = steered(model, {"method": method, "candidates": 3}, Redness(nan_for="blue", after=1))
    assert found.rewards["after"][1] == found.rewards["before"][1]
    assert found.rewards["after"][0] > found.rewards["before"][0]
    assert found.noises.isfinite().all()


def test_svdd_follows_the_tilted_distribution(tiny_sd):
    """Gaussians with a linear reward: temperature a raises the mean by var / a, and leaves the variance as it is. In 10
    steps the sampler's own is less than the data's 0.64. The best of 8 at every step goes far beyond."""
    found, trace = problem(gaussian(tiny_sd), Pixel(), ["x"] * 256, 10, kernel=noise(), batch_size=2048)
    plain = trace.rewards.clone()
    SVDD(SVDDConfig(candidates=8, temperature=1.0)).run(found, trace)
    soft = trace.points[-1].rewards
    assert soft.mean().item() == pytest.approx((plain.mean() + plain.var()).item(), abs=0.12)
    assert soft.var().item() == pytest.approx(plain.var().item(), abs=0.12)
    best, _ = gained(tiny_sd, SVDD(SVDDConfig(candidates=8)))
    assert best > 1.0


def test_svdd_chooses_in_proportion():
    """Temperature 1 / log 3: a reward higher by 1 weighs three times as much; the first of four is not known."""
    rewards = torch.tensor([[math.nan, 0.0, 1.0, 0.0]])
    look = Look(rewards, torch.ones(1), torch.tensor([2]), torch.zeros(1, 3, 2, 2))
    soft = SVDD(SVDDConfig(temperature=1 / math.log(3)))
    drawn = [
        soft._index(look, torch.tensor([[u]], dtype=torch.float64)).item()
        for u in (0.0, 0.19, 0.21, 0.79, 0.81)
    ]
    assert drawn == [1, 1, 2, 2, 3]
    assert SVDD()._index(look, torch.zeros(1, 1)).item() == 2


def test_a_mixture_by_hand():
    """Rewards 1, 0, -1 and d = 4: deviation 1, weights tanh 1, 0 and -tanh 1; the scale falls out."""
    noises = torch.tensor([[[1.0, 1, 1, 0], [9, 9, 9, 9], [0, 1, 1, 0]]])
    mixed = mixture(noises, torch.tensor([[1.0, 0.0, -1.0]]), "tanh", None)
    torch.testing.assert_close(mixed, torch.tensor([[2.0, 0, 0, 0]]))
    # exp(r) = 1, 3 and nothing: (1, 0, 0, 0) + 3 (0, 1, 0, 0), of length sqrt 10, at norm 2.
    noises = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]])
    mixed = mixture(noises, torch.tensor([[0.0, math.log(3), math.nan]]), "boltzmann", 1.0)
    torch.testing.assert_close(mixed, torch.tensor([[1.0, 3, 0, 0]]) * 2 / math.sqrt(10))


@pytest.mark.parametrize("weighting", ["tanh", "boltzmann"])
@pytest.mark.parametrize("rewards", [[1.0, 1.0], [math.nan, 2.0], [math.nan, math.nan]])
def test_rewards_that_tell_nothing_leave_the_noise_alone(weighting, rewards):
    noises = torch.randn(1, 2, 3, 4, 4)
    assert torch.equal(mixture(noises, torch.tensor([rewards]), weighting, None), noises[:, 0])


def test_no_scale_of_the_reward_matters_to_demon():
    noises, rewards = torch.randn(2, 6, 3, 4, 4), torch.randn(2, 6)
    mixed = mixture(noises, rewards, "tanh", None)
    torch.testing.assert_close(mixture(noises, 1000 * rewards - 5, "tanh", None), mixed, atol=1e-4, rtol=0)
    torch.testing.assert_close(mixed.flatten(1).norm(dim=1), torch.full((2,), math.sqrt(48)))


def test_demon_climbs_without_gradients(tiny_sd):
    """Each step's noise leans towards the reward's one direction by about E|z| sqrt K; the data's deviation is 0.8."""
    for look_ahead, calls in ((1, 19 * 8), (3, 3 * 17 * 8 + 2 * 8 + 8)):
        found, evaluations = gained(
            tiny_sd, Demon(DemonConfig(candidates=8, look_ahead=look_ahead)), prompts=16
        )
        assert found > 1.0, look_ahead
        assert evaluations == 20 + calls


def test_looking_ahead_ends_where_the_deterministic_sampler_does(tiny_sd):
    """With a call for every step left it is DDIM itself; with one it is what the network sees."""
    found, _ = problem(gaussian(tiny_sd), Pixel(), ["x", "y"], 6)
    walk = Walk(found)
    x = walk.begin(found.start[:, None])
    plain = found.generation.latents(found.start)
    torch.testing.assert_close(walk.ahead(x, 0, 6)[:, 0], plain, atol=0.02, rtol=0)
    torch.testing.assert_close(walk.ahead(x, 0, 1), walk.see(x, 0).clean)
    assert abs(float(walk.see(x, 0).clean.mean()) - MEAN) < DEVIATION
    assert walk.ahead(x, 6, 4) is x
