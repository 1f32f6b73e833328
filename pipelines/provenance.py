"""What a result was made with, beside its recipe: versions and machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mer

PACKAGES = ("numpy", "torch", "transformers", "scikit-learn", "scipy", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions that a number may depend on, without importing any of the packages."""
    found = {"mer": mer.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return the platform and, where torch is in use, its thread count."""
    import sys

    found: dict[str, Any] = {"platform": platform.platform(), "processor": platform.machine()}
    if "torch" in sys.modules:
        found["torch_threads"] = sys.modules["torch"].get_num_threads()
    return found
