from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.extract.contract import WindowRule
from mer.extract.windows import cut

FIELD = 5  # samples a frame sees


def frames_of(hop: int):
    return lambda num_steps: (num_steps - FIELD) // hop + 1


@given(
    hop=st.integers(1, 6),
    windows=st.integers(4, 12),
    overlap=st.integers(2, 3),
    extra=st.integers(0, 400),
)
def test_windows_yield_every_frame_once_and_in_order(hop, windows, overlap, extra):
    rule = WindowRule(size=windows * hop + FIELD, overlap=(overlap + FIELD) * hop, hop=hop)
    stride = rule.size - rule.overlap
    rule = WindowRule(size=rule.size, overlap=rule.size - max(hop, stride // hop * hop), hop=hop)
    num_frames = frames_of(hop)
    signal = np.arange(rule.size + extra)
    taken: list[int] = []
    for window in cut(len(signal), rule, num_frames):
        piece = signal[window.start : window.stop]
        assert len(piece) <= rule.size
        starts = [int(piece[i * hop]) for i in range(num_frames(len(piece)))]
        taken += starts[window.keep_from : window.keep_to]
    assert taken == [i * hop for i in range(num_frames(len(signal)))]


def test_an_input_that_fits_runs_whole():
    rule = WindowRule(size=100, overlap=20, hop=2)
    (window,) = cut(100, rule, frames_of(2))
    assert (window.start, window.stop, window.keep_from, window.keep_to) == (0, 100, 0, 48)


def test_a_window_that_cannot_advance_is_refused():
    with pytest.raises(ValueError, match="positive multiple of its hop"):
        cut(101, WindowRule(size=100, overlap=100, hop=2), frames_of(2))
