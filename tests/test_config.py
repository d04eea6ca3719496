import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.config import (
    RunConfig,
    load_recipe,
    load_run_config,
    save_config,
    trainer_config,
    with_trainer_defaults,
)
from diffalign.errors import DiffalignError
from diffalign.validation import dotted_fields
from diffalign.yamls import apply_override, parse_yaml

RECIPE = """\
name: small
model: {path: "scenes:tiny-sdxl"}
data: {source: "scenes:preferences", resolution: 64}
trainer: {method: dpo}
optim: {lr: 1e-4, steps: 5, batch_size: 2}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def message(recipe, *overrides):
    with pytest.raises(DiffalignError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


def test_defaults_and_yaml_floats(recipe):
    config = load_recipe(recipe)
    assert config.optim.lr == 1e-4
    assert config.model.lora.rank == 16
    assert config.evaluation.best_metric == "held_out/implicit_accuracy"
    assert str(config.folder) == "runs/small"


def test_overrides_are_yaml_values(recipe):
    overrides = [
        "optim.lr=3e-5", "model.lora.targets=[to_q, to_v]", "data.flip=true", "data.limit=null",
        "trainer.beta=2000", "optim.betas=[0.8, 0.9]", "name=a=b",
    ]  # fmt: skip
    config = load_recipe(recipe, overrides)
    assert config.optim.lr == 3e-5
    assert config.model.lora.targets == ["to_q", "to_v"]
    assert config.data.flip is True
    assert config.data.limit is None
    assert config.trainer["beta"] == 2000
    assert config.optim.betas == (0.8, 0.9)
    assert config.name == "a=b"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.learning=1", "optim.learning: unknown key; allowed here: optimizer, lr"),
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("model.lora.rnak=4", "model.lora.rnak: unknown key; did you mean model.lora.rank?"),
        ("lr=1", "lr: unknown key; did you mean optim.lr?"),
        ("optm.lr=1", "optm: unknown key; did you mean optim?"),
        ("model.tune=ful", "model.tune: is 'ful'; expected 'lora', 'full' or 'head'"),
        ("data.resolution=63", "data.resolution: is 63; expected a multiple of 8"),
        ("optim.lr=fast", "optim.lr: is 'fast'; expected a valid number"),
        ("optim.lr=.nan", "optim.lr: is nan"),
        ("optim.steps=0", "optim.steps: is 0; expected greater than or equal to 1"),
        ("optim.betas=[0.9, 1.5]", "optim.betas: is [0.9, 1.5]; both values"),
        ("name=../other", "name: is '../other'"),
        ("optim.ema=0.99", "optim.ema expected to be null unless model.tune is full"),
    ],
)
def test_bad_values_name_path_value_and_what_is_allowed(recipe, override, expected):
    assert expected in message(recipe, override)


def test_all_problems_are_listed_at_once(recipe):
    text = message(recipe, "optim.lrr=1", "data.resolution=7", "seed=-1")
    assert "3 problems" in text
    assert str(recipe) in text


def test_missing_key_says_what_it_is_for(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("steps: 5, ", ""))
    assert "optim.steps: missing (Optimiser steps of the whole run.)" in message(path)


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim..lr=3", ".lr=1"])
def test_malformed_override(recipe, override):
    assert "key.path=value" in message(recipe, override)


def test_override_through_a_value(recipe):
    assert "name is a value, not a section" in message(recipe, "name.x=1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2", "'a' is given twice"),
        ("- 1", "holds list"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(text, expected):
    with pytest.raises(DiffalignError, match=r".*") as caught:
        parse_yaml(text, "file.yaml")
    assert expected in str(caught.value)
    assert "file.yaml" in str(caught.value)


def test_saved_config_loads_as_the_same(recipe, tmp_path):
    config = load_recipe(recipe, ["model.lora.targets=[to_q]", "optim.betas=[0.5, 0.6]"])
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_run_config(tmp_path / "run") == config


def test_folder_that_is_not_a_run(tmp_path):
    with pytest.raises(DiffalignError, match=r"not a run folder: it has no config\.yaml"):
        load_run_config(tmp_path)


def test_trainer_options_are_checked_by_the_trainer(recipe):
    assert with_trainer_defaults(load_recipe(recipe)).trainer["reduction"] == "mean"
    assert trainer_config(load_recipe(recipe, ["trainer.beta=2000"])).beta == 2000
    with pytest.raises(DiffalignError, match=r"trainer\.bta: unknown key; did you mean trainer\.beta\?"):
        trainer_config(load_recipe(recipe, ["trainer.bta=1"]))
    with pytest.raises(DiffalignError, match=r"trainer\.beta: is -1; expected greater than 0"):
        trainer_config(load_recipe(recipe, ["trainer.beta=-1"]))
    with pytest.raises(DiffalignError, match=r"trainer\.method is 'dppo'; .*dpo"):
        trainer_config(load_recipe(recipe, ["trainer.method=dppo"]))
    with pytest.raises(DiffalignError, match=r"trainer\.method is missing"):
        trainer_config(load_recipe(recipe, ["trainer={}"]))


def test_every_field_says_what_it_does():
    def undocumented(model):
        for name, field in model.model_fields.items():
            if not field.description:
                yield f"{model.__name__}.{name}"
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                yield from undocumented(field.annotation)

    assert list(undocumented(RunConfig)) == []


FROZEN = """
name output_dir seed model model.path model.revision model.variant model.tune model.lora model.lora.rank
model.lora.alpha model.lora.targets model.lora.dropout model.lora.dora model.lora.changes
model.precision model.attention model.gradient_checkpointing model.compile
model.few_steps model.guidance_embedding model.quantize model.text_encoder_3 model.vae model.prompt_prefix
data data.source data.format data.kind data.pairs data.votes data.split data.held_out
data.held_out_split data.resolution data.crop data.flip data.ties data.limit data.cache_dir data.latents
data.shard_size data.max_pixels data.rejected_caption data.degraded data.labels data.flipped
trainer optim optim.optimizer optim.lr optim.weight_decay
optim.betas optim.eps optim.schedule optim.warmup optim.steps optim.batch_size optim.accumulation optim.clip
optim.ema optim.max_nonfinite curriculum curriculum.stages curriculum.steps curriculum.gap curriculum.keep
curriculum.reference smoothness smoothness.weight smoothness.decay smoothness.share
checkpoint checkpoint.every checkpoint.keep_last checkpoint.keep_best
checkpoint.final evaluation evaluation.every evaluation.prompts evaluation.num_prompts evaluation.steps
evaluation.guidance evaluation.batch_size evaluation.rewards evaluation.seed evaluation.best_metric
evaluation.monitor evaluation.monitor.num_prompts evaluation.monitor.gold evaluation.monitor.stop
evaluation.monitor.patience evaluation.monitor.tolerance
"""


def test_the_public_keys_are_frozen():
    """Adding a key is a decision, and a word here; renaming one breaks recipes."""
    assert list(dotted_fields(RunConfig)) == FROZEN.split()


@given(st.floats(min_value=1e-9, max_value=1.0))
def test_any_number_survives_an_override(value):
    values = {}
    apply_override(values, f"optim.lr={value!r}")
    # YAML 1.1 reads 1e-05 (no dot) as text; the model turns it into the number.
    assert float(values["optim"]["lr"]) == value
