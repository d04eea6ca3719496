"""Take a finished run elsewhere: LoRA files for diffusers, ComfyUI and peft; pipelines; model cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign.backbones import Backbone, model_family, open_backbone
from diffalign.backbones.loading import INDEX, Source, open_source, quiet
from diffalign.backbones.schedule import scheduler_process
from diffalign.config import RunConfig, load_run_config
from diffalign.errors import DiffalignError
from diffalign.export.lora_files import write_diffusers, write_peft, write_single_file
from diffalign.export.model_card import model_card, single_file_metadata

Format = Literal["diffusers", "kohya", "peft", "merged"]
WEIGHTS = Path("final") / "trainable.safetensors"
PIPELINE = "pipeline"
DIFFUSERS_ENTRIES = ("_class_name", "_diffusers_version", "_name_or_path")


def export_run(
    run_folder: Path, format: Format, output: Path, dtype: torch.dtype = torch.float16
) -> list[Path]:
    """Write a finished run in the format of another tool, with a model card; returns the paths written.

    Args:
        format: diffusers (`load_lora_weights`), kohya (one file for ComfyUI, of UNets also for A1111), peft (adapter
            folder) or merged (a whole pipeline with the trained weights in it). After full fine-tuning the pipeline
            is the only format; diffusers and merged both give it.
        output: folder, created if needed.
        dtype: number format of a pipeline's weights; LoRA files keep the float32 they were trained in.

    Raises:
        DiffalignError: not a finished run, unknown format, or one that these weights have not.
    """
    run_folder, output = Path(run_folder), Path(output)
    if format not in get_args(Format):
        raise DiffalignError(f"export format is {format!r}; expected one of: {', '.join(get_args(Format))}.")
    config = load_run_config(run_folder)
    _check_noise_adapters(config, format)
    state = _trained_weights(run_folder)
    source = open_source(config.model)
    family = model_family(source.pipeline_name, config.model.path)
    output.mkdir(parents=True, exist_ok=True)
    if format == "merged" or config.model.tune == "full":
        paths = [_write_merged(config, state, format, output, dtype)]
        form = "merged"
    else:
        paths = _write_lora(config, state, format, output, source, family)
        form = format
    card = output / "README.md"
    card.write_text(model_card(run_folder, config, form, paths[0].name, source), "utf-8")
    return [*paths, card]


def save_lora(backbone: Backbone, folder: Path) -> Path:
    """Write the backbone's adapters as `pytorch_lora_weights.safetensors` in a folder, alpha included."""
    state = backbone.trainable_state()
    return write_diffusers(type(backbone), state, backbone.config.lora, Path(folder))


def save_pipeline(backbone: Backbone, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the backbone as a whole pipeline, in a folder `pipeline` inside `folder`.

    Raises:
        DiffalignError: the network has adapters that are not merged.
    """
    if any(".lora_" in name for name, _ in backbone.core.named_parameters()):
        raise DiffalignError(
            "the network has adapters; export the run as merged, or save them with save_lora."
        )
    config: Any = backbone.core.config
    with torch.device("meta"):
        network = backbone.network_class.from_config(config)
    weights = {name: value.detach().to("cpu", dtype) for name, value in backbone.core.state_dict().items()}
    network.load_state_dict(weights, assign=True)
    target = Path(folder) / PIPELINE
    pipeline = backbone.load_pipeline(network, dtype)
    with quiet():
        pipeline.save_pretrained(target)
    _keep_own_entries(backbone.source, target / INDEX)
    return target


def _keep_own_entries(source: Source, index: Path) -> None:
    """Add to a pipeline's index what its model says there of itself and diffusers does not know."""
    written = json.loads(index.read_text(encoding="utf-8"))
    own = {k: v for k, v in source.index.items() if k.startswith("_") and k not in DIFFUSERS_ENTRIES}
    index.write_text(json.dumps({**written, **own}, indent=2) + "\n", encoding="utf-8")


def _check_noise_adapters(config: RunConfig, format: Format) -> None:
    changes = config.model.tune == "lora" and config.model.lora.changes
    if changes == "noise" and format in ("kohya", "merged"):
        raise DiffalignError(
            f"the run's adapters change the initial noise (model.lora.changes=noise); as {format} they would become "
            "part of the network and spoil its pictures. Use diffusers or peft; the model card says how to apply them."
        )


def _trained_weights(run_folder: Path) -> dict[str, Tensor]:
    path = run_folder / WEIGHTS
    if not path.is_file():
        raise DiffalignError(
            f"{run_folder} has no {WEIGHTS}: the run is not finished. Continue it with "
            "diffalign train RECIPE --resume, then export."
        )
    return load_file(path)


def _write_lora(
    config: RunConfig,
    state: dict[str, Tensor],
    format: Format,
    output: Path,
    source: Source,
    family: type[Backbone],
) -> list[Path]:
    lora = config.model.lora
    if format == "diffusers":
        return [write_diffusers(family, state, lora, output)]
    if format == "peft":
        return write_peft(state, lora, output, config.model.path)
    metadata = single_file_metadata(config, source, scheduler_process(source).prediction)
    return [write_single_file(family, state, lora, output / f"{config.name}.safetensors", metadata)]


def _write_merged(
    config: RunConfig, state: dict[str, Tensor], format: Format, output: Path, dtype: torch.dtype
) -> Path:
    if config.model.tune == "full" and format not in ("merged", "diffusers"):
        raise DiffalignError(
            f"the run tuned all weights, which have no {format} format; use merged: a whole pipeline."
        )
    # Merged in float32 on the CPU whatever the run used, so that the sum of base and adapters is not rounded.
    plain = {"precision": "fp32", "quantize": "none", "attention": "auto"}
    switched_off = {"compile": False, "gradient_checkpointing": False}
    model = config.model.model_copy(update={**plain, **switched_off})
    backbone = open_backbone(model, device="cpu", resolution=config.data.resolution)
    backbone.load_trainable_state(state)
    if config.model.tune == "lora":
        backbone.core.fuse_lora()  # type: ignore[operator]
        backbone.core.unload_lora()  # type: ignore[operator]
    return save_pipeline(backbone, output, dtype)
