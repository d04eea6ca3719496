"""The smoothness regulariser in a run: penalties by hand, any split, every method and network, resume, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pair_world
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from diffalign import cli
from diffalign.conditioning import Conditioning
from diffalign.config import ModelConfig, RunConfig, load_recipe
from diffalign.data.batch import GroupBatch, PairBatch, UnpairedBatch
from diffalign.engine.fit import check_fit
from diffalign.engine.smoothing import Smoothing, one_picture, open_smoothing
from diffalign.errors import DiffalignError
from diffalign.process import Process
from diffalign.randomness import Draw
from diffalign.smoothness_config import SmoothnessConfig

ONE = SimpleNamespace(device=torch.device("cpu"), sharded=False, sum=lambda values: values)
NOISING = SimpleNamespace(stratified_times=True, time_weighting="uniform")


class Line:
    """A network that predicts x0 = w x_t of flow-like noising: the Jacobian by the noise is w t."""

    def __init__(self, w: float) -> None:
        self.w = torch.tensor(w, requires_grad=True)
        self.process = Process("sample", torch.tensor([0.64], dtype=torch.float64))

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        return self.w * x_t


def line(w: float = 2.0, seed: int = 0, **options: Any) -> tuple[Smoothing, Line]:
    backbone = Line(w)
    trainer = SimpleNamespace(backbone=backbone, config=NOISING)
    return Smoothing(SmoothnessConfig(**options), trainer, seed, ONE), backbone


def singles(draw: Draw) -> UnpairedBatch:
    count = len(draw)
    told = Conditioning(torch.zeros(count, 1, 1))
    return UnpairedBatch(torch.zeros(count, 1, 2, 2), told, torch.ones(count), torch.ones(count), draw)


def step(smoothing: Smoothing, draw: Draw, parts: int = 1) -> None:
    size = len(draw) // parts
    for start in range(0, len(draw), size):
        smoothing.backward(singles(draw.slice(start, start + size)), draw.step, 1 / len(draw))


def draw_of(count: int, at: int = 0) -> Draw:
    return Draw(0, at, list(range(count)), list(range(count)), count)


def test_penalty_and_its_gradient_by_hand():
    """sigma = 0.6, so J = 0.6 w and v = 0.36 w |d| / sqrt 4; (v - 0.1)^2 has the slope 2 (v - 0.1) v / w."""
    smoothing, backbone = line(2.0, weight=3.0, decay=0.1)
    smoothing.restore({"mean": 0.1, "steps": 1e4})
    draw = draw_of(1)
    step(smoothing, draw)
    v = 0.36 * 2 * draw.normal((1, 2, 2), "smoothness").norm().item() / 2
    assert backbone.w.grad.item() == pytest.approx(3 * 2 * (v - 0.1) * v / 2, rel=1e-5)
    smoothing.commit()
    assert smoothing.state() == {"mean": pytest.approx(0.1 + 0.1 * (v - 0.1)), "steps": 1e4 + 1}
    found = smoothing.metrics()
    assert found["smoothness/variation"] == pytest.approx(v)
    assert found["smoothness/penalty"] == pytest.approx((v - 0.1) ** 2)
    assert found["smoothness/running_mean"] == pytest.approx(0.1 + 0.1 * (v - 0.1))
    assert smoothing.metrics() == {}


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_batch_split_changes_nothing(share):
    gradients, means = [], []
    for parts in (1, 2, 8):
        smoothing, backbone = line(share=share)
        for at in range(3):
            step(smoothing, draw_of(8, at), parts)
            smoothing.commit()
        gradients.append(backbone.w.grad.item())
        means.append(smoothing.state()["mean"])
    assert gradients == pytest.approx([gradients[0]] * 3, rel=1e-5)
    assert means == pytest.approx([means[0]] * 3, rel=1e-5)


def test_a_share_of_the_records_weighs_as_much_as_all_of_them():
    def gradient(share: float) -> tuple[float, int]:
        smoothing, backbone = line(share=share)
        smoothing.restore({"mean": 0.1, "steps": 1})
        step(smoothing, draw_of(2000))
        return backbone.w.grad.item(), int(smoothing._pending[2])

    whole, part = gradient(1.0), gradient(0.3)
    assert whole[1] == 2000
    assert part[1] == pytest.approx(600, abs=80)
    assert part[0] == pytest.approx(whole[0], rel=0.1)


def test_the_first_step_only_measures():
    smoothing, backbone = line()
    step(smoothing, draw_of(4))
    assert backbone.w.grad.item() == 0
    smoothing.commit()
    assert smoothing.state()["mean"] == pytest.approx(smoothing.metrics()["smoothness/variation"])
    step(smoothing, draw_of(4, 1))
    assert backbone.w.grad.item() != 0


def test_a_skipped_step_leaves_no_trace_and_an_empty_one_keeps_the_mean():
    smoothing, _ = line()
    smoothing.restore({"mean": 0.25, "steps": 3})
    step(smoothing, draw_of(4))
    smoothing.discard()
    smoothing.commit()
    assert smoothing.state() == {"mean": 0.25, "steps": 3}
    assert smoothing.metrics() == {}


def test_stored_draws_meet_other_directions_at_every_step():
    """Stored reference errors repeat a draw's noise; the random direction is that of the step all the same."""
    found = []
    for at in (0, 1):
        smoothing, _ = line()
        smoothing.backward(singles(Draw(77, 0, [3], [0], 1)), at, 1.0)
        found.append(smoothing._pending[0].item())
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_which_picture_of_a_record():
    one, two = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    told = [Conditioning(torch.full((2, 1, 1), float(i))) for i in range(2)]
    pair = PairBatch(one, two, *told, torch.ones(2), torch.ones(2), draw_of(2))
    assert one_picture(pair)[0] is one
    assert one_picture(pair)[1] is told[0]
    latents = torch.arange(6.0).view(2, 3, 1, 1, 1)
    rows = Conditioning(torch.arange(6.0).view(6, 1, 1))
    found, cond = one_picture(GroupBatch(latents, rows, torch.zeros(2, 3), torch.ones(2), draw_of(2)))
    assert found.flatten().tolist() == [0, 3]
    assert cond.embeddings.flatten().tolist() == [0, 3]


def penalised(folder: Path, cache: Path, precision: str = "fp32", **opening: Any) -> Any:
    """A function of nothing: the mean penalty of a batch of pairs, with its gradients by name; weights moved."""
    from diffalign.backbones import open_backbone
    from diffalign.trainers.sft import SFTConfig, SFTTrainer

    model = ModelConfig(path=str(folder), precision=precision, **opening)
    backbone = open_backbone(model, device="cpu", resolution=64)
    pair_world.move_weights(backbone)
    trainer = SFTTrainer(SFTConfig(), backbone)
    trainer.prepare(pair_world.open_pairs(backbone, cache))
    batch = trainer.fetch(pair_world.whole_draw(2))

    def measure() -> tuple[float, dict[str, torch.Tensor]]:
        smoothing = Smoothing(SmoothnessConfig(), trainer, 0, ONE)
        smoothing.restore({"mean": 0.1, "steps": 1})
        smoothing.backward(batch, 0, 0.5)
        named = dict(trainer.backbone.trainable_parameters())
        found = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        trainer.backbone.core.zero_grad(set_to_none=True)
        return smoothing._pending[1].item() / 2, found

    return trainer, measure


FAMILIES = ("tiny_sd", "tiny_sd_v", "tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_z_image")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree_with_differences_in_every_network(family, request, tmp_path):
    trainer, measure = penalised(request.getfixturevalue(family), tmp_path)
    _, gradients = measure()
    named = dict(trainer.backbone.trainable_parameters())
    assert gradients.keys() == named.keys()
    norm = sum(g.square().sum() for g in gradients.values()).sqrt()
    assert norm > 0
    values = []
    for side in (1, -1):
        with torch.no_grad():
            for name, parameter in named.items():
                parameter += side * (1 if side > 0 else 2) * 2e-3 * gradients[name] / norm
        values.append(measure()[0])
    assert (values[0] - values[1]) / 4e-3 == pytest.approx(norm.item(), rel=0.05)


@pytest.mark.parametrize("family", ["tiny_sdxl", pytest.param("tiny_sd3", marks=pytest.mark.slow)])
def test_checkpointing_and_bf16_give_the_same_gradients(family, request, tmp_path):
    folder = request.getfixturevalue(family)
    value, expected = penalised(folder, tmp_path)[1]()
    again, found = penalised(folder, tmp_path, gradient_checkpointing=True)[1]()
    assert again == pytest.approx(value, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
    half, rounded = penalised(folder, tmp_path, "bf16")[1]()
    assert half == pytest.approx(value, rel=0.1)
    cosine = torch.nn.functional.cosine_similarity(
        *(torch.cat([g[name].flatten() for name in expected]) for g in (rounded, expected)), dim=0
    )
    assert cosine > 0.95


@pytest.fixture
def recipe(tmp_path: Path, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with the regulariser on five pairs of plain pictures; the working folder is the test's."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for i in range(5):
        for kind, shade in (("good", 200), ("bad", 40)):
            Image.new("RGB", (64, 64), (shade, 20 * i, 90)).save(f"{kind}{i}.png")
        lines.append({"prompt": f"picture {i}", "chosen": f"good{i}.png", "rejected": f"bad{i}.png"})
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""\
name: small
model: {{path: {tiny_sdxl}, precision: fp32, lora: {{rank: 2}}}}
data: {{source: pairs.jsonl, resolution: 64}}
trainer: {{method: dpo, beta: 500}}
smoothness: {{weight: 2.0, decay: 0.5}}
optim: {{lr: 1e-3, steps: 4, batch_size: 2}}
checkpoint: {{every: 2}}
"""
    )
    return path


def trained(name: str) -> dict[str, torch.Tensor]:
    return load_file(Path("runs") / name / "final" / "trainable.safetensors")


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[k] - b[k]).abs().max().item() for k in a)


def test_a_run_logs_it_and_resumes_to_the_bit(recipe):
    assert cli.run(["train", str(recipe), "--name", "whole"]) == 0
    lines = [json.loads(line) for line in Path("runs/whole/metrics.jsonl").read_text().splitlines()]
    variations = [line["smoothness/variation"] for line in lines[:2]]
    assert lines[0]["smoothness/running_mean"] == pytest.approx(variations[0])
    # decay 0.5: of two steps the newer one counts twice as much.
    assert lines[1]["smoothness/running_mean"] == pytest.approx((variations[0] + 2 * variations[1]) / 3)
    assert lines[0]["smoothness/penalty"] == 0
    assert lines[1]["smoothness/penalty"] > 0
    assert cli.run(["train", str(recipe), "optim.steps=2"]) == 0
    state = json.loads(Path("runs/small/checkpoints/step-000002/state.json").read_text())
    assert state["smoothness"]["mean"] == pytest.approx(lines[1]["smoothness/running_mean"])
    assert cli.run(["train", str(recipe), "--resume"]) == 0
    assert furthest(trained("whole"), trained("small")) == 0


def test_the_method_learns_beside_it_and_nothing_changes_without_it(recipe):
    for name, change in (
        ("faint", "smoothness.weight=1e-9"),
        ("without", "smoothness=null"),
        ("beside", "seed=0"),
    ):
        assert cli.run(["train", str(recipe), "--name", name, change, "optim.steps=2"]) == 0
    assert furthest(trained("faint"), trained("without")) < 1e-4
    assert furthest(trained("beside"), trained("without")) > 1e-3
    line = json.loads(Path("runs/without/metrics.jsonl").read_text().splitlines()[0])
    assert not [name for name in line if name.startswith("smoothness")]
    state = json.loads(Path("runs/without/checkpoints/step-000002/state.json").read_text())
    assert "smoothness" not in state


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer={method: kto}", "optim.accumulation=2"],
        ["trainer={method: sft}", "data.kind=pictures", "model.tune=full", "smoothness.share=0.5"],
        ["trainer={method: listwise}", "data.kind=groups", "model.gradient_checkpointing=true"],
        ["trainer.reference=cached", "trainer.reference_draws=2"],
    ],
    ids=["kto", "sft-full", "listwise", "cached"],
)
def test_methods_on_pairs_pictures_and_groups(recipe, overrides):
    assert cli.run(["train", str(recipe), "optim.steps=2", *overrides]) == 0
    assert all(value.isfinite().all() for value in trained("small").values())
    assert '"smoothness/penalty"' in Path("runs/small/metrics.jsonl").read_text()


def scenes(method: str, options: Any = None, **model: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "name": "x",
        "model": {"path": "scenes:tiny-sdxl", **model},
        "data": {"source": "scenes:preferences", "resolution": 64},
        "trainer": {"method": method, **(options or {})},
        "optim": {"lr": 1e-4, "steps": 1, "batch_size": 2},
        "smoothness": {},
    }
    return RunConfig.model_validate(sections)


@pytest.mark.parametrize(
    ("method", "options", "model"),
    [
        ("nft", {}, {}),
        ("step_preference", {"reward": "scenes-judge"}, {}),
        ("reward_model", {}, {"tune": "full"}),
        ("latent_reward", {}, {"tune": "head"}),
        ("hypernoise", {}, {"lora": {"changes": "noise"}}),
    ],
)
def test_methods_without_stored_pictures_are_refused_and_those_that_fit_are_named(method, options, model):
    with pytest.raises(DiffalignError) as caught:
        check_fit(scenes(method, options, **model))
    before, _, fitting = str(caught.value).partition("(")
    assert before.startswith(f"smoothness is on, but trainer.method {method} ")
    assert fitting.startswith("dpo, dspo, inpo, kto, listwise, mapo, rpo, rwr, sft, simpo")


def test_what_cannot_be_differentiated_twice_is_refused():
    with pytest.raises(DiffalignError, match=r"model\.compile=false"):
        check_fit(scenes("dpo", compile=True))
    with pytest.raises(DiffalignError, match=r"attention xformers cannot be differentiated twice"):
        check_fit(scenes("dpo", attention="xformers"))
    trainer = SimpleNamespace(backbone=None, config=None)
    with pytest.raises(DiffalignError, match="sharded"):
        open_smoothing(scenes("dpo"), trainer, SimpleNamespace(sharded=True, device="cpu"))


def test_options():
    assert load_recipe("scenes/sft").smoothness is None
    assert load_recipe("scenes/sft", ["smoothness.weight=2"]).smoothness == SmoothnessConfig(weight=2.0)
    for wrong in ({"weight": 0}, {"decay": 0}, {"decay": 1.5}, {"share": 0}, {"share": 2}, {"sgare": 1}):
        with pytest.raises(ValidationError):
            SmoothnessConfig.model_validate(wrong)


def test_a_plan_says_that_it_leaves_it_out(capsys):
    assert cli.run(["train", "scenes/smooth", "smoothness.share=0.25", "--dry-run"]) == 0
    assert "25% of the records" in capsys.readouterr().out
