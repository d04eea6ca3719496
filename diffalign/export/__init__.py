"""Take a finished run elsewhere: LoRA files for diffusers, ComfyUI and peft; pipelines; model cards."""

from diffalign.export.runs import Format, export_run, save_lora, save_pipeline

__all__ = ["Format", "export_run", "save_lora", "save_pipeline"]
