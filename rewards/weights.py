"""Reading checkpoints of scorers: safetensors, or `.pt`/`.pth` of tensors only. Nothing else is ever unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError

StateDict = dict[str, Tensor]


def read_state_dict(path: str | Path) -> StateDict:
    """Tensors of a checkpoint file by name, on the CPU.

    A checkpoint that keeps them under the key `state_dict` is unwrapped, and the prefix `module.` of data-parallel
    training is dropped. `.pt`, `.pth` and `.bin` files go through `torch.load(weights_only=True)`, which refuses
    everything but tensors and plain containers.

    Raises:
        DiffalignError: no such file, unreadable, or it holds something other than named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise DiffalignError(f"no file of weights at {str(path)!r}; expected .safetensors, .pt, .pth or .bin")
    state = _read(path)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DiffalignError(f"{str(path)!r} holds a {type(state).__name__}; expected tensors by name")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _read(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise DiffalignError(
            f"cannot read weights from {str(path)!r}: {str(error).splitlines()[0]}. Expected .safetensors, or a "
            ".pt/.pth file of tensors (TorchScript archives and pickled models are refused)"
        ) from error


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], origin: str | Path) -> None:
    """Fill a module with a state dict whose names and shapes must match its own one by one.

    The tensors take the place of the module's parameters, so a module built on the meta device works.

    Raises:
        DiffalignError: names are missing, unknown, or have another shape; the first of each kind is shown.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or unknown or wrong:
        found = [f"{len(missing)} missing (first: {missing[0]})"] if missing else []
        found += [f"{len(unknown)} unknown (first: {unknown[0]})"] if unknown else []
        if wrong:
            have, need = tuple(state[wrong[0]].shape), tuple(own[wrong[0]].shape)
            found.append(f"{len(wrong)} of another shape (first: {wrong[0]} is {have}, expected {need})")
        raise DiffalignError(
            f"the weights of {str(origin)!r} do not fit {type(module).__name__}: " + "; ".join(found)
        )
    module.load_state_dict(dict(state), strict=True, assign=True)


def hub_file(repository: str, filename: str) -> Path:
    """Path of a file of a hub repository, downloaded on first use.

    Raises:
        DiffalignError: not cached and not reachable, or no such repository or file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, filename))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise DiffalignError(
            f"cannot get {filename!r} of {repository!r} from the model hub: {str(error).splitlines()[0]}. Download it "
            "elsewhere and give the file or its folder as `path`"
        ) from error


def resolve_file(path: str | None, repository: str, filename: str) -> Path:
    """The weights file that `path` means: a file, or a folder or hub repository that holds `filename`.

    Args:
        path: None for the official hub repository.

    Raises:
        DiffalignError: it is none of these, or the file cannot be got.
    """
    if path is not None and Path(path).is_file():
        return Path(path)
    if path is not None and Path(path).is_dir():
        inside = Path(path) / filename
        if not inside.is_file():
            raise DiffalignError(f"folder {path!r} has no {filename!r}; give the file itself as `path`")
        return inside
    return hub_file(path or repository, filename)
