import math

import pytest
import torch
from few_steps import PROMPTS, RED, Redness, consistency, turbo

from diffalign.errors import DiffalignError
from diffalign.inference.ascent import clipped
from diffalign.inference.budget import Budget
from diffalign.inference.config import GenerationConfig
from diffalign.inference.reno import RenoConfig, penalty
from diffalign.inference.run import optimize

ONE = GenerationConfig(steps=1, guidance=0.0)


def reno(backbone=None, reward=None, **options):
    known = {name: options.pop(name) for name in list(options) if name in RenoConfig.model_fields}
    options = {"generation": ONE, "baseline": "none", **options}
    method = {"method": "reno", "iterations": 6, **known}
    return optimize(backbone or turbo(), PROMPTS, reward or Redness(), method=method, **options)


def test_the_norm_penalty_by_hand():
    """d = 4, |eps| = 2: 4 / 2 - 3 ln 2; two noises of a prompt add up."""
    assert float(penalty(torch.ones(1, 1, 2, 2))) == pytest.approx(2 - 3 * math.log(2))
    assert float(penalty(torch.ones(1, 2, 1, 2, 2))) == pytest.approx(4 - 6 * math.log(2))


@pytest.mark.parametrize(
    ("norm", "slope"), [(128.0, 0.01 * (128 - 16383 / 128)), (130.0, 0.0397692), (140.0, 0.2297857)]
)
def test_the_penalty_is_flat_at_the_shell(norm, slope):
    """`0.01 dK/dn = 0.01 (n - (d - 1) / n)` for d = 16384, which is 0 at n^2 = d - 1."""
    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise / noise.norm() * norm).requires_grad_()
    (0.01 * penalty(noise)).sum().backward()
    radial = float((noise.grad * noise.detach()).sum() / norm)
    assert radial == pytest.approx(slope, abs=1e-6)


def test_the_penalty_of_half_precision_is_finite():
    noise = torch.full((1, 16, 64, 64), 2.0, dtype=torch.float16)  # |eps|^2 = 262144 overflows there
    assert float(penalty(noise)) == pytest.approx(131072 - 65535 * math.log(512), rel=1e-6)


def test_rows_are_clipped_by_themselves():
    gradient = torch.tensor([[[3.0, 4.0]], [[0.03, 0.04]]])
    found = clipped(gradient, 0.1)
    torch.testing.assert_close(found[0], torch.tensor([[0.06, 0.08]]), atol=1e-6, rtol=0)
    assert torch.equal(found[1], gradient[1])


def reference(backbone, prompt, seed, iterations):
    """The published loop for one prompt, with torch's own clip and optimiser."""
    from diffalign.inference.generation import Generation, ready

    generation = Generation(backbone, [prompt], steps=1, guidance=0.0)
    latents = generation.start([seed])[:, 0].clone().requires_grad_()
    optimizer = torch.optim.SGD([latents], lr=5.0, momentum=0.9, nesterov=True)
    best, found = -math.inf, latents.detach().clone()
    with ready(backbone):
        for i in range(iterations):
            optimizer.zero_grad()
            reward = Redness().score(generation(latents[:, None]), [prompt]).mean[0]
            if reward.item() > best:
                best, found = reward.item(), latents.detach().clone()
            if i < iterations - 1:
                norm = latents.norm()
                (-reward + 0.01 * (0.5 * norm**2 - (latents.numel() - 1) * norm.log())).backward()
                torch.nn.utils.clip_grad_norm_([latents], 0.1)
                optimizer.step()
    return best, found


def test_a_batch_is_the_published_loop_of_each_prompt_alone():
    backbone = turbo()
    found = reno(backbone)
    for row, prompt in enumerate(found.prompts):
        best, latents = reference(backbone, prompt.text, prompt.seed, 6)
        assert float(found.rewards["after"][row]) == pytest.approx(best, abs=1e-6)
        torch.testing.assert_close(found.noises[row], latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "adam", "lr": 0.05}])
def test_the_reward_rises_and_the_best_is_kept(optimizer):
    found = reno(iterations=12, **optimizer)
    assert (found.rewards["after"] > found.rewards["before"]).all()
    seen = torch.stack([point.rewards for point in found.trajectory])
    torch.testing.assert_close(found.rewards["after"], seen.max(0).values)
    torch.testing.assert_close(seen[0], found.rewards["before"], atol=1e-5, rtol=0)
    assert len(seen) == 12
    assert (found.evaluations, found.backwards) == (12, 11)


def test_first_noises_stay_and_later_ones_are_fixed():
    """Of a sampler with noise at its steps only the initial one moves, unless all are asked for."""
    steps = GenerationConfig(steps=3, guidance=4.0)
    found = reno(consistency(), generation=steps, iterations=3)
    assert found.noises.shape == (2, 3, 4, 16, 16)
    assert torch.equal(found.noises[:, 1:], found.first[:, 1:])
    assert not torch.equal(found.noises[:, 0], found.first[:, 0])
    every = reno(consistency(), generation=steps.model_copy(update={"variables": "all"}), iterations=3)
    assert not torch.equal(every.noises[:, 1:], every.first[:, 1:])
    assert torch.equal(every.first, found.first)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["steps", "blocks"])
def test_recomputing_changes_nothing(checkpointing):
    plain = reno(iterations=3)
    other = reno(iterations=3, generation=ONE.model_copy(update={"checkpointing": checkpointing}))
    torch.testing.assert_close(plain.noises, other.noises, atol=1e-5, rtol=0)
    assert plain.evaluations == other.evaluations


def test_half_precision_climbs_too():
    from few_steps import folder

    from diffalign.backbones import open_backbone
    from diffalign.config import ModelConfig

    path = str(folder("sdxl-turbo"))
    backbone = open_backbone(ModelConfig(path=path, precision="bf16"), device="cpu")
    found = reno(backbone, iterations=8)
    assert found.noises.dtype == torch.float32
    assert (found.rewards["after"] > found.rewards["before"]).all()


def test_a_budget_ends_the_climb():
    found = reno(iterations=50, budget=Budget(evaluations=4))
    assert (found.evaluations, found.backwards, len(found.trajectory)) == (4, 3, 4)


@pytest.mark.parametrize(("gradient_only", "what"), [(False, "reward"), (True, "gradient")])
def test_what_is_not_finite_stops_one_prompt_alone(gradient_only, what):
    """The other prompt goes on as if it were alone; the best so far of the failed one stays."""
    reward = Redness(nan_for="blue", after=3, gradient_only=gradient_only)
    found, well = reno(reward=reward), reno()
    assert list(found.failures) == [1]
    assert f"the {what} is not a finite number at iteration" in found.problem
    assert "two blue squares" in found.problem
    assert found.noises[1].isfinite().all()
    assert float(found.rewards["after"][1]) >= float(found.rewards["before"][1])
    torch.testing.assert_close(found.noises[0], well.noises[0], atol=1e-5, rtol=0)


def test_a_black_box_does_not_fit():
    with pytest.raises(DiffalignError) as caught:
        reno(reward=RED)
    text = str(caught.value)
    assert "method reno needs gradients, but reward 'red' has none" in text
    assert "zero_order" in text
    assert "pickscore" in text
    assert "scenes-judge" not in text
