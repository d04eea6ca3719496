"""What an exported model says about itself: the model card and the header of a LoRA file for other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffalign import __version__
from diffalign.backbones import Backbone, model_family
from diffalign.backbones.loading import Source, loading
from diffalign.config import RunConfig

TEMPLATES = Path(__file__).parent / "templates"

PREDICTIONS = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v", "flow": None}
"""ModelSpec's names; it has none for flows, which their architecture tells."""


def model_card(run_folder: Path, config: RunConfig, form: str, file: str, source: Source) -> str:
    """The README.md of an export, with the evaluation table if the run was evaluated.

    Args:
        form: diffusers, kohya, peft or merged. file: name of the main file or folder of the export.
        source: the base model.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    family = _family(source)
    method = str(config.trainer.get("method", "unknown"))
    return environment.get_template("model_card.md.jinja").render(
        config=config,
        method={"dpo": "Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908)"}.get(method, method),
        options={k: v for k, v in config.trainer.items() if k not in ("method", "beta", "reduction")},
        beta=config.trainer.get("beta"),
        reduction=config.trainer.get("reduction", "mean"),
        form=form,
        file=file,
        pipeline=source.pipeline_name,
        network=family.network_name,
        options_of_loading="".join(f", {name}=None" for name in family.absent_parts(source, config.model)),
        is_lora=config.model.tune == "lora" and form != "merged",
        changes_noise=config.model.tune == "lora" and config.model.lora.changes == "noise",
        batch=config.optim.batch_size * config.optim.accumulation,
        metrics=evaluation_rows(run_folder / "evaluation.json"),
        version=__version__,
    )


def evaluation_rows(path: Path) -> list[dict[str, Any]]:
    """Rows `name, base, tuned, difference, low, high, n` of an `evaluation.json`, none without the file."""
    if not path.is_file():
        return []
    metrics = json.loads(path.read_text(encoding="utf-8")).get("metrics", {})
    return [_row(name, values) for name, values in metrics.items()]


def single_file_metadata(config: RunConfig, source: Source, prediction: str) -> dict[str, str]:
    """Header of a LoRA file for other tools: ModelSpec 1.0.1 and the `ss_` fields that user interfaces show."""
    architecture, version = _architecture(source, prediction)
    kohya_naming = _family(source).network_name == "unet"
    resolution, lora, optim = config.data.resolution, config.model.lora, config.optim
    values = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": config.name,
        "modelspec.description": f"{config.trainer.get('method')} on {config.data.source}",
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": PREDICTIONS[prediction],
        "ss_base_model_version": version,
        "ss_v2": version in ("sd_v2", "sd_v2_v"),
        "ss_sd_model_name": source.name,
        "ss_network_module": "networks.lora" if kohya_naming else None,
        "ss_network_dim": lora.rank,
        # In files with diffusers naming, alpha / rank is multiplied into the weights.
        "ss_network_alpha": lora.alpha if kohya_naming else lora.rank,
        "ss_network_dropout": lora.dropout,
        "ss_output_name": config.name,
        "ss_learning_rate": optim.lr,
        "ss_lr_scheduler": optim.schedule,
        "ss_lr_warmup_steps": optim.warmup,
        "ss_optimizer": optim.optimizer,
        "ss_max_train_steps": optim.steps,
        "ss_batch_size_per_device": optim.batch_size,
        "ss_gradient_accumulation_steps": optim.accumulation,
        "ss_max_grad_norm": optim.clip,
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_seed": config.seed,
        "ss_training_comment": f"diffalign {__version__}: {json.dumps(config.trainer)}",
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _architecture(source: Source, prediction: str) -> tuple[str, str | None]:
    """Names of the base architecture in ModelSpec and, where they have one, in kohya's scripts."""
    name = source.pipeline_name
    if name == "StableDiffusionXLPipeline":
        return "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"
    if name == "ZImagePipeline":
        return "z-image", None
    network = _network_config(source)
    if name == "FluxPipeline":
        return "Flux.1-dev" if network["guidance_embeds"] else "Flux.1-schnell", "flux1"
    if name == "StableDiffusion3Pipeline":
        return _sd3_version(network), "sd3"
    if network["cross_attention_dim"] != 1024:
        return "stable-diffusion-v1", "sd_v1"
    if prediction == "v_prediction":
        return "stable-diffusion-v2-768-v", "sd_v2_v"
    return "stable-diffusion-v2-512", "sd_v2"


def _sd3_version(network: Mapping[str, Any]) -> str:
    """3.5 medium alone has dual attention, 3.5 large alone 38 blocks."""
    if network.get("dual_attention_layers"):
        return "stable-diffusion-v3.5-medium"
    return f"stable-diffusion-v{'3.5-large' if network['num_layers'] == 38 else '3-medium'}"


def _family(source: Source) -> type[Backbone]:
    return model_family(source.pipeline_name, source.name)


def _network_config(source: Source) -> dict[str, Any]:
    revision = {"revision": source.revision} if source.revision else {}
    family = _family(source)
    return loading(
        f"network configuration of {source.name}",
        lambda: dict(
            family.network_class.load_config(source.path, subfolder=family.network_name, **revision)
        ),
    )


def _row(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    low, high = values["interval"]
    return {
        "name": name,
        **{key: values[key] for key in ("base", "tuned", "difference", "n")},
        "low": low,
        "high": high,
    }
