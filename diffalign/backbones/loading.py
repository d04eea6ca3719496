"""Finding a model (hub id, local folder, embedded world) and loading it: safetensors only, never a pickle."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffalign.config import ModelConfig
from diffalign.errors import DiffalignError, nearest

SCENES = "scenes:"
INDEX = "model_index.json"
ENCODER_PARTS = (
    "vae",
    *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
)
NETWORK_PARTS = ("unet", "transformer", "scheduler")

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Fields:
        path: local folder or hub id. name: what the user wrote.
        revision, variant: of a hub model. index: content of its model_index.json.
    """

    path: str
    name: str
    revision: str | None
    variant: str | None
    index: dict[str, Any]

    @property
    def pipeline_name(self) -> str:
        """Class name of the pipeline the folder was saved from."""
        return str(self.index.get("_class_name", "nothing"))

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        found = {"revision": self.revision, "variant": self.variant}
        return {"use_safetensors": True, **{k: v for k, v in found.items() if v is not None}}


def resolve_model(path: str) -> str:
    """Local folder or hub id of a model path; `scenes:NAME` is a folder of the package `diffalign.samples`.

    Raises:
        DiffalignError: no such folder, a folder that holds no pipeline, or neither a folder nor a hub id.
    """
    if path.startswith(SCENES):
        return str(_embedded(path.removeprefix(SCENES)))
    local = Path(path).expanduser()
    if local.is_dir():
        return str(_pipeline_folder(local))
    if local.is_file():
        raise DiffalignError(
            f"model path {path!r} is a file; expected a folder in diffusers format. Convert a single-file "
            "checkpoint once with Pipeline.from_single_file(FILE).save_pretrained(FOLDER)."
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise DiffalignError(
            f"no model at {path!r}; expected a local folder in diffusers format, a hub id such as "
            "stabilityai/stable-diffusion-xl-base-1.0, or scenes:tiny-sdxl."
        )
    return path


def open_source(config: ModelConfig) -> Source:
    """Find a model and read its index.

    Raises:
        DiffalignError: the model is missing, unreadable or not a pipeline, or the run trained a reward model.
    """
    if config.tune == "head":
        raise DiffalignError(
            f"model.tune is 'head': the run trained a reward on {config.path}, not a generator. Use its folder as a "
            "reward, for example in diffalign score --rewards RUN"
        )
    path = resolve_model(config.path)
    revision = {"revision": config.revision} if config.revision else {}
    index = loading(f"index of {config.path}", lambda: DiffusionPipeline.load_config(path, **revision))
    return Source(path, config.path, config.revision, config.variant, dict(index))


def loading(what: str, load: Callable[[], T]) -> T:
    """Run a loader of diffusers or transformers quietly.

    Raises:
        DiffalignError: with the loader's first line, if it fails on missing or unreadable files.
    """
    try:
        with quiet():
            return load()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DiffalignError(
            f"cannot load the {what}: {reason} Expected diffusers format with safetensors weights (pickled "
            "weights are never loaded); check the path, the network, and `revision` and `variant`."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without loading bars and warnings of diffusers and transformers (such as one per truncated prompt)."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(lib, lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]
    for lib in libraries:
        lib.set_verbosity_error()
        lib.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # `torch_dtype` is on its way to `dtype`; all supported versions know the older name.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for lib, verbosity, bars in before:
            lib.set_verbosity(verbosity)
            if bars:
                lib.enable_progress_bar()


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The number format of the forward pass on a device; `auto` is bf16 on GPUs that have it, else fp32.

    Raises:
        DiffalignError: fp16 without a GPU, or bf16 on a GPU that has none.
    """
    on_gpu = device.type == "cuda"
    if name == "auto":
        return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported(False) else torch.float32
    if name == "fp16" and not on_gpu:
        raise DiffalignError(f"precision fp16 needs a GPU, the device is {device}; use fp32, bf16 or auto.")
    if name == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(False):
        raise DiffalignError("precision is bf16, but this GPU has no bf16; use fp16, fp32 or auto.")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def model_fingerprint(config: ModelConfig, network: bool = False) -> str:
    """Hash of what decides latents and embeddings, for cache keys.

    A local model is hashed by the content of its VAE, text encoder and tokenizer files; a hub model by id,
    revision and variant, so name a commit if it may change. With `network` the denoising network counts too.
    """
    digest = hashlib.blake2b(digest_size=16)
    _hash_model(digest, config, (*ENCODER_PARTS, *NETWORK_PARTS) if network else ENCODER_PARTS)
    if not config.text_encoder_3:
        digest.update(b"without text_encoder_3")
    if config.vae is not None:
        digest.update(b"vae")
        _hash_files(digest, Path(config.vae), [Path(config.vae)], config.vae)
    return digest.hexdigest()


def _hash_model(digest: Any, config: ModelConfig, parts: tuple[str, ...]) -> None:
    path = resolve_model(config.path)
    # FLUX.1 dev and schnell share index and encoders; how many text tokens they take follows from this file.
    facts = [Path(path) / INDEX, Path(path) / "transformer" / "config.json"]
    folders = [Path(path) / part for part in parts]
    _hash_files(digest, Path(path), [*facts, *folders], f"{path}@{config.revision}")
    digest.update(str(config.variant).encode())


def _hash_files(digest: Any, root: Path, places: list[Path], otherwise: str) -> None:
    """Hash relative names, sizes and contents below local places; a hub id instead if `root` is not local."""
    if not root.exists():
        digest.update(otherwise.encode())
        return
    files = [f for place in places for f in ([place] if place.is_file() else sorted(place.rglob("*")))]
    for file in files:
        if file.is_file():
            digest.update(f"{file.relative_to(root)}:{file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)


def _embedded(name: str) -> Path:
    import diffalign.samples

    root = Path(str(diffalign.samples.__file__)).parent
    folder = root / name
    if name and (folder / INDEX).is_file():
        return folder
    names = sorted(index.parent.name for index in root.glob(f"*/{INDEX}"))
    close = nearest(name, names)
    hint = f" Did you mean scenes:{close}?" if close else ""
    raise DiffalignError(f"no embedded model {name!r}; there is: {', '.join(names) or 'none'}.{hint}")


def _pipeline_folder(folder: Path) -> Path:
    if (folder / INDEX).is_file():
        return folder
    raise DiffalignError(
        f"model folder {str(folder)!r} holds no {INDEX}; expected a pipeline saved in diffusers format "
        "(folders unet or transformer, vae, text_encoder, ...)."
    )
