from pathlib import Path

import pytest
import torch

from diffalign.backbones import open_backbone
from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError
from diffalign.evaluation.monitor import Monitor
from diffalign.evaluation.pictures import Settings
from diffalign.evaluation.prompts import EvalPrompt, with_seeds
from diffalign.rewards import FunctionReward

PROMPTS = with_seeds([EvalPrompt("a cat"), EvalPrompt("a dog"), EvalPrompt("a cow")], seed=3)
SETTINGS = Settings(steps=2, guidance=1.0, batch_size=2)


def red(images, prompts):
    return images[:, 0].mean((1, 2))


def dark(images, prompts):
    return -images.mean((1, 2, 3))


def opened(model: Path):
    config = ModelConfig(path=str(model), lora={"rank": 2}, precision="fp32")
    return open_backbone(config, device="cpu", resolution=64)


def monitor(backbone, **options) -> Monitor:
    return Monitor(backbone, PROMPTS, SETTINGS, [FunctionReward(red), FunctionReward(dark)], **options)


def moved(backbone, amount: float):
    noise = torch.Generator().manual_seed(0)
    backbone.load_trainable_state(
        {k: amount * torch.randn(v.shape, generator=noise) for k, v in backbone.trainable_state().items()}
    )
    return backbone


def test_untrained_weights_have_no_drift_and_win_half(tiny_sdxl, tmp_path):
    watch = monitor(opened(tiny_sdxl))
    watch.prepare(tmp_path, fresh=True)
    look = watch.look()
    assert look.values["monitor/drift"] == 0
    assert look.values["monitor/red/win_rate"] == 0.5
    assert look.values["monitor/dark/win_rate"] == 0.5
    assert look.values["monitor/red"] == pytest.approx(sum(look.gold) / 3)
    assert {"monitor/diversity", "monitor/sharpness", "monitor/saturation"} <= look.values.keys()
    assert "monitor/gap" not in look.values
    assert look.images.shape == (3, 3, 64, 64)


def test_drift_grows_with_the_change_and_a_restart_sees_the_same(tiny_sdxl, tmp_path):
    backbone = opened(tiny_sdxl)
    watch = monitor(backbone)
    watch.prepare(tmp_path, fresh=True)
    drifts = []
    for amount in (0.1, 0.3):
        moved(backbone, amount)
        drifts.append(watch.look().values["monitor/drift"])
    assert 0 < drifts[0] < drifts[1]

    kept = monitor(backbone)
    kept.prepare(tmp_path, fresh=False)
    assert kept.look().values == watch.look().values
    # With other prompts what was kept does not fit: adapters are switched off to measure the base again.
    other = Monitor(backbone, PROMPTS[:2], SETTINGS, [FunctionReward(red)])
    other.prepare(tmp_path, fresh=False)
    moved(backbone, 0.0)
    assert other.look().values["monitor/drift"] == 0


def test_gap_is_the_proxys_gain_minus_the_golds_in_standard_deviations(tiny_sdxl, tmp_path):
    watch = monitor(opened(tiny_sdxl), proxies=["red"])
    assert watch.gold == "dark"
    watch._base = {"score red": torch.tensor([0.0, 2.0, 4.0]), "score dark": torch.tensor([0.0, 1.0, 2.0])}
    # The proxy rises by 2 (its standard deviation), gold falls by half of its own: 1 - (-0.5).
    scores = {"red": torch.tensor([2.0, 4.0, 6.0]), "dark": torch.tensor([-0.5, 0.5, 1.5])}
    assert watch._gap(scores) == pytest.approx(1.5)


def test_full_fine_tuning_cannot_measure_its_base_again(tiny_sdxl, tmp_path):
    config = ModelConfig(path=str(tiny_sdxl), tune="full", precision="fp32")
    watch = monitor(open_backbone(config, device="cpu", resolution=64))
    with pytest.raises(DiffalignError, match="num_prompts=0"):
        watch.prepare(tmp_path, fresh=False)


def test_choices_that_cannot_work_are_refused(tiny_sdxl):
    backbone = opened(tiny_sdxl)
    with pytest.raises(DiffalignError, match=r"gold is 'blue'.*red"):
        monitor(backbone, gold="blue")
    with pytest.raises(DiffalignError, match="one that training optimises"):
        monitor(backbone, proxies=["red", "dark"])
