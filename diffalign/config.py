"""Run configuration: strict pydantic models, filled from a YAML recipe and dotted overrides.

No tensor library is imported here, so that reading and checking a recipe costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from diffalign.smoothness_config import SmoothnessConfig
from diffalign.strict import StrictModel


class LoRAConfig(StrictModel):
    """Low-rank adapters on the network (peft)."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update: more capacity, memory and file size, linearly."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha / rank; with alpha = rank, `lr` means the same for every rank."""
    targets: Literal["attention", "attention+conv", "all-linear"] | list[str] = "attention"
    """Which layers get adapters: a preset, or a list of module-name endings. `attention`: queries, keys, values and
    outputs, of the text too where pictures and text attend together; `attention+conv`: also feed-forward layers and
    convolutions."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input; above 0 the margin at step 0 is no longer exactly 0."""
    dora: bool = False
    """Weight-decomposed adapters (DoRA): often a little better, about a third slower."""
    changes: Literal["network", "noise"] = "network"
    """What adapters do: `network` tunes it; `noise` predicts how the initial noise should change, beside an unchanged
    network (`trainer.method: hypernoise`)."""


class ModelConfig(StrictModel):
    """Which generator is tuned, and how it is run."""

    path: str
    """Hub id, local folder in diffusers format, or `scenes:tiny-sdxl` (shipped with the package)."""
    revision: str | None = None
    """Hub revision (commit, tag or branch); name a commit to be reproducible."""
    variant: str | None = None
    """File variant on the hub such as `fp16`: half the download."""
    tune: Literal["lora", "full", "head"] = "lora"
    """`lora` trains adapters; `full` trains all weights of the network: 16 bytes each, and a frozen copy; `head`, for
    reward models, trains a head on stored embeddings of a frozen CLIP: seconds."""
    lora: LoRAConfig = LoRAConfig()
    """The adapters; ignored when `tune` is `full`."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the forward pass; trained weights and losses stay fp32.

    auto: bf16 on GPUs that support it, else fp32."""
    attention: Literal["auto", "sdpa", "xformers", "flash"] = "auto"
    """Attention kernel; a chosen one is verified to be in use. auto: PyTorch's own (SDPA)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third slower."""
    compile: bool = False
    """Compile the network: a minute or more at the start, then faster steps. Needs a C++ compiler."""
    few_steps: int | None = Field(default=None, ge=1)
    """Few-step models (SDXL-Turbo: 4): train only at the timesteps that the sampler visits with so many steps. null:
    all of them; an LCM always trains at the timesteps it was distilled at."""
    guidance_embedding: float | None = Field(default=None, gt=0)
    """What a guidance-distilled network (LCM, FLUX.1 dev) is told in training; null: the family's usual value."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4 (bitsandbytes, a GPU) holds the frozen base of `lora` in 4 bits: a quarter of its memory."""
    text_encoder_3: bool = True
    """SD3 and SD3.5: false leaves out T5 (9.5 GB in bf16); zeros stand for its states, which costs most in long prompts
    and written text."""
    vae: str | None = None
    """Another VAE (hub id or folder), such as madebyollin/sdxl-vae-fp16-fix."""
    prompt_prefix: str = ""
    """Put before every prompt that pictures of the tuned model are made for, in looks, evaluations and `generate`; the
    base model and rewards see the prompt itself. For Parrot: all its reward tokens."""

    @model_validator(mode="after")
    def _quantized_needs_lora(self) -> ModelConfig:
        if self.quantize != "none" and self.tune != "lora":
            raise ValueError(
                "quantize should be none unless tune is lora: weights in 4 bits cannot be trained"
            )
        return self


class DataConfig(StrictModel):
    """Where the preference pairs come from and how pictures are prepared."""

    source: str
    """File, folder, hub id, or `scenes:preferences` (shipped with the package): see docs/data_formats.md."""
    format: Literal[
        "auto", "pickapic", "chosen_rejected", "jsonl", "hpdv2", "hpdv3", "imagereward_db", "webdataset",
        "twin_folders", "suffixes", "pictures",
    ] = "auto"  # fmt: skip
    """How the source is read; auto looks at files and columns, and asks where several formats fit."""
    kind: Literal["auto", "pairs", "pictures", "groups"] = "auto"
    """What the method learns from. auto: what it takes and the source holds, pairs first. Pairs can be taken apart:
    `pictures` (the chosen one liked, the other not) and `groups` (of two) are made of them, too."""
    pairs: Literal["all", "best_worst", "adjacent"] = "all"
    """Which pairs a ranking of several pictures gives: every two, the best with the worst (fewest, clearest), or each
    with the next best."""
    votes: Literal["winner", "share", "confidence"] = "winner"
    """Several votes on a pair (HPDv3, HPDv2's test): the winner takes all, its share of the votes is a soft label, or
    the data set's confidence weights the pair."""
    split: str = "train"
    """Split of a hub data set, or the prefix of the shards in a folder."""
    held_out: str | None = None
    """Source of pairs that are never trained on, for the implicit accuracy; same rules as `source`."""
    held_out_split: str = "validation"
    """Split of the held-out source."""
    resolution: int = Field(ge=8, multiple_of=8)
    """Training size in pixels; memory and time grow with its square."""
    crop: Literal["center", "random"] = "center"
    """Which square of a non-square picture is used."""
    flip: bool = False
    """Mirror half of the pairs, both pictures alike; wrong for prompts that say left or right."""
    ties: Literal["drop", "half"] = "drop"
    """Undecided pairs are left out, or kept with preference probability one half."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many pairs: for trials."""
    cache_dir: str = ".cache/diffalign"
    """Where encoded pictures and prompts are stored; a pair of 1024 px pictures takes about 0.5 MB."""
    latents: Literal["sample", "mode"] = "sample"
    """Draw latents anew from the VAE's posterior at every step, or always use its mean."""
    shard_size: int = Field(default=256, ge=1)
    """Pairs per cache file; an interrupted caching run loses at most one file."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Pictures with more pixels than this are refused unread (decompression bombs)."""
    rejected_caption: Literal["own", "weak", "medium", "strong"] = "own"
    """Caption of the picture that a pair's label rejects (DCPO). weak, medium, strong: with 40, 60 or 80 % of its
    attribute words exchanged, so that it does not ask for what the picture lacks. Held-out pairs keep theirs."""
    degraded: float = Field(default=0.0, ge=0)
    """Self-supervised pairs to add, as a share of the others: a preferred picture against a degraded copy of itself.
    0.1 to 0.3; more time to encode, and the model learns to avoid blur, noise, compression, tints and bent outlines."""
    labels: Literal["given", "swapped", "random"] = "given"
    """Controls for experiments: `swapped` must make the model worse, `random` must change little."""
    flipped: float = Field(default=0.0, ge=0, le=0.5)
    """Label noise for experiments: this share of the training labels is reversed, chosen by the seed."""


class CurriculumConfig(StrictModel):
    """Training from clear to close pairs, in stages."""

    stages: int = Field(default=1, ge=1)
    """Parts of the pairs, clear ones first; 1 draws all pairs all the time."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of a stage; the last stage goes on until `optim.steps`."""
    gap: str = "label"
    """What makes a pair clear. label: how sure its label is. A name of the data's `labels`: the gap by that aspect."""
    keep: bool = False
    """Later stages also draw the pairs of earlier ones."""
    reference: Literal["base", "stage"] = "base"
    """What the loss compares with. stage: the policy at the beginning of the stage (LoRA only), which lets it move
    further; held-out numbers and drift stay against the base model."""

    @model_validator(mode="after")
    def _stages_need_steps(self) -> CurriculumConfig:
        if self.stages > 1 and self.steps is None:
            raise ValueError(
                "curriculum.steps should be the optimiser steps of a stage when stages is above 1"
            )
        if self.stages == 1 and self.reference == "stage":
            raise ValueError("curriculum.reference should be base when stages is 1: there is no later stage")
        return self


class OptimConfig(StrictModel):
    """The optimiser, its schedule and the size of a step."""

    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """adamw8bit (bitsandbytes, a GPU) quarters the optimiser's memory; adafactor needs almost none."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay: pull of every trained weight towards zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments; adafactor does not use them."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to Adam's denominator; adafactor does not use it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up; linear and cosine end at zero."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear rise to `lr`."""
    steps: int = Field(ge=1)
    """Optimiser steps of the whole run."""
    batch_size: int = Field(ge=1)
    """Pairs per process and micro-step; memory grows with it."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-steps per optimiser step: a larger batch for more time instead of more memory."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm; 0 turns clipping off."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an averaged copy of the weights (full fine-tuning only): 4 more bytes per parameter."""
    max_nonfinite: int = Field(default=10, ge=1)
    """Stop after this many skipped (NaN or infinite) steps in a row."""

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both values should be at least 0 and below 1")
        return value


class CheckpointConfig(StrictModel):
    """When the state is written and what is kept."""

    every: int = Field(default=500, ge=1)
    """Steps between checkpoints: the work a crash can cost."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay on the disk."""
    keep_best: bool = True
    """Also keep the checkpoint with the best `evaluation.best_metric`."""
    final: Literal["last", "best"] = "last"
    """Which weights `final/` holds: those of the last step, or of the best checkpoint."""


class MonitorConfig(StrictModel):
    """Watching for over-optimisation: the same pictures at every look, scored, with drift, diversity, sharpness."""

    num_prompts: int = Field(default=32, ge=0)
    """Pictures made at each look, one per prompt of `evaluation.prompts`; 0 turns the monitor off. A look costs as
    much as making them, and 16 forward passes each. Needs `evaluation.rewards`."""
    gold: str | None = None
    """The reward of `evaluation.rewards` that decides; null: the first that training does not optimise."""
    stop: Literal["off", "when_gold_falls"] = "off"
    """`when_gold_falls` ends the run when the gold score has fallen in `patience` looks in a row; `final/` then
    holds the best weights seen. Needs `evaluation.every`."""
    patience: int = Field(default=2, ge=1)
    """Looks in a row that must show a fall."""
    tolerance: float = Field(default=1.0, ge=0)
    """A fall is one of more than so many standard errors of the paired difference to the best look."""


class EvaluationConfig(StrictModel):
    """What is measured during the run and at its end."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: only at the end."""
    prompts: str | None = None
    """Prompts of the pictures: `scenes:held-out`, a text file (one per line) or JSONL; null: no pictures."""
    num_prompts: int = Field(default=64, ge=1)
    """How many prompts are used; intervals shrink with its square root, time grows with it."""
    steps: int = Field(default=25, ge=1)
    """Denoising steps per picture."""
    guidance: float = Field(default=5.0, ge=0)
    """Classifier-free guidance scale; 1 or less turns it off."""
    batch_size: int = Field(default=8, ge=1)
    """Pictures generated at once."""
    rewards: list[str | dict[str, Any]] = Field(default_factory=list)
    """Scorers applied to the pictures, the first being the main one: names, `name@PATH`, `module:Name`, files, or
    mappings with the key `reward`. Each costs a pass over all pictures. Rewards of whole sets (`vendi`, `frechet`) are
    measured by `diffalign evaluate` on all pictures at once, not while training is watched."""
    seed: int = Field(default=0, ge=0)
    """First seed of the pictures; base and tuned model use the same ones."""
    best_metric: str = "held_out/implicit_accuracy"
    """What `checkpoint.keep_best` compares; higher is better, except for names that end in loss or error."""
    monitor: MonitorConfig = MonitorConfig()
    """What is watched during the run."""


class RunConfig(StrictModel):
    """One training run."""

    name: str = Field(min_length=1, pattern=r"^\w[^/\\]*$")
    """Name of the run's folder."""
    output_dir: str = "runs"
    """Folder that holds the run's folder."""
    seed: int = Field(default=0, ge=0)
    """Seed of initial adapters, batch order, noise, times and dropout."""
    model: ModelConfig
    """The generator."""
    data: DataConfig
    """The preference pairs."""
    trainer: dict[str, Any]
    """The algorithm: `method` and that method's own options."""
    optim: OptimConfig
    """The optimiser."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """The order in which pairs are drawn."""
    smoothness: SmoothnessConfig | None = None
    """Adds the regulariser of Smooth Diffusion to an offline method; null: off, at no cost."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measurements."""

    @model_validator(mode="after")
    def _stop_needs_looks(self) -> RunConfig:
        if self.evaluation.monitor.stop != "off" and not self.evaluation.every:
            raise ValueError(
                "evaluation.monitor.stop needs evaluation.every above 0: the steps between looks"
            )
        if self.checkpoint.final == "best" and not self.checkpoint.keep_best:
            raise ValueError("checkpoint.final=best needs checkpoint.keep_best=true")
        return self

    @model_validator(mode="after")
    def _ema_needs_full(self) -> RunConfig:
        if self.optim.ema is not None and self.model.tune != "full":
            raise ValueError(
                "optim.ema should be null unless model.tune is full: adapters have no averaged copy"
            )
        return self

    @property
    def folder(self) -> Path:
        """Where the run lives: `output_dir/name`."""
        return Path(self.output_dir) / self.name


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a file or a shipped name such as `scenes/dpo`) and apply `key.path=value` overrides.

    Raises:
        DiffalignError: no such recipe, broken YAML, an unknown key (the nearest one is named) or a bad value.
    """
    from diffalign.recipes import recipe_text
    from diffalign.yamls import apply_override, parse_yaml

    text, origin = recipe_text(str(path_or_name))
    values = parse_yaml(text, origin)
    for override in overrides:
        apply_override(values, override)
    return _validated(values, origin)


def load_run_config(run_folder: str | Path) -> RunConfig:
    """The configuration a run was started with (`config.yaml` in its folder).

    Raises:
        DiffalignError: the folder is not a run, or its configuration is not valid.
    """
    from diffalign.errors import DiffalignError
    from diffalign.yamls import parse_yaml

    path = Path(run_folder) / "config.yaml"
    if not path.is_file():
        raise DiffalignError(f"{run_folder} is not a run folder: it has no config.yaml. Expected runs/NAME.")
    return _validated(parse_yaml(path.read_text(encoding="utf-8"), str(path)), str(path))


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML; a file name is replaced only when all is written."""
    from diffalign.yamls import write_yaml

    write_yaml(config.model_dump(mode="json"), Path(path))


def trainer_config(config: RunConfig) -> Any:
    """The validated `Config` object of the trainer that `trainer.method` names.

    Raises:
        DiffalignError: unknown method, unknown option (the nearest one is named), a bad value, or weights tuned in
            a way that the method has not.
    """
    from diffalign.errors import DiffalignError
    from diffalign.validation import validate_section

    kind = trainer_class(config)
    if config.model.tune not in kind.tunes:
        raise DiffalignError(
            f"model.tune is {config.model.tune!r}; trainer.method {config.trainer['method']!r} works with: "
            f"{', '.join(kind.tunes)}"
        )
    return validate_section(kind.Config, config.trainer, "trainer")


def trainer_class(config: RunConfig) -> Any:
    """The trainer class that `trainer.method` names.

    Raises:
        DiffalignError: `trainer.method` is missing or unknown.
    """
    import diffalign.trainers as trainers
    from diffalign.errors import DiffalignError

    if "method" not in config.trainer:
        raise DiffalignError(f"trainer.method is missing; expected one of: {', '.join(trainers.TRAINERS)}")
    return trainers.trainer_class(str(config.trainer["method"]))


def with_trainer_defaults(config: RunConfig) -> RunConfig:
    """The same run with every option of its trainer spelled out."""
    return config.model_copy(update={"trainer": trainer_config(config).model_dump(mode="json")})


def _validated(values: dict[str, Any], origin: str) -> RunConfig:
    from diffalign.validation import validate_section

    config: RunConfig = validate_section(RunConfig, values, "", origin)
    return config
