"""Evaluating a run from its folder, on a tiny random SDXL pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffalign.backbones import open_backbone
from diffalign.config import RunConfig, save_config
from diffalign.errors import DiffalignError
from diffalign.evaluation import pictures
from diffalign.evaluation.evaluate import evaluate_run
from diffalign.evaluation.wording import verdict

REWARD = "import torch\ndef brightness(images, prompts):\n    return images.mean((1, 2, 3))\n"


@pytest.fixture
def run(tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose adapters were moved away from zero; the working folder holds prompts and a reward."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grey_rewards.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cow\n")
    return _make_run(tiny_sdxl, tmp_path / "runs" / "test", "lora", 0.5)


def _make_run(model: Path, folder: Path, tune: str, amount: float) -> Path:
    config = RunConfig.model_validate(
        {
            "name": folder.name,
            "model": {"path": str(model), "tune": tune, "lora": {"rank": 2}, "precision": "fp32"},
            "data": {"source": "unused", "resolution": 64, "cache_dir": "cache"},
            "trainer": {"method": "dpo"},
            "optim": {"lr": 1e-3, "steps": 2, "batch_size": 2},
            "evaluation": {"prompts": "prompts.txt", "num_prompts": 3, "steps": 2, "guidance": 2.0,
                           "batch_size": 3, "rewards": ["grey_rewards:brightness"]},
        }
    )  # fmt: skip
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    backbone = open_backbone(config.model, device="cpu", resolution=64)
    noise = torch.Generator().manual_seed(0)
    state = {
        k: v + amount * torch.randn(v.shape, generator=noise) for k, v in backbone.trainable_state().items()
    }
    (folder / "final").mkdir()
    save_file(state, folder / "final" / "trainable.safetensors")
    return folder


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts that went through the model."""
    seen: list[str] = []
    original = pictures.generate_images

    def spy(model: Any, texts: list[str], *args: Any, **options: Any) -> Any:
        seen.extend(texts)
        return original(model, texts, *args, **options)

    monkeypatch.setattr(pictures, "generate_images", spy)
    return seen


def test_rewards_of_whole_sets_stand_beside_those_of_single_pictures(run: Path) -> None:
    variety = {"reward": "vendi", "encoder": "pixels:4"}
    evaluation = evaluate_run(run, rewards=["grey_rewards:brightness", variety])
    assert list(evaluation.comparison.metrics) == ["brightness"]
    found = json.loads((run / "evaluation.json").read_text())["sets"]["vendi"]
    assert 1 <= found["base"] <= 3
    assert found["difference"] == found["tuned"] - found["base"] != 0
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    assert "Whole sets" in (run / "report.html").read_text()
    with pytest.raises(DiffalignError, match="vendi judges whole sets of pictures only"):
        evaluate_run(run, rewards=[variety])


def test_run_is_compared_with_its_base_and_everything_is_written(run: Path, generated: list[str]) -> None:
    evaluation = evaluate_run(run, seeds_per_prompt=2)
    metric = evaluation.comparison.main
    assert (metric.name, metric.n, metric.prompts) == ("brightness", 6, 3)
    assert metric.difference != 0
    assert len(generated) == 12
    data = json.loads((run / "evaluation.json").read_text())
    assert data["metrics"]["brightness"]["difference"] == metric.difference
    assert data["settings"]["base"].endswith("tiny-sdxl")
    assert data["implicit_accuracy"] is None
    assert {"report.html", "comparison.png"} <= {p.name for p in run.iterdir()}
    assert data["drift"]["kl"] > 0
    assert (data["drift"]["pictures"], data["drift"]["times"]) == (6, 8)
    # Paths cost eleven pictures each and are walked only when they are asked for.
    effects = ["sharpness", "saturation", "diversity over seeds", "diversity over prompts"]
    assert list(data["side_effects"]) == effects


def test_second_evaluation_makes_no_picture_again(run: Path, generated: list[str]) -> None:
    first = evaluate_run(run)
    generated.clear()
    again = evaluate_run(run, against="base")
    assert generated == []
    assert again.comparison.main == first.comparison.main


def test_base_pictures_are_those_of_the_untouched_pipeline(run: Path, tiny_sdxl: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    evaluation = evaluate_run(run, num=2)
    prompt = evaluation.comparison.prompts[1]
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt.text, generator=torch.Generator().manual_seed(prompt.seed), num_inference_steps=2,
        guidance_scale=2.0, height=64, width=64, output_type="np",
    ).images[0]  # fmt: skip
    found = evaluation.base[1:2][0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1.5 / 255


def test_untrained_run_shows_no_difference(tiny_sdxl: Path, run: Path) -> None:
    untrained = _make_run(tiny_sdxl, run.parent / "untrained", "lora", 0.0)
    evaluation = evaluate_run(untrained)
    metric = evaluation.comparison.main
    assert metric.difference == 0.0
    assert metric.change == "no difference"
    assert metric.wins.rate == 0.5
    assert evaluation.drift is not None
    assert evaluation.drift.kl == 0.0
    assert all(effect.change == "no difference" for effect in evaluation.side_effects.values())
    assert verdict(evaluation.comparison).startswith("No difference: brightness is ")
    assert "No difference: brightness is " in (untrained / "report.html").read_text()


def test_scorers_from_mappings_and_warnings(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace("method: dpo", "method: dpo\n  reward: {reward: guarded, of: saturation}")
    )
    rewards = [{"reward": "guarded", "of": "grey_rewards:brightness", "on_error": "skip"}, "saturation"]
    evaluation = evaluate_run(run, rewards=rewards, drift_pictures=0, istd_paths=2)
    assert list(evaluation.comparison.metrics) == ["brightness", "saturation"]
    assert evaluation.drift is None
    assert evaluation.side_effects["ISTD"].n == 2
    assert evaluation.side_effects["ISTD"].difference != 0
    assert "path step" in (run / "report.html").read_text()
    [warning] = evaluation.warnings
    assert warning.startswith("saturation is what this run was trained on")
    assert json.loads((run / "evaluation.json").read_text())["warnings"] == [warning]


def test_full_fine_tuning_uses_the_original_weights_as_base(tiny_sdxl: Path, run: Path) -> None:
    full = _make_run(tiny_sdxl, run.parent / "full", "full", 0.05)
    lora_base = evaluate_run(run).base[0:3]
    evaluation = evaluate_run(full)
    assert torch.allclose(evaluation.base[0:3], lora_base, atol=1.5 / 255)
    assert evaluation.comparison.main.difference != 0
    assert evaluation.drift is not None
    assert evaluation.drift.kl > 0


def test_run_against_another_run_and_against_a_model(run: Path, tiny_sdxl: Path) -> None:
    itself = evaluate_run(run, against=str(run))
    assert itself.comparison.main.difference == 0.0
    assert itself.comparison.main.wins.rate == 0.5
    assert itself.drift is not None
    assert itself.drift.kl == 0.0
    against_base = evaluate_run(run).comparison.main
    against_model = evaluate_run(run, against=str(tiny_sdxl)).comparison.main
    assert against_model.difference == pytest.approx(against_base.difference, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "checkpoints/step-9"}, r"no weights at checkpoints/step-9.*Found: final"),
        ({"prompts": "none.txt"}, "no prompt file 'none.txt'"),
        ({"rewards": ["scenes-judg"]}, "Did you mean 'scenes-judge'"),
        ({"num": 0}, "evaluation.num_prompts"),
        ({"encoder": "pixel:8"}, "pixel:8"),
        ({"num": 50}, "holds 3 different prompts, 50 were asked for"),
    ],
)
def test_bad_requests_fail_before_any_picture(
    run: Path, generated: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DiffalignError, match=message):
        evaluate_run(run, **options)
    assert generated == []


def test_run_without_prompts_or_rewards_says_so(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("prompts: prompts.txt", "prompts: null"))
    with pytest.raises(DiffalignError, match="no prompts to evaluate on"):
        evaluate_run(run)
    with pytest.raises(DiffalignError, match="no reward to evaluate by"):
        evaluate_run(run, prompts="prompts.txt", rewards=[])


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"not a run folder"):
        evaluate_run(tmp_path)
