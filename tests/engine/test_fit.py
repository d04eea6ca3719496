"""Methods, data, options and models that do not go together are refused before anything is loaded."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign import backbones, plan
from diffalign.config import RunConfig
from diffalign.engine.assembly import assemble, open_data
from diffalign.engine.fit import check_fit, fitting_methods, kinds_of
from diffalign.engine.parallel import Parallel
from diffalign.errors import DiffalignError
from diffalign.progress import Reporter
from diffalign.trainers import TRAINERS, trainer_class


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(backbones, "open_backbone", fail)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(folder: Path, *lines: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.png").write_bytes(png())
    text = [json.dumps({"image": "a.png", "prompt": "p"} | line) for line in lines]
    (folder / "pictures.jsonl").write_text("\n".join(text))
    return str(folder)


def recipe(
    method: str, source: str = "scenes:preferences", path: str = "scenes:tiny-sdxl", **values: Any
) -> RunConfig:
    sections: dict[str, Any] = {
        "name": "x",
        "model": {"path": path},
        "data": {"source": source, "resolution": 64, "limit": 4},
        "trainer": {"method": method},
        "optim": {"lr": 1e-4, "steps": 1, "batch_size": 2},
    }
    for key, value in values.items():
        section, name = key.split("__")
        sections.setdefault(section, {})[name] = value
    return RunConfig.model_validate(sections)


def refused(config: RunConfig) -> str:
    with pytest.raises(DiffalignError) as caught:
        assemble(config, Parallel(), Reporter(enabled=False))
    with pytest.raises(DiffalignError):
        open_data(config, Parallel(), Reporter(enabled=False))
    return str(caught.value)


@pytest.mark.parametrize(("method", "tune"), [("dpo", "lora"), ("mapo", "full"), ("reward_model", "head")])
def test_pair_methods_refuse_single_pictures_and_say_what_fits(
    tmp_path: Path, method: str, tune: str
) -> None:
    text = refused(recipe(method, pictures(tmp_path, {"label": 1.0}), model__tune=tune))
    assert "holds single pictures" in text
    assert f"trainer.method {method} learns from" in text
    assert text.endswith("Methods that fit this data: kto, listwise, rwr, sft.")


def test_what_records_lack_is_named_with_the_methods_that_do_without(tmp_path: Path) -> None:
    labels = pictures(tmp_path / "labels", {"label": 1.0}, {"label": 0.0})
    scores = pictures(tmp_path / "scores", {"score": 1.0}, {"score": 2.0})
    text = refused(recipe("rwr", labels))
    assert "its records have no score, which trainer.method rwr learns from; they have: label." in text
    assert "fit this data: kto, listwise, sft." in text
    text = refused(recipe("kto", scores))
    assert "no label, which trainer.method kto learns from; they have: score." in text
    assert "fit this data: listwise, rwr." in text


def test_listwise_needs_groups_that_can_be_ordered(tmp_path: Path) -> None:
    alone = pictures(tmp_path, {"score": 1.0, "group": "a"}, {"score": 2.0, "group": "b"})
    assert "none of 2 groups has at least 2 pictures" in refused(recipe("listwise", alone))
    assert "at least 3 pictures" in refused(recipe("listwise", trainer__group_size=3))


def test_user_models_need_users(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a.png", "rejected": "b.png"}\n')
    text = refused(recipe("pal", str(path), path="clip", model__tune="head"))
    assert "its records have no user, which trainer.method pal learns from" in text
    assert "reward_model" in text
    assert "pal" not in text.rpartition("Methods that fit")[2]


def test_data_kind_is_what_the_recipe_says(tmp_path: Path) -> None:
    assert check_fit(recipe("kto")).kind == "pairs"
    assert check_fit(recipe("kto", data__kind="pictures")).kind == "pictures"
    assert check_fit(recipe("listwise")).kind == "groups"
    assert check_fit(recipe("rwr")).kind == "pictures"
    assert check_fit(recipe("sft", pictures(tmp_path, {"label": 1.0}))).kind == "pictures"
    assert check_fit(recipe("reward_model", path="clip", model__tune="head")).kind == "judgements"
    text = refused(recipe("dpo", data__kind="groups"))
    assert "data.kind is groups" in text
    assert text.endswith("Methods that fit this data: listwise.")


def test_good_pictures_are_needed_for_imitation(tmp_path: Path) -> None:
    fit = check_fit(config := recipe("sft", pictures(tmp_path, {"label": 0.0}, {"label": 0.5})))
    with pytest.raises(DiffalignError, match=r"none of 2 pictures has a label above 0\.5"):
        fit.pictures(config)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"trainer__captions": "dual"}, "trainer.captions is dual, but the run learns from single pictures"),
        ({"data__degraded": 0.2}, "data.degraded is 0.2"),
        ({"data__ties": "half"}, "data.ties is 'half'"),
        ({"data__votes": "share"}, "data.votes is 'share'"),
        ({"curriculum__stages": 2, "curriculum__steps": 1}, "curriculum.stages is 2"),
    ],
)
def test_options_of_pairs_are_refused_for_pictures(tmp_path: Path, values: Any, expected: str) -> None:
    assert expected in refused(recipe("kto", pictures(tmp_path, {"label": 1.0}), **values))


def test_options_of_flow_models_are_refused_on_others(tiny_sd: Path, tiny_sd_v: Path) -> None:
    for method in ("dpo", "kto", "listwise"):
        text = refused(recipe(method, path=str(tiny_sd), trainer__time_weighting="logit_normal"))
        assert "logit_normal, which is for flow models" in text
        assert "1000 discrete timesteps (epsilon)" in text
    noise_space = recipe("dpo", path=str(tiny_sd), trainer__beta_weighting="noise_space")
    assert "it predicts noise" in refused(noise_space)
    velocity_space = recipe("dpo", path=str(tiny_sd_v), trainer__beta_weighting="velocity_space")
    assert "it predicts velocity" in refused(velocity_space)
    assert (
        check_fit(recipe("dpo", path=str(tiny_sd_v), trainer__beta_weighting="noise_space")).kind == "pairs"
    )


@pytest.mark.parametrize(
    ("method", "section"), [("policy_gradient", "sampling"), ("step_preference", "rollouts")]
)
def test_kernels_of_other_processes_are_refused(
    method: str, section: str, tiny_sd: Path, tiny_sd3: Path
) -> None:
    def drawn(path: Path, kernel: str) -> RunConfig:
        options = {f"trainer__{section}": {"kernel": kernel}, "trainer__reward": "brightness"}
        return recipe(method, path=str(path), **options)

    assert "kernel is flow_sde, but the model is not a flow" in refused(drawn(tiny_sd, "flow_sde"))
    assert "kernel is lcm, but the model is a flow" in refused(drawn(tiny_sd3, "lcm"))
    assert check_fit(drawn(tiny_sd3, "flow_sde")).kind == check_fit(drawn(tiny_sd, "ddim")).kind


def test_every_method_takes_something_and_is_found_by_it() -> None:
    for method in TRAINERS:
        kinds = kinds_of(trainer_class(method))
        assert kinds
        assert method in fitting_methods(kinds)
    assert fitting_methods(["groups"]) == ["listwise"]
    assert fitting_methods(["nothing"]) == []


def test_the_plan_counts_in_the_right_unit(tmp_path: Path) -> None:
    ranked = [{"rank": r, "group": g} for g in "ab" for r in (1, 2, 3)]
    groups = recipe("listwise", pictures(tmp_path, *ranked), data__limit=None)
    configs = (recipe("kto"), recipe("kto", data__kind="pictures"), groups)
    found = [plan._amount(config) for config in configs]
    assert found == [plan.Amount(4, "pairs", 2), plan.Amount(8, "pictures", 1), plan.Amount(2, "groups", 3)]
    # 10 bytes per pair in steps of two: 20 for pairs, half for pictures, one and a half for groups of three.
    size = plan.NetworkSize(100, 10, 10, 1000)
    plans = [
        plan.Plan(config, torch.float32, False, size, data)
        for config, data in zip(configs, found, strict=True)
    ]
    assert [one.memory()["activations"] for one in plans] == [20.0, 10.0, 30.0]
    assert [one.epochs for one in plans] == [0.5, 0.25, 1.0]
