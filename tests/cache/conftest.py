"""Fixtures of the tests of the cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mer.cache import layout


@pytest.fixture(autouse=True, scope="module")
def chunks_of_512_frames() -> Iterator[None]:
    """Write chunks of 512 frames whatever the default: damage is placed in them by hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_FRAMES", 512)
        yield
