"""Where a result comes from: versions, split and stores, so that it can be made again."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import mer
from mer.cache.identity import fingerprint

PACKAGES = ("numpy", "torch", "transformers", "scikit-learn", "scipy", "safetensors")


class Split(Protocol):
    """What a split hash covers: a fold's name and the utterance ids of its three parts."""

    @property
    def name(self) -> str:
        """Name of the fold."""

    @property
    def train(self) -> Sequence[str]:
        """Ids trained on."""

    @property
    def validation(self) -> Sequence[str]:
        """Ids that choose the epoch."""

    @property
    def test(self) -> Sequence[str]:
        """Ids reported on."""


def split_hash(folds: Iterable[Split]) -> str:
    """Return a hash of which utterance stands where, whatever the order within a part.

    Runs of equal hash trained, chose and were tested on the same utterances, fold by fold.
    """
    parts = {
        fold.name: [sorted(fold.train), sorted(fold.validation), sorted(fold.test)]
        for fold in folds
    }
    return fingerprint({"split": parts})


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
