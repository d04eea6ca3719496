from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from diffalign.config import load_recipe, with_trainer_defaults
from diffalign.errors import DiffalignError
from diffalign.recipes import (
    copy_recipe,
    launcher_names,
    optimize_names,
    recipe_names,
    recipe_text,
    shipped_text,
    summary,
)
from diffalign.trainers import TRAINERS

CONFIGS = Path(__file__).parent.parent / "configs"


def test_shipped_names():
    assert {"scenes/dpo", "sdxl/dpo_lora", "sdxl/dpo_full", "sd15/dpo_lora"} <= set(recipe_names())
    assert launcher_names() == [f"accelerate/{name}" for name in ("ddp", "fsdp2", "single", "zero2")]


def test_every_method_has_a_recipe_on_the_embedded_world():
    methods = {load_recipe(name).trainer["method"] for name in recipe_names() if name.startswith("scenes/")}
    assert methods >= {name for name, path in TRAINERS.items() if path.startswith("diffalign.")}


def test_every_file_of_the_folder_is_shipped():
    on_disk = {p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.yaml")}
    assert on_disk == {*recipe_names(), *optimize_names(), *launcher_names()}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_says_how_to_run_it(name):
    config = with_trainer_defaults(load_recipe(name))
    assert config.name == name.replace("/", "-").replace("_", "-")
    assert f"diffalign train {name}" in recipe_text(name)[0]
    assert len(summary(name)) > 20


@pytest.mark.parametrize(
    ("name", "kind"), [("single", "NO"), ("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "FSDP")]
)
def test_launcher_files_are_valid_for_accelerate(name, kind):
    config = load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind
    # The recipe decides on the precision; accelerate's would apply autocast a second time.
    assert config.mixed_precision == "no"
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_reshard_after_forward"] is (name == "fsdp2")


def test_copy_keeps_comments_and_never_overwrites(tmp_path):
    target = copy_recipe("scenes/dpo", tmp_path)
    assert target == tmp_path / "dpo.yaml"
    assert target.read_text() == shipped_text("scenes/dpo")
    with pytest.raises(DiffalignError, match="already there"):
        copy_recipe("scenes/dpo", tmp_path)
    assert load_recipe(target, ["optim.steps=3"]).optim.steps == 3


def test_a_file_goes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy_recipe("scenes/dpo", tmp_path / "scenes" / "dpo")
    (tmp_path / "scenes" / "dpo").write_text("name: mine")
    assert recipe_text("scenes/dpo") == ("name: mine", "scenes/dpo")


def test_unknown_names_get_the_nearest():
    with pytest.raises(DiffalignError, match="did you mean scenes/dpo"):
        recipe_text("scenes/dppo")
    with pytest.raises(DiffalignError, match="shipped: "):
        recipe_text("zzz")
    with pytest.raises(DiffalignError, match="neither a file nor a shipped recipe"):
        recipe_text("accelerate/ddp")


def test_binary_file_is_no_recipe(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DiffalignError, match="cannot be read as text"):
        recipe_text(str(path))
