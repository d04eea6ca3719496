import math
from types import SimpleNamespace

import pytest
import torch
from few_steps import PROMPTS, RED, Redness, fresh_turbo, turbo

from diffalign.errors import DiffalignError
from diffalign.inference.budget import Budget, Meter
from diffalign.inference.config import GenerationConfig
from diffalign.inference.dno import DNO, DNOConfig
from diffalign.inference.generation import Generation, ready
from diffalign.inference.hybrid import direction, probed_direction
from diffalign.inference.objective import Objective
from diffalign.inference.problem import Problem
from diffalign.inference.regularisers import concentration_penalty
from diffalign.inference.run import optimize
from diffalign.inference.trace import begun
from diffalign.rewards import RewardOutput
from diffalign.sampling.transition import Kernel

NOISY = GenerationConfig(steps=3, guidance=0.0, kernel="ddim", distilled=True)


def dno(reward=None, **options):
    known = {name: options.pop(name) for name in list(options) if name in DNOConfig.model_fields}
    options = {"generation": NOISY, "baseline": "none", **options}
    return optimize(turbo(), PROMPTS, reward or Redness(), method={"method": "dno", **known}, **options)


class LinearGeneration:
    """Pictures `[N, 3, 1, 2]` are orthonormal mixtures of noises `[N, 3, 1, 2, 2]`, around grey."""

    def __init__(self, prompts):
        mixed = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
        self.matrix = 0.05 * torch.linalg.qr(mixed).Q[:6]
        self.prompts, self.cost, self.noise_shape = list(prompts), 1, (3, 1, 2, 2)
        self.backbone = SimpleNamespace(device=torch.device("cpu"), latent_shape=(1, 2, 2), resolution=(1, 2))
        self.sampler = SimpleNamespace(batch_size=512)

    def latents(self, noises, rows=None):
        return (noises.flatten(1) @ self.matrix.T).view(-1, 3, 1, 2)

    def decode(self, latents):
        return latents + 0.5

    def __call__(self, noises, rows=None):
        return self.decode(self.latents(noises))

    media = __call__


class Bowl:
    """Minus the squared distance to a picture that belongs to the prompt."""

    name, modality, kind = "bowl", "image", "sample"

    def __init__(self, differentiable=True):
        self.differentiable = differentiable

    def score(self, media, prompts):
        if not self.differentiable:
            media = media.detach()
        wanted = media.new_tensor([0.2 if "red" in prompt else 0.9 for prompt in prompts])
        return RewardOutput(-(media - wanted.view(-1, 1, 1, 1)).square().sum((1, 2, 3)))


def linear_problem(reward=None, prompts=PROMPTS, seeds=(0, 1), budget=Budget()):
    start = torch.stack(
        [torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    generation = LinearGeneration(prompts)
    meter = Meter(budget, len(seeds))
    return Problem(generation, Objective(reward or Bowl()), meter, start, list(seeds), "all")


def ran(problem, **options):
    """The trace of DNO on a problem."""
    media = problem.generation(problem.start)
    trace = begun(problem.meter, problem.start, problem.objective(media, problem.texts), media, 8)
    DNO(DNOConfig(**options)).run(problem, trace)
    return trace


def cosines(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


def test_the_gradient_is_that_of_finite_differences():
    """Network in three noisy steps, VAE, reward and an active regulariser in float64."""
    backbone = fresh_turbo()
    generation = Generation(
        backbone, PROMPTS, steps=3, guidance=0.0, kernel=Kernel("ddim"), checkpointing="steps"
    )
    backbone.core.double()
    backbone.pipeline().vae.double()
    backbone.dtype = torch.float64
    start = 1.1 * generation.start([0, 1]).double()
    problem = Problem(generation, Objective(Redness()), Meter(Budget(), 2), start, [0, 1], "all")
    method = DNO(DNOConfig(gamma=1e-3, permutations=2, weight=3.0))
    noise = start.clone().requires_grad_()
    with ready(backbone):
        look = method.look(problem, noise, 0)
        look.losses.sum().backward()
        towards = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ahead, behind = (method.look(problem, start + s * 1e-5 * towards, 0).losses.sum() for s in (1, -1))
    penalty = 1e-3 * concentration_penalty(start, 0, permutations=2)
    torch.testing.assert_close(look.losses, penalty - 3 * look.rewards)
    expected = float((ahead - behind) / 2e-5)
    assert float((noise.grad * towards).sum()) == pytest.approx(expected, rel=1e-5)
    # Every noise matters: the first, and those of the two steps that draw one.
    assert noise.grad.shape[1] == 3
    assert (noise.grad.flatten(2).norm(dim=2) > 1e-6).all()


@pytest.mark.parametrize(("size", "active"), [(1.0, False), (1.2, True)])
def test_the_regulariser_acts_outside_the_typical_set_only(size, active):
    """Typical noise is at the floor 2 ln 2 with gradient 0; scaled up, its penalty pulls back."""
    noise = torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(7)) * size
    noise.requires_grad_()
    penalty = DNO(DNOConfig(gamma=2.0, permutations=0))._penalty(noise, 0)
    penalty.sum().backward()
    assert (penalty.item() > 4 * math.log(2) + 1) == active
    assert ((noise.grad * noise).sum().item() > 0) == active
    assert bool(noise.grad.any()) == active


def test_a_direction_by_hand():
    """Rises 6 and 8 along two axes: (0.6, 0.8); a failed probe counts as no rise, and no rise has no direction."""
    steps = torch.eye(2).expand(3, 2, 2)
    rises = torch.tensor([[6.0, 8.0], [math.nan, -2.0], [0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.0, -1.0], [0.0, 0.0]])
    torch.testing.assert_close(direction(steps, rises), expected)


@pytest.mark.parametrize("around", ["noise", "latent", "picture"])
def test_a_black_box_gradient_is_near_the_true_one_of_a_quadratic(around):
    problem = linear_problem(Bowl(differentiable=False))
    media = problem.generation(problem.start)
    truth = 2 * (torch.tensor([0.2, 0.9]).view(-1, 1, 1, 1) - media)
    at = {"noise": problem.start, "latent": media - 0.5, "picture": media}[around]
    found = probed_direction(problem, around, at, mu=0.05, pairs=2000, iteration=0)
    assert (cosines(found, truth) > 0.99).all()
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(2))
    assert problem.meter.evaluations == (4000 if around == "noise" else 0)
    few = probed_direction(problem, around, at, mu=0.05, pairs=4, iteration=0)
    other = probed_direction(problem, around, at, mu=0.05, pairs=4, iteration=1)
    assert (cosines(few, truth) > 0).all()
    assert not torch.equal(few, other)


@pytest.mark.parametrize("around", ["noise", "latent", "picture"])
def test_the_hybrid_gradient_points_where_the_exact_one_does(around):
    found = []
    for differentiable, pairs in ((True, 1), (False, 2000)):
        problem = linear_problem(Bowl(differentiable))
        noise = problem.first.clone().requires_grad_()
        look = DNO(DNOConfig(around=around, pairs=pairs, mu=0.05)).look(problem, noise, 0)
        look.losses.sum().backward()
        found.append(noise.grad)
    assert (cosines(*found) > 0.99).all()


@pytest.mark.parametrize("black_box", [False, True])
def test_a_quadratic_is_climbed_and_the_best_iterate_kept(black_box):
    """Steps are too long at the end, so that the last iterate is not the best one."""
    problem = linear_problem(Bowl(not black_box))
    trace = ran(problem, iterations=40, lr=0.5, clip=1e6, pairs=32)
    seen = torch.stack([point.rewards for point in trace.points])
    torch.testing.assert_close(trace.rewards, seen.max(0).values)
    assert (trace.rewards > seen[0] / 10).all()
    assert (seen[-1] < trace.rewards).any()
    again = problem.objective(problem.generation(trace.noises), problem.texts)
    torch.testing.assert_close(again, trace.rewards, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "lr": 5.0, "clip": 0.1}])
@pytest.mark.parametrize("black_box", [False, True])
def test_prompts_are_independent(options, black_box):
    options = {"iterations": 6, "gamma": 0.1, "permutations": 3, **options}
    both = ran(linear_problem(Bowl(not black_box)), **options)
    for row in (0, 1):
        alone = ran(linear_problem(Bowl(not black_box), PROMPTS[row : row + 1], (row,)), **options)
        torch.testing.assert_close(both.noises[row], alone.noises[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(both.rewards[row], alone.rewards[0], atol=1e-4, rtol=0)


def test_the_cost_of_probes_is_counted_and_kept_within_the_budget():
    """An iteration around noises with 3 pairs takes 1 + 6 generations, the last one 1."""
    problem = linear_problem(Bowl(False))
    ran(problem, iterations=3, pairs=3)
    assert (problem.meter.evaluations, problem.meter.backwards) == (15, 2)
    short = linear_problem(Bowl(False), budget=Budget(evaluations=14))
    trace = ran(short, iterations=50, pairs=3)
    assert (short.meter.evaluations, len(trace.points)) == (8, 2)


def test_all_noises_of_a_sampler_climb_with_the_reward():
    found = dno(iterations=8, lr=0.05, gamma=1e-3, permutations=2)
    assert (found.rewards["after"] > found.rewards["before"]).all()
    assert found.noises.shape == (2, 3, 4, 16, 16)
    assert ((found.noises - found.first).abs().amax((2, 3, 4)) > 0.01).all()
    assert (found.evaluations, found.backwards) == (24, 21)
    assert found.settings["variables"] == "all"
    seen = torch.stack([point.rewards for point in found.trajectory])
    torch.testing.assert_close(found.rewards["after"], seen.max(0).values)


def test_the_initial_noise_alone_if_asked_for():
    options = NOISY.model_copy(update={"variables": "initial"})
    found = dno(iterations=3, generation=options)
    assert torch.equal(found.noises[:, 1:], found.first[:, 1:])
    assert not torch.equal(found.noises[:, 0], found.first[:, 0])


def test_a_black_box_climbs_through_a_real_generator():
    found = dno(RED, iterations=6, lr=0.05, pairs=4)
    assert (found.rewards["after"] > found.rewards["before"]).all()


def test_exact_gradients_of_a_black_box_are_refused():
    with pytest.raises(DiffalignError) as caught:
        dno(RED, gradients="exact")
    text = str(caught.value)
    assert "dno with method.gradients=exact needs gradients, but reward 'red' has none" in text
    assert "Methods for it: dno, best_of_n" in text


def test_a_prompt_whose_reward_is_not_finite_stops_alone():
    found = dno(Redness(nan_for="blue", after=3), iterations=6, lr=0.05)
    assert list(found.failures) == [1]
    assert "the reward is not a finite number at iteration" in found.problem
    torch.testing.assert_close(found.noises[0], dno(iterations=6, lr=0.05).noises[0], atol=1e-5, rtol=0)
