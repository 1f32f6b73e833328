from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mer.pipelines import batching
from mer.pipelines.batching import (
    epoch_batches,
    first_not_finite,
    flatten,
    moments,
    sorted_batches,
)

CPU = torch.device("cpu")
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=40)


def arrays(lengths: list[int], dtype: type = np.float32) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.normal(3, 2, (n, 4)).astype(dtype) for n in lengths]


@given(sizes, st.sampled_from([np.float16, np.float32, np.float64]), st.randoms())
def test_batches_hold_every_utterance_whole(
    lengths: list[int], dtype: type, random: object
) -> None:
    given_arrays = arrays(lengths, dtype)
    stream = flatten(given_arrays, "frames", CPU)
    rows = np.random.default_rng(0).permutation(len(lengths))[:7]
    batch = stream.batch(rows)
    assert batch.data.dtype == torch.float32
    assert batch.data.shape[1] == batch.lengths.max()
    for place, row in enumerate(rows):
        found = batch.data[place, : batch.lengths[place]].numpy()
        np.testing.assert_array_equal(found, given_arrays[row].astype(np.float32))


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_codes_come_as_integers(shape: tuple[int, ...]) -> None:
    codes = [np.array(c, dtype=np.uint8).reshape(shape) for c in ([255, 0, 7], [9])]
    batch = flatten(codes, "codes", CPU).batch(np.array([1, 0]))
    assert batch.data.dtype == torch.int64
    assert batch.data[0, 0] == 9
    assert batch.data[1].tolist() == [255, 0, 7]


def test_moments_standardise_over_all_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "CHUNK_FRAMES", 5)  # several chunks
    given_arrays = arrays([3, 8, 6], np.float16)
    for array in given_arrays:
        array[:, 2] = 1234  # does not vary
    shift, scale = moments(flatten(given_arrays, "frames", CPU))
    frames = (np.concatenate(given_arrays).astype(np.float64) - shift.numpy()) * scale.numpy()
    np.testing.assert_allclose(frames.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(frames.std(0), [1, 1, 0, 1], atol=1e-6)
    assert scale[2] == 1


def test_moments_of_a_far_offset_keep_their_digits() -> None:
    stream = flatten([np.array([[1e4], [1e4 + 1]], dtype=np.float32)], "frames", CPU)
    shift, scale = moments(stream)
    assert shift.item() == 10000.5
    assert scale.item() == pytest.approx(2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_utterance_that_is_not_finite_is_found(bad: float) -> None:
    given_arrays = arrays([3, 8, 6])
    assert first_not_finite(flatten(given_arrays, "frames", CPU)) is None
    given_arrays[1][7, 3] = bad  # its last frame
    assert first_not_finite(flatten(given_arrays, "frames", CPU)) == 1


@given(sizes, st.integers(1, 10), st.booleans())
def test_an_epoch_holds_every_utterance_once(
    lengths: list[int], batch_size: int, bucketing: bool
) -> None:
    draw = np.random.default_rng(0)
    batches = epoch_batches(np.array(lengths), batch_size, draw, bucketing=bucketing)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert all(1 <= len(b) <= batch_size for b in batches)


def test_bucketing_saves_padding_and_still_mixes() -> None:
    lengths = np.random.default_rng(0).integers(10, 400, 512)

    def waste(batches: list[np.ndarray]) -> float:
        return sum(len(b) * lengths[b].max() for b in batches) / lengths.sum() - 1

    draw = np.random.default_rng(1)
    plain = epoch_batches(lengths, 8, draw, bucketing=False)
    first = epoch_batches(lengths, 8, draw)
    second = epoch_batches(lengths, 8, draw)
    assert waste(first) < 0.25 * waste(plain)
    together = {frozenset(b.tolist()) for b in first} & {frozenset(b.tolist()) for b in second}
    assert len(together) <= 2


def test_evaluation_starts_with_the_longest() -> None:
    batches = sorted_batches(np.array([3, 9, 1, 9, 5]), 2)
    assert [b.tolist() for b in batches] == [[1, 3], [4, 0], [2]]
