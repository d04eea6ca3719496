import json
import math
from functools import lru_cache

import pytest
import torch
from few_steps import PROMPTS, RED, Redness, turbo
from steered import DEVIATION, MEAN, Pixel, gaussian, noise, problem, ran

from diffalign.backbones import open_backbone
from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError
from diffalign.inference.budget import Budget, Meter
from diffalign.inference.config import GenerationConfig
from diffalign.inference.generation import Generation, ready
from diffalign.inference.methods import METHODS, method_config
from diffalign.inference.record import write_record
from diffalign.inference.run import optimize
from diffalign.inference.steering.fk import FK, FKConfig
from diffalign.inference.steering.walk import Walk, acting, stops
from diffalign.sampling.transition import Kernel

FOUR = GenerationConfig(steps=4, guidance=0.0, batch_size=8)
OFTEN = {"method": "fk", "every": 1, "window": (0.0, 1.0), "strength": 5000.0}


@lru_cache
def model():
    """One for all tests: nothing of it changes."""
    return turbo()


def steered(backbone=None, method=OFTEN, reward=RED, **options):
    options = {"generation": FOUR, "baseline": "none", **options}
    return optimize(backbone or model(), PROMPTS, reward, method=method, **options)


def weighted(path, strength, **options):
    """Mean of the reward under the final weights, and all that is told; 8 prompts, 128 particles."""
    found, trace = problem(gaussian(path), Pixel(), ["x"] * 8, 20, kernel=noise(), batch_size=1024)
    FK(FKConfig(particles=128, strength=strength, every=3, **options)).run(found, trace)
    return (trace.notes["weights"] * trace.notes["rewards"]).sum(1).mean().item(), trace.notes


def test_the_particles_are_a_sample_of_the_tilted_distribution(tiny_sd):
    """Gaussians with a linear reward: strength s raises the mean by s var. In 20 steps the sampler's own variance is
    less than the data's 0.64, so it is taken of the plain samples. Their weights alone would have an effective number
    of exp(-s^2 var) 128, about 18; `max` overshoots on the way and has to be set right at the end."""
    plain, notes = weighted(tiny_sd, 0.0)
    variance = notes["rewards"].var().item()
    assert plain == pytest.approx(MEAN, abs=0.09)
    assert 0.4 < variance < DEVIATION**2
    assert notes["resamplings"].tolist() == [0] * 8
    assert notes["effective_particles"].tolist() == pytest.approx([128] * 8)
    for tempering in ("none", "adaptive"):
        mean, notes = weighted(tiny_sd, 2.0, tempering=tempering)
        assert mean == pytest.approx(plain + 2 * variance, abs=0.18), tempering
        assert notes["effective_particles"].mean() > 50, tempering
        assert torch.equal(notes["roots"] < 128, notes["resamplings"] > 0)
        assert (notes["resamplings"] > 0).sum() > 4
    assert weighted(tiny_sd, 2.0, potential="max")[0] == pytest.approx(plain + 2 * variance, abs=0.35)


def test_one_particle_and_strength_zero_are_plain_sampling():
    one = steered(method={**OFTEN, "particles": 1})
    torch.testing.assert_close(one.trajectory[-1].rewards, one.rewards["before"], atol=1e-5, rtol=0)
    assert one.evaluations == 4
    assert len(one.trajectory) == 4  # steps 0, 1 and 2 and the end

    none = steered(method={**OFTEN, "strength": 0, "particles": 3})
    assert none.notes["resamplings"].tolist() == [0, 0]
    assert none.notes["ancestors"].tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(none.notes["rewards"][:, 0], none.rewards["before"], atol=1e-5, rtol=0)
    torch.testing.assert_close(none.notes["rewards"].max(1).values, none.rewards["after"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("world", ["turbo", "flow"])
def test_the_noises_of_the_best_lineage_give_its_picture_again(world, tiny_sd3):
    """After resampling the path behind a particle is its parent's, the path before it its own."""
    generation = FOUR
    if world == "flow":
        backbone = open_backbone(ModelConfig(path=str(tiny_sd3), precision="fp32"), device="cpu")
        generation = FOUR.model_copy(update={"kernel": "flow_sde", "steps": 5, "guidance": 3.0})
    else:
        backbone = model()
    found = steered(backbone, {**OFTEN, "particles": 6}, generation=generation)
    assert (found.notes["resamplings"] > 0).all()
    assert (found.rewards["after"] > found.rewards["before"]).any()
    assert torch.equal(
        found.notes["rewards"].max(1).values > found.rewards["before"],
        found.rewards["after"] > found.rewards["before"],
    )
    kernel = Kernel("flow_sde") if world == "flow" else None
    again = Generation(backbone, PROMPTS, steps=generation.steps, guidance=generation.guidance, kernel=kernel)
    with ready(backbone):
        media = again.media(found.noises)
    torch.testing.assert_close(media, found.media["after"], atol=1e-4, rtol=0)


def test_seeds_decide_and_neither_batches_nor_neighbours_do():
    whole, again = steered(), steered()
    assert torch.equal(whole.noises, again.noises)
    apart = steered(generation=FOUR.model_copy(update={"batch_size": 1}))
    torch.testing.assert_close(apart.noises, whole.noises)
    torch.testing.assert_close(apart.media["after"], whole.media["after"], atol=1e-5, rtol=0)
    assert (
        [p.evaluations for p in apart.trajectory]
        == [p.evaluations for p in whole.trajectory]
        == [4, 8, 12, 16]
    )
    assert not torch.equal(steered(seed=1).noises, whole.noises)


def test_the_budget_is_kept(tiny_sd):
    """10 evaluations are 2 pictures of 4 steps; 40 are two runs of 4 particles and one of 2."""
    often = FK(FKConfig(every=1, window=(0.0, 1.0), strength=3.0))
    found, trace = ran(tiny_sd, often, evaluations=10)
    assert found.meter.evaluations == 8
    assert trace.notes["ancestors"].shape == (2, 2)
    assert ran(tiny_sd, often, evaluations=3)[1].points == []
    found, more = ran(tiny_sd, often, evaluations=40)
    assert found.meter.evaluations == 40
    assert more.notes["ancestors"].shape == (2, 2)
    # Looks at all four steps, which draw noise, and the end.
    assert len(more.points) == 3 * 5
    assert (more.rewards >= ran(tiny_sd, often, evaluations=16)[1].rewards).all()
    found, none = problem(gaussian(tiny_sd), Pixel(), ["x"], 4, kernel=noise())
    found.meter = Meter(Budget(seconds=1e-9), 1, running=True)
    often.run(found, none)
    assert none.points == []


def test_evaluations_are_counted_with_both_branches_of_guidance(tiny_sd):
    backbone = open_backbone(ModelConfig(path=str(tiny_sd)), device="cpu")
    found, trace = problem(backbone, RED, PROMPTS, 3, kernel=noise())
    guided = Generation(backbone, PROMPTS, steps=3, guidance=2.0, kernel=noise())
    found.generation = guided
    with ready(backbone):
        FK(FKConfig(particles=3)).run(found, trace)
    assert found.meter.evaluations == 3 * 3 * 2
    assert guided.evaluations == 3 * 3 * 2 * len(PROMPTS)


def test_when_time_is_over_the_heaviest_particle_ends_alone(tiny_sd, monkeypatch):
    asked = []
    monkeypatch.setattr(Walk, "late", property(lambda self: asked.append(1) or len(asked) > 2))
    found, trace = ran(tiny_sd, FK(FKConfig()))
    assert trace.notes["rewards"].shape == (2, 1)
    # Two steps of four particles and two of one.
    assert found.meter.evaluations == 2 * 4 + 2
    assert found.generation.evaluations == 2 * found.meter.evaluations


def test_a_reward_that_fails_is_never_the_best():
    found = steered(reward=Redness(nan_for="blue", after=1))
    assert found.notes["rewards"].isnan().all(1).tolist() == [False, True]
    assert found.rewards["after"][1] == found.rewards["before"][1]
    assert found.notes["roots"][1] == 4
    assert all(not math.isnan(value) for value in found.notes["weights"].flatten())


def test_what_is_reported(tmp_path):
    backbone = model()
    found = steered(backbone, generation=FOUR.model_copy(update={"batch_size": 1}))
    write_record(found, backbone, tmp_path)
    prompt = json.loads((tmp_path / "result.json").read_text())["prompts"][1]
    assert len(prompt["notes"]["ancestors"]) == 4
    assert isinstance(prompt["notes"]["roots"], int)
    assert sum(prompt["notes"]["weights"]) == pytest.approx(1, abs=1e-5)
    # All noises of the path are looked at, not the first alone.
    assert prompt["noise"]["after"]["norm"] == pytest.approx(math.sqrt(4 * 1024), rel=0.05)
    assert (tmp_path / "during" / "0000.gif").is_file()


@pytest.mark.parametrize("method", ["fk", "svdd", "demon"])
def test_samplers_without_noise_are_refused(method, tiny_sd3):
    assert METHODS[method].kind == "steering"
    with pytest.raises(DiffalignError, match=rf"method {method} .* in 1 steps.*kernel=ddim .*at least 2"):
        steered(method=method, generation=FOUR.model_copy(update={"steps": 1}))
    flow = open_backbone(ModelConfig(path=str(tiny_sd3)), device="cpu")
    with pytest.raises(DiffalignError, match=r"kernel ddim with noise 0\. Set generation.kernel=flow_sde"):
        steered(flow, method=method, generation=FOUR.model_copy(update={"steps": 5}))


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(DiffalignError, match=r"window is \(0.8, 0.2\); expected two rising shares"):
        method_config({"method": "fk", "window": (0.8, 0.2)})
    with pytest.raises(
        DiffalignError, match=r"tempering is adaptive and potential max; expected potential=diff"
    ):
        method_config({"method": "fk", "tempering": "adaptive", "potential": "max"})
    with pytest.raises(DiffalignError, match=r"did you mean method.particles"):
        method_config({"method": "fk", "particle": 3})


def test_a_strength_that_rises(tiny_sd):
    """With looks at steps 0 to 3 of 4: a fifth of the strength more at each; geometric: 2^(step / 4) - 1."""
    for tempering, shares in (
        ("none", [1.0] * 4),
        ("polynomial", [0.2, 0.4, 0.6, 0.8]),
        ("geometric", [2 ** (step / 4) - 1 for step in range(4)]),
    ):
        method, seen = FK(FKConfig(every=1, window=(0.0, 1.0), strength=3.0, tempering=tempering)), []
        weighed = method._weighed
        method._weighed = lambda *rest, of=weighed, to=seen: to.append(of(*rest)) or to[-1]
        ran(tiny_sd, method)
        assert [float(cloud.strength[0]) for cloud in seen] == pytest.approx([3 * share for share in shares])


def test_options_from_files_are_lists():
    assert method_config({"method": "fk", "window": [0.3, 0.9]}).window == (0.3, 0.9)


def test_steps_by_hand():
    assert acting((0.2, 0.8), 25) == list(range(5, 21))
    assert acting((0.0, 1.0), 3) == [0, 1, 2]
    assert stops(0, 10, 3) == [0, 3, 7, 10]
    assert stops(8, 10, 5) == [8, 9, 10]
    assert stops(10, 10, 5) == [10]
