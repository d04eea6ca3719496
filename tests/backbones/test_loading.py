import json
import shutil

import pytest
import torch

from diffalign.backbones import model_fingerprint, open_backbone, resolve_model
from diffalign.backbones.loading import choose_precision
from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError


def test_a_hub_id_is_left_as_it_is():
    assert (
        resolve_model("stabilityai/stable-diffusion-xl-base-1.0")
        == "stabilityai/stable-diffusion-xl-base-1.0"
    )


def test_embedded_name_is_a_folder_of_the_samples_package(tmp_path, monkeypatch):
    import diffalign.samples

    (tmp_path / "tiny-x").mkdir()
    (tmp_path / "tiny-x" / "model_index.json").write_text("{}")
    monkeypatch.setattr(diffalign.samples, "__file__", str(tmp_path / "__init__.py"))
    assert resolve_model("scenes:tiny-x") == str(tmp_path / "tiny-x")
    with pytest.raises(DiffalignError, match="Did you mean scenes:tiny-x"):
        resolve_model("scenes:tinyx")


@pytest.mark.parametrize("path", ["scenes:", "no-such-folder", "./a/b", "/no/such/folder", "a/b/c"])
def test_a_path_to_nothing_is_one_clear_error(path):
    with pytest.raises(DiffalignError, match=r"no (embedded )?model"):
        resolve_model(path)


def test_a_folder_without_an_index_is_not_a_model(tmp_path):
    with pytest.raises(DiffalignError, match=r"holds no model_index\.json"):
        resolve_model(str(tmp_path))


def test_a_single_file_checkpoint_is_refused_with_the_way_out(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(DiffalignError, match="from_single_file"):
        resolve_model(str(file))


def test_an_unknown_pipeline_lists_the_known_ones(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(DiffalignError, match="KandinskyPipeline; supported are: StableDiffusionPipeline"):
        open_backbone(ModelConfig(path=str(tmp_path)), device="cpu")


def test_pickled_weights_are_never_loaded(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(DiffalignError, match="cannot load the network"):
        open_backbone(ModelConfig(path=str(folder)), device="cpu")


def test_damaged_weights_are_one_clear_error(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(DiffalignError, match="cannot load the network"):
        open_backbone(ModelConfig(path=str(folder)), device="cpu")


def test_an_unknown_scheduler_is_refused(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_schedule": "sigmoid"}))
    with pytest.raises(DiffalignError, match="beta_schedule is 'sigmoid'"):
        open_backbone(ModelConfig(path=str(folder)), device="cpu")


def test_auto_precision_on_a_cpu_is_fp32_and_fp16_is_refused():
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == torch.float32
    assert choose_precision("bf16", cpu) == torch.bfloat16
    with pytest.raises(DiffalignError, match="fp16 needs a GPU"):
        choose_precision("fp16", cpu)


def test_fingerprint_follows_contents_and_not_the_place(tiny_sd, tmp_path):
    copied = shutil.copytree(tiny_sd, tmp_path / "elsewhere")
    first = model_fingerprint(ModelConfig(path=str(tiny_sd)))
    assert model_fingerprint(ModelConfig(path=str(copied))) == first
    weights = copied / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert model_fingerprint(ModelConfig(path=str(copied))) != first


def test_fingerprint_counts_the_network_only_when_asked(tiny_sd, tmp_path):
    copied = shutil.copytree(tiny_sd, tmp_path / "other")
    (copied / "unet" / "config.json").write_text("{}")
    one, other = ModelConfig(path=str(tiny_sd)), ModelConfig(path=str(copied))
    assert model_fingerprint(one) == model_fingerprint(other)
    assert model_fingerprint(one, network=True) != model_fingerprint(other, network=True)


def test_fingerprint_names_revision_and_other_vae():
    prints = {
        model_fingerprint(ModelConfig(path="a/b")),
        model_fingerprint(ModelConfig(path="a/b", revision="c0ffee")),
        model_fingerprint(ModelConfig(path="a/b", variant="fp16")),
        model_fingerprint(ModelConfig(path="a/b", vae="c/d")),
    }
    assert len(prints) == 4
