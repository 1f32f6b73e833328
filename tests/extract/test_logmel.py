import subprocess
import sys

import numpy as np
import pytest
import torch
from audio_fixtures import tone, voice

from mer.cache.errors import UnknownNameError, UsageError
from mer.extract.contract import RaggedBatch
from mer.extract.logmel import LogMel, hz_to_mel, mel_filters, mel_to_hz


def loaded(**options: str) -> LogMel:
    extractor = LogMel.from_options("logmel", options)
    extractor.load("cpu")
    return extractor


def run(extractor: LogMel, clips: list[np.ndarray]) -> list[np.ndarray]:
    inputs = [extractor.prepare(clip) for clip in clips]
    data = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
    lengths = torch.tensor([len(x) for x in inputs])
    return [row.numpy() for row in extractor.forward(RaggedBatch(data, lengths))["logmel"].unpad()]


def reference(samples: np.ndarray, hop: int = 160, window: int = 400) -> np.ndarray:
    """The definition, frame by frame, in float64."""
    samples = np.pad(samples.astype(np.float64), (0, max(0, window - len(samples))))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    filters = mel_filters(80, 257, 20, 7600)
    rows = []
    for start in range(0, len(samples) - window + 1, hop):
        spectrum = np.fft.rfft(samples[start : start + window] * hann / hann.sum(), 512)
        rows.append(np.log(np.maximum(filters @ np.abs(spectrum) ** 2, 1e-10)))
    return np.array(rows)


def test_values_equal_the_definition():
    samples = voice(0.7)
    np.testing.assert_allclose(run(loaded(), [samples])[0], reference(samples), atol=2e-4)


def test_a_batch_equals_each_clip_alone():
    extractor = loaded()
    clips = [voice(s, seed=i) for i, s in enumerate((0.5, 1.234, 0.02, 3.0))]
    clips.append(np.zeros(5000, np.float32))
    for clip, batched in zip(clips, run(extractor, clips), strict=True):
        alone = run(extractor, [clip])[0]
        assert batched.shape == alone.shape
        np.testing.assert_allclose(batched, alone, atol=1e-4)


def test_cutting_into_blocks_does_not_change_a_number(monkeypatch):
    whole = run(loaded(), [voice(2.0)])[0]
    monkeypatch.setattr("mer.extract.logmel.FRAMES_AT_ONCE", 7)
    np.testing.assert_allclose(run(loaded(), [voice(2.0)])[0], whole, atol=1e-5)


def test_two_runs_are_bit_equal():
    np.testing.assert_array_equal(*(run(loaded(), [voice(1.0)])[0] for _ in range(2)))


@pytest.mark.parametrize("n", [1, 320, 399, 400, 559, 560, 561, 16_000, 48_123])
def test_frames_are_as_many_as_declared(n):
    extractor = loaded()
    clip = voice(n / 16_000)[:n]
    rows = run(extractor, [clip])[0]
    assert rows.shape == (1 + max(0, n - 400) // 160, 80)
    assert rows.shape[0] == extractor.num_frames(len(extractor.prepare(clip)))["logmel"]
    assert np.isfinite(rows).all()


def test_a_tone_peaks_in_the_band_around_it():
    filters = mel_filters(80, 257, 20, 7600)
    for hz in (300.0, 1000.0, 4000.0):
        rows = run(loaded(), [tone(hz, 0.5, level=1.0)])[0]
        band = int(np.argmax(rows[10]))
        edges = mel_to_hz(np.linspace(hz_to_mel(20), hz_to_mel(7600), 82))
        assert edges[band] <= hz <= edges[band + 2]
        assert filters[band].max() <= 1.0


def test_filters_are_triangles_that_sum_to_one_between_the_outer_centres():
    filters = mel_filters(20, 1025, 100, 7000)
    edges = mel_to_hz(np.linspace(hz_to_mel(100), hz_to_mel(7000), 22))
    bins = np.linspace(0, 8000, 1025)
    inside = (bins >= edges[1]) & (bins <= edges[-2])
    np.testing.assert_allclose(filters[:, inside].sum(axis=0), 1.0, atol=1e-12)
    assert not filters[:, (bins < 100) | (bins > 7000)].any()


def test_mel_scale_is_htk():
    assert hz_to_mel(700.0) == pytest.approx(2595 * np.log10(2))
    assert mel_to_hz(hz_to_mel(1234.5)) == pytest.approx(1234.5)


def test_options_change_identity_and_outputs():
    default, other = loaded(), loaded(n_mels="40", hop_ms="20", dtype="float32")
    assert default.outputs[0].rate_hz == 100
    output = other.outputs[0]
    assert (output.dim, output.rate_hz, output.dtype) == (40, 50, "float32")
    assert default.spec.identity != other.spec.identity
    assert default.spec.identity == LogMel().spec.identity  # typed values, not strings
    assert run(other, [voice(1.0)])[0].shape == (1 + (16_000 - 400) // 320, 40)


def test_many_bands_get_a_finer_spectrum():
    extractor = loaded(n_mels="128")
    assert extractor.n_fft == 1024
    assert run(extractor, [voice(0.5)])[0].shape == (48, 128)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_mel": "80"}, UnknownNameError, "'n_mel'. Did you mean 'n_mels'"),
        ({"n_mels": "many"}, UsageError, "n_mels=many, expected a number from 1 to 512"),
        ({"n_mels": "2.5"}, UsageError, "n_mels=2.5, expected a whole number"),
        ({"hop_ms": "0"}, UsageError, "hop_ms=0, expected a number from 1"),
        ({"fmin": "nan"}, UsageError, "fmin=nan"),
        ({"fmin": "5000", "fmax": "400"}, UsageError, "fmin=5000 must be below fmax=400"),
        ({"n_mels": "512", "fmin": "100", "fmax": "101"}, UsageError, "are too narrow"),
        ({"dtype": "int8"}, UsageError, "dtype=int8"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        LogMel.from_options("logmel", options)


def test_construction_imports_no_torch():
    code = (
        "import sys; from mer.extract.logmel import LogMel; LogMel.from_options('logmel', {});"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
