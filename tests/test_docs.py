"""Every example in a docstring says what the code does."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    ".".join(("mer", *path.relative_to(ROOT).with_suffix("").parts))
    for package in ("cache", "extract", "heads", "pipelines")
    for path in (ROOT / package).rglob("*.py")
    if ">>>" in path.read_text()
)


def test_there_are_examples():
    assert "mer.extract.registry" in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_hold(module):
    assert doctest.testmod(import_module(module)).failed == 0
