"""Every format of an export gives, in a fresh pipeline, the pictures of the live backbone."""

import hashlib
import json
import logging
import re

import pytest
import torch
from diffusers import (
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
)
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.backbones import open_backbone
from diffalign.config import LoRAConfig, ModelConfig, RunConfig, save_config
from diffalign.errors import DiffalignError
from diffalign.export import export_run, save_lora, save_pipeline
from diffalign.export.lora_files import kohya_state, single_file_state
from diffalign.sampling.generate import generate_images

FAMILIES = {
    "sdxl": StableDiffusionXLPipeline,
    "sd": StableDiffusionPipeline,
    "sd3": StableDiffusion3Pipeline,
}
ONE_LEVEL = 1 / 255


def finished_run(folder, model, tune="lora", trainer=None, **lora):
    """A run folder with random trained weights; returns it and the live backbone."""
    config = RunConfig(
        name="my-run",
        model={"path": str(model), "tune": tune, "lora": {"rank": 4, "alpha": 10, **lora}},
        data={"source": "scenes:preferences", "resolution": 64},
        trainer=trainer or {"method": "dpo", "beta": 1234.5, "reduction": "mean"},
        optim={"lr": 1e-4, "steps": 20, "batch_size": 2, "accumulation": 3},
    )
    backbone = open_backbone(config.model, device="cpu", resolution=64)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in backbone.trainable_parameters():
            if tune == "full" or "lora_B" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    (folder / "final").mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    state = {name: value.contiguous() for name, value in backbone.trainable_state().items()}
    save_file(state, folder / "final" / "trainable.safetensors")
    return folder, backbone


def pictures(model):
    prompts = ["a red circle", "two stars", ""]
    return generate_images(model, prompts, [1, 2, 3], steps=3, guidance=4.0, resolution=(64, 64))


def assert_same_pictures(pipeline, backbone):
    expected, found = pictures(backbone), pictures(pipeline)
    with backbone.reference():
        assert (pictures(backbone) - expected).abs().max() > 10 * ONE_LEVEL  # the weights matter
    assert (found - expected).abs().max() <= ONE_LEVEL


def lora_layers(pipeline):
    network = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
    return {n: m for n, m in network.named_modules() if isinstance(m, LoraLayer)}


@pytest.mark.parametrize("targets", ["attention", "attention+conv", "all-linear"])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sdxl", "sd", "sd3"])
def test_lora_files_load_with_every_key_and_their_alpha(request, tmp_path, family, format, targets, caplog):
    model = request.getfixturevalue(f"tiny_{family}")
    run, backbone = finished_run(tmp_path / "run", model, targets=targets)
    file, card = export_run(run, format, tmp_path / "out")
    assert (
        file.name == {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "my-run.safetensors"}[format]
    )
    assert card.name == "README.md"
    pipeline = FAMILIES[family].from_pretrained(model)
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(tmp_path / "out", weight_name=file.name)
    layers = lora_layers(pipeline)
    assert len(layers) == len(backbone._lora_layers)
    # ComfyUI and diffusers read no alpha from a file with names of a transformer: it is in the weights.
    scaling = 1.0 if (family, format) == ("sd3", "kohya") else 10 / 4
    assert {layer.scaling["default_0"] for layer in layers.values()} == {scaling}
    assert "unexpected keys" not in caplog.text
    assert "missing keys" not in caplog.text
    assert_same_pictures(pipeline, backbone)


def test_dora_goes_through_diffusers_and_is_refused_for_kohya(tiny_sdxl, tmp_path):
    run, backbone = finished_run(tmp_path / "run", tiny_sdxl, dora=True)
    export_run(run, "diffusers", tmp_path / "out")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipeline.load_lora_weights(tmp_path / "out")
    assert_same_pictures(pipeline, backbone)
    with pytest.raises(DiffalignError, match="DoRA adapters cannot be exported as kohya"):
        export_run(run, "kohya", tmp_path / "kohya")


def test_peft_folder_loads_into_a_network(tiny_sdxl, tmp_path):
    run, backbone = finished_run(tmp_path / "run", tiny_sdxl, targets="attention+conv")
    weights, config, _ = export_run(run, "peft", tmp_path / "out")
    assert json.loads(config.read_text())["lora_alpha"] == 10
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    wrapped = PeftModel.from_pretrained(pipeline.unet, str(tmp_path / "out"))
    pipeline.unet = wrapped.get_base_model()
    assert len(load_file(weights)) == len(backbone.trainable_state())
    assert_same_pictures(pipeline, backbone)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_pipeline_has_no_adapters_and_the_same_pictures(tiny_sd, tmp_path, dora):
    run, backbone = finished_run(tmp_path / "run", tiny_sd, dora=dora)
    folder, _ = export_run(run, "merged", tmp_path / "out", dtype=torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert not lora_layers(pipeline)
    assert_same_pictures(pipeline, backbone)


@pytest.mark.parametrize("format", ["merged", "diffusers"])
def test_full_fine_tuning_exports_a_pipeline(tiny_sdxl, tmp_path, format):
    run, backbone = finished_run(tmp_path / "run", tiny_sdxl, tune="full")
    folder, card = export_run(run, format, tmp_path / "out", dtype=torch.float32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    assert (pictures(pipeline) - pictures(backbone)).abs().max() <= ONE_LEVEL
    assert 'from_pretrained("FOLDER/pipeline")' in card.read_text()
    for other in ("kohya", "peft"):
        with pytest.raises(DiffalignError, match=f"no {other} format; use merged"):
            export_run(run, other, tmp_path / other)


def test_pipelines_are_half_precision_unless_asked_and_the_backbone_stays(tiny_sd, tmp_path):
    _, backbone = finished_run(tmp_path / "run", tiny_sd, tune="full")
    before = {name: value.clone() for name, value in backbone.trainable_state().items()}
    folder = save_pipeline(backbone, tmp_path / "out")
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert all(torch.equal(value, before[name]) for name, value in backbone.trainable_state().items())
    torch.testing.assert_close(
        stored["conv_in.weight"].float(), before["conv_in.weight"], rtol=1e-3, atol=1e-6
    )


def test_unmerged_adapters_are_no_pipeline(tiny_sd, tmp_path):
    _, backbone = finished_run(tmp_path / "run", tiny_sd)
    with pytest.raises(DiffalignError, match="export the run as merged"):
        save_pipeline(backbone, tmp_path / "out")


def test_save_lora_writes_what_the_export_writes(tiny_sd, tmp_path):
    run, backbone = finished_run(tmp_path / "run", tiny_sd)
    exported, _ = export_run(run, "diffusers", tmp_path / "out")
    saved = save_lora(backbone, tmp_path / "direct")
    assert saved.name == exported.name
    torch.testing.assert_close(load_file(saved), load_file(exported), rtol=0, atol=0)
    with safe_open(saved, "pt") as one, safe_open(exported, "pt") as other:
        assert one.metadata() == other.metadata()


def test_kohya_names_of_full_size_layers_are_understood_by_the_loader():
    """SDXL's own configuration, shapes only: each kohya key maps back to the layer it came from."""
    names = [
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "up_blocks.0.attentions.2.proj_in",
        "up_blocks.1.resnets.2.conv_shortcut",
        "down_blocks.1.resnets.0.time_emb_proj",
        "time_embedding.linear_2",
        "add_embedding.linear_1",
    ]
    state = {f"{n}.lora_{part}.weight": torch.zeros(1, 1) for n in names for part in "AB"}
    kohya = kohya_state(state, LoRAConfig(alpha=8))
    assert len(kohya) == 3 * len(names)
    prefix = "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_out_0"
    assert {f"{prefix}.lora_down.weight", f"{prefix}.lora_up.weight", f"{prefix}.alpha"} < kohya.keys()
    assert kohya[f"{prefix}.alpha"] == 8
    config = type("Config", (), {"layers_per_block": 2})
    mapped, alphas = _convert_non_diffusers_lora_to_diffusers(
        _maybe_map_sgm_blocks_to_diffusers(dict(kohya), config)
    )
    back = convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in mapped.items()})
    assert back.keys() == state.keys()
    assert set(alphas.values()) == {8.0}


def test_kohya_names_exist_in_the_original_sdxl_or_diffusers_naming(tiny_sdxl):
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    known = {name.replace(".", "_") for name, _ in unet.named_modules()} | {"label_emb_0_0", "label_emb_0_2"}
    linear = [n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear)]
    state = {f"{n}.lora_{part}.weight": torch.zeros(1, 1) for n in linear for part in "AB"}
    prefixes = {name.split(".")[0] for name in kohya_state(state, LoRAConfig())}
    assert {prefix.removeprefix("lora_unet_") for prefix in prefixes} <= known


def test_a_weight_without_a_kohya_name_is_not_dropped():
    with pytest.raises(DiffalignError, match="lora_magnitude_vector"):
        kohya_state({"a.to_q.lora_magnitude_vector": torch.zeros(1)}, LoRAConfig())


def test_kohya_header_is_modelspec(tiny_sdxl, tiny_sd_v, tmp_path):
    run, _ = finished_run(tmp_path / "xl", tiny_sdxl)
    file, _ = export_run(run, "kohya", tmp_path / "out")
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.prediction_type"] == "epsilon"
    assert header["modelspec.resolution"] == "64x64"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "10.0")
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    content = file.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert header["modelspec.hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()
    run, _ = finished_run(tmp_path / "v", tiny_sd_v)
    file, _ = export_run(run, "kohya", tmp_path / "v-out")
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == "v"


def test_card_tells_beta_with_its_reduction_and_the_evaluation(tiny_sd, tmp_path):
    run, _ = finished_run(tmp_path / "run", tiny_sd)
    _, card = export_run(run, "diffusers", tmp_path / "without")
    assert "Not evaluated" in card.read_text()
    metric = {"base": 0.5, "tuned": 0.625, "difference": 0.125, "interval": [0.05, 0.2], "n": 200}
    (run / "evaluation.json").write_text(json.dumps({"metrics": {"scenes-judge": metric}}))
    text = export_run(run, "diffusers", tmp_path / "with")[-1].read_text()
    assert "| beta | 1234.5, for squared errors reduced by **mean** over latent elements |" in text
    assert "| scenes-judge | 0.5 | 0.625 | +0.125 | +0.05 to +0.2 | 200 |" in text
    assert "rank 4, alpha 10.0, targets attention" in text
    assert "20 of 6 pairs per process" in text
    assert 'pipeline.load_lora_weights("FOLDER")' in text
    assert "{{" not in text
    assert re.search(r"licence of that model applies", text)


def test_an_unfinished_run_and_an_unknown_format_are_one_clear_error(tiny_sd, tmp_path):
    with pytest.raises(DiffalignError, match="not a run folder"):
        export_run(tmp_path, "kohya", tmp_path / "out")
    run, _ = finished_run(tmp_path / "run", tiny_sd)
    with pytest.raises(DiffalignError, match="format is 'onnx'; expected one of: diffusers, kohya"):
        export_run(run, "onnx", tmp_path / "out")
    (run / "final" / "trainable.safetensors").unlink()
    with pytest.raises(DiffalignError, match="the run is not finished"):
        export_run(run, "kohya", tmp_path / "out")


def comfy_sd3_layers(blocks):
    """Layers that ComfyUI's table of diffusers names knows for an SD3 network (comfy/utils.py, mmdit_to_diffusers)."""
    attention = [f"attn.{n}" for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")]
    attention += ["attn.to_out.0", "attn.to_add_out"]
    attention += [f"attn2.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")]
    others = [f"{n}.net.{end}" for n in ("ff", "ff_context") for end in ("0.proj", "2")]
    others += ["norm1.linear", "norm1_context.linear"]
    outside = [f"time_text_embed.{n}_embedder.linear_{i}" for n in ("timestep", "text") for i in (1, 2)]
    outside += ["context_embedder", "pos_embed.proj", "norm_out.linear", "proj_out"]
    return {f"transformer_blocks.{i}.{n}" for i in range(blocks) for n in attention + others} | {*outside}


def test_comfyui_finds_a_layer_and_the_same_update_for_every_sd3_adapter(tiny_sd3, tmp_path):
    run, backbone = finished_run(tmp_path / "run", tiny_sd3, targets="all-linear")
    tensors = load_file(export_run(run, "kohya", tmp_path / "out")[0])
    state = backbone.trainable_state()
    assert len(tensors) == len(state)
    layers = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in tensors}
    assert layers <= comfy_sd3_layers(2)
    # ComfyUI: lora_B @ lora_A, times alpha / rank only where the file has an entry .alpha.
    layer = "transformer_blocks.0.attn.add_k_proj"
    update = tensors[f"transformer.{layer}.lora_B.weight"] @ tensors[f"transformer.{layer}.lora_A.weight"]
    trained = state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
    assert trained.abs().max() > 0.01
    torch.testing.assert_close(update, trained * 10 / 4)


def test_sd3_header_names_the_architecture_and_no_prediction_type(tiny_sd3, tmp_path):
    run, _ = finished_run(tmp_path / "run", tiny_sd3)
    file, card = export_run(run, "kohya", tmp_path / "out")
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-v3.5-medium/lora"  # has dual attention
    assert "modelspec.prediction_type" not in header
    assert "ss_network_module" not in header  # not kohya's own naming
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4")
    assert "StableDiffusion3Pipeline" in card.read_text()


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_merged_sd3_pipeline_is_the_tuned_model(tiny_sd3, tmp_path, tune):
    run, backbone = finished_run(tmp_path / "run", tiny_sd3, tune=tune)
    expected = pictures(backbone)
    folder = export_run(run, "merged", tmp_path / "out", dtype=torch.float32)[0]
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    assert not lora_layers(pipeline)
    assert (pictures(pipeline) - expected).abs().max() <= ONE_LEVEL
    base = pictures(StableDiffusion3Pipeline.from_pretrained(tiny_sd3))
    assert (base - expected).abs().max() > 10 * ONE_LEVEL


def test_card_and_pipeline_of_a_model_without_t5_load(tiny_sd3_without_t5, tmp_path):
    run, backbone = finished_run(tmp_path / "run", tiny_sd3_without_t5)
    folder, card = export_run(run, "merged", tmp_path / "out", dtype=torch.float32)
    line = next(line for line in card.read_text().splitlines() if "from_pretrained(" in line)
    assert line.endswith('from_pretrained("FOLDER/pipeline", text_encoder_3=None, tokenizer_3=None)')
    StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    again = open_backbone(ModelConfig(path=str(folder), tune="full"), device="cpu", resolution=64)
    assert_same_pictures(again, backbone)


def test_peft_folder_and_card_name_the_transformer(tiny_sd3, tmp_path):
    run, backbone = finished_run(tmp_path / "run", tiny_sd3)
    card = export_run(run, "peft", tmp_path / "out")[-1]
    assert "pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer" in card.read_text()
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    pipeline.transformer = PeftModel.from_pretrained(
        pipeline.transformer, str(tmp_path / "out")
    ).get_base_model()
    assert_same_pictures(pipeline, backbone)


@pytest.mark.parametrize(
    ("model", "pipeline_class", "architecture"),
    [("flux", FluxPipeline, "Flux.1-dev"), ("z_image", ZImagePipeline, "z-image")],
)
def test_single_files_of_other_transformers_load(request, tmp_path, model, pipeline_class, architecture):
    folder = request.getfixturevalue(f"tiny_{model}")
    run, backbone = finished_run(tmp_path / "run", folder, targets="attention+conv")
    file, _ = export_run(run, "kohya", tmp_path / "out")
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.architecture"] == f"{architecture}/lora"
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "out", weight_name=file.name)
    assert len(lora_layers(pipeline)) == len(backbone._lora_layers)
    assert_same_pictures(pipeline, backbone)


def test_a_family_that_no_other_tool_reads_is_refused():
    class Sana:
        network_name = "transformer"
        pipeline_class = type("SanaPipeline", (), {})

    with pytest.raises(
        DiffalignError, match="known for LoRAs of a SanaPipeline; use diffusers, peft or merged"
    ):
        single_file_state(Sana, {}, LoRAConfig())
