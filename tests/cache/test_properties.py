"""Properties: any store gives back what was put in, whatever its types, lengths and parts."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from mer.cache import layout, staging
from mer.cache.home import Cache


@pytest.fixture(autouse=True)
def _small_chunks_without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(layout, "CHUNK_FRAMES", 16)  # so that short utterances cross chunks
    monkeypatch.setattr(staging, "_sync", lambda path: None)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_round_trip(data):
    spec = data.draw(strategies.feature_specs())
    content = data.draw(
        st.dictionaries(strategies.keys, strategies.utterances(spec), min_size=1, max_size=8)
    )
    part_ends = data.draw(st.sets(st.integers(0, len(content) - 1)))
    with tempfile.TemporaryDirectory() as folder:
        store = Cache(folder).open(spec, create=True)
        assert store is not None
        with store.writer() as writer:
            for number, (key, arrays) in enumerate(content.items()):
                writer.add(key, number, arrays)
                if number in part_ends:
                    writer.commit()
        again = Cache(folder).open(spec)
        assert again is not None
        assert len(again.parts()) == len(part_ends | {len(content) - 1})
        keys = data.draw(st.permutations(list(content)))
        for output in spec.outputs:
            expected = [strategies.as_stored(content[key][output.name], output) for key in keys]
            for key, array in zip(keys, expected, strict=True):
                np.testing.assert_array_equal(again.frames(key, output.name), array, strict=True)
            batch, lengths = again.batch(keys, output.name, "float64")
            assert lengths.tolist() == [len(array) for array in expected]
            for row, array in zip(batch, expected, strict=True):
                np.testing.assert_array_equal(row[: len(array)], array)
                assert not row[len(array) :].any()


class StoreAgainstDict(RuleBasedStateMachine):
    """Two writers and readers that come and go, beside a plain dict."""

    spec = strategies.FeatureSpec(
        slug="model",
        identity={"name": "model"},
        outputs=(strategies.OutputSpec(name="final", dim=2, rate_hz=None, dtype="float32"),),
    )
    pool = st.integers(0, 12).map(lambda number: bytes([number]) * 16)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.cache = Cache(Path(self.folder.name) / "cache")
        self.committed: dict[bytes, np.ndarray] = {}

    def teardown(self) -> None:
        self.folder.cleanup()

    def opened(self):
        store = self.cache.open(self.spec, create=True)
        assert store is not None
        return store

    @initialize()
    def start(self) -> None:
        self.store = self.opened()
        self.writer = self.store.writer()
        self.pending: dict[bytes, np.ndarray] = {}

    @rule(key=pool, length=st.integers(0, 40))
    def add(self, key: bytes, length: int) -> None:
        frames = np.full((length, 2), key[0], np.float32)
        self.writer.add(key, length, {"final": frames})
        if key not in self.committed:
            self.pending.setdefault(key, frames)

    @rule()
    def commit(self) -> None:
        self.writer.commit()
        self.committed |= self.pending
        self.pending = {}

    @precondition(lambda self: self.pending)
    @rule()
    def lose_the_process(self) -> None:
        self.start()

    @rule()
    def reopen(self) -> None:
        self.store = self.opened()

    @rule(keys=st.lists(pool, max_size=6))
    def look_up(self, keys: list[bytes]) -> None:
        assert self.opened().contains(keys).tolist() == [key in self.committed for key in keys]

    @invariant()
    def holds_what_was_committed(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.refresh()
        assert len(self.store) == len(self.committed)
        keys = list(self.committed)
        data, lengths = self.store.batch(keys, "final")
        for row, length, frames in zip(data, lengths, self.committed.values(), strict=True):
            np.testing.assert_array_equal(row[:length], frames)


class TestStoreAgainstDict(StoreAgainstDict.TestCase):
    """The state machine as a test."""

    settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
