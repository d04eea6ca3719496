"""Which packages a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("diffalign", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that numbers may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
