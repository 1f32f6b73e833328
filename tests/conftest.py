"""Fixtures that every part of the suite may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real recordings; skips where they are not at hand."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MER_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real recordings are not at hand: {folder} (set MER_SHARED_DATA)")
    return folder
