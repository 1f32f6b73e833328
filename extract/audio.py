"""The audio front end: any recording becomes mono float32 at one rate, by stated rules.

- Channels: the mean of all; of a 5.1 recording the front-centre channel, which carries the speech;
  or the one asked for. Six channels are 5.1 unless the file names other ones.
- Rate: soxr, quality HQ (linear phase), up as well as down. A recording at the target rate is
  passed through unchanged.
- Segments: bounds are rounded to microseconds, as in their key, then to the recording's own
  samples, and cut before resampling, so that a segment depends on its own samples alone. An end up
  to 0.1 s beyond the recording is taken as its end.
- Amplitude: as stored; integers are scaled to [-1, 1). NaN and Inf are refused.

Recordings pass through in blocks: an hour at 48 kHz stereo never exists as a whole at its own rate,
and the size of the blocks does not change a number.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mer.cache.errors import AudioError
from mer.extract.containers import AudioInfo, Recording, open_recording
from mer.extract.contract import SAMPLE_RATE_HZ

__all__ = ["DEFAULT_DOWNMIX", "FRONT_END", "AudioInfo", "decode", "probe"]

DEFAULT_DOWNMIX = "mean; front centre of 5.1"
END_TOLERANCE_S = 0.1
RESAMPLER_QUALITY = "HQ"

FRONT_END: dict[str, Any] = {
    "version": 1,
    "rate_hz": SAMPLE_RATE_HZ,
    "downmix": DEFAULT_DOWNMIX,
    "resampler": f"soxr {RESAMPLER_QUALITY}",
    "segments": "cut at own rate, then resampled",
}
"""The rules above, part of every audio extractor's identity. ``version`` is raised when numbers
change."""


def probe(path: Path) -> AudioInfo:
    """Read a recording's header.

    One that was written to a pipe (a browser's webm) may not say its length: it is decoded.

    Raises
    ------
    AudioError
        Missing, unreadable, empty, truncated wav, a Git LFS pointer, or not audio.
    MissingDependencyError
        The format takes PyAV, which is not installed.
    """
    with open_recording(path) as recording:
        info = recording.info
        if info.frames == 0 and not recording.exact:
            frames = sum(len(block) for block in recording.blocks(0, None))
            info = replace(info, frames=frames, duration_s=frames / info.rate_hz)
        return info


def decode(
    path: Path,
    start_s: float | None = None,
    end_s: float | None = None,
    channel: int | None = None,
    rate_hz: int = SAMPLE_RATE_HZ,
) -> np.ndarray:
    """Read a recording, or a segment of it, as mono samples.

    Parameters
    ----------
    path : Path
        The recording.
    start_s, end_s : float, optional
        Segment in seconds; ``None`` is the recording's own bound.
    channel : int, optional
        Channel to take, from 0; ``None`` applies the downmix rule.
    rate_hz : int, default=16000
        Rate of the result.

    Returns
    -------
    ndarray
        (N,) float32, at least one sample, finite.

    Raises
    ------
    AudioError
        Anything that keeps this utterance from being decoded in full: see `probe`, and bounds that
        are not in the recording, a channel it does not have, no samples, NaN or Inf, damage on the
        way.
    MissingDependencyError
        The format takes PyAV, which is not installed.
    """
    _check_bounds(path, start_s, end_s)
    with open_recording(path) as recording:
        info = recording.info
        column = _column(path, info, channel, recording.front_centre)
        if info.frames == 0 and recording.exact:
            raise AudioError(f"{path}: no samples in it (0 s of audio).")
        start, stop = _native_bounds(path, recording, start_s, end_s)
        known = info.frames if stop is None else min(stop, info.frames)
        samples = _Samples((known - start) * rate_hz // info.rate_hz + 64)
        resampler = None
        if info.rate_hz != rate_hz:
            import soxr

            resampler = soxr.ResampleStream(
                info.rate_hz, rate_hz, 1, dtype="float32", quality=RESAMPLER_QUALITY
            )
        frames = 0
        for block in recording.blocks(start, stop):
            mono = _mono(block, column)
            _check_finite(path, mono, start + frames, info.rate_hz)
            frames += len(mono)
            samples.append(mono if resampler is None else resampler.resample_chunk(mono))
        if resampler is not None:
            samples.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        _check_length(path, recording, start, stop, end_s, frames)
    decoded = samples.take()
    if not len(decoded):
        raise AudioError(f"{path}: too short, {frames} samples at {info.rate_hz} Hz give none.")
    return decoded


def _check_bounds(path: Path, start_s: float | None, end_s: float | None) -> None:
    for name, bound in (("start", start_s), ("end", end_s)):
        if bound is not None and (not math.isfinite(bound) or bound < 0):
            raise AudioError(f"{path}: segment {name} is {bound} s; expected seconds from 0 on.")
    if end_s is not None and end_s <= (start_s or 0):
        raise AudioError(
            f"{path}: segment starts at {start_s or 0} s and ends at {end_s} s; "
            "the end must come later."
        )


def _column(
    path: Path, info: AudioInfo, channel: int | None, front_centre: int | None
) -> int | None:
    """Return the channel to take, or ``None`` for the mean."""
    if channel is None:
        return front_centre if info.channels > 1 else 0
    if not 0 <= channel < info.channels:
        have = (
            "one channel, number 0" if info.channels == 1 else f"channels 0 to {info.channels - 1}"
        )
        raise AudioError(f"{path}: channel {channel} was asked for; the recording has {have}.")
    return channel


def _native_bounds(
    path: Path, recording: Recording, start_s: float | None, end_s: float | None
) -> tuple[int, int | None]:
    """Return the segment in the recording's own samples; ``None`` as stop is its end."""
    info = recording.info
    start = _nearest_sample(start_s or 0.0, info.rate_hz)
    stop = None if end_s is None else _nearest_sample(end_s, info.rate_hz)
    if recording.exact:
        if stop is not None and stop > info.frames:
            if stop - info.frames > END_TOLERANCE_S * info.rate_hz:
                raise _beyond(path, end_s, info.duration_s)
            stop = info.frames
        if start >= info.frames:
            raise _beyond(path, start_s, info.duration_s)
    if stop is not None and stop <= start:
        raise AudioError(
            f"{path}: segment {start_s or 0} to {end_s} s holds no sample at {info.rate_hz} Hz."
        )
    return start, stop


def _nearest_sample(seconds: float, rate_hz: int) -> int:
    microseconds = round(seconds * 1_000_000)  # what is one key is one stretch
    return (microseconds * rate_hz + 500_000) // 1_000_000


def _beyond(path: Path, bound_s: float | None, duration_s: float) -> AudioError:
    return AudioError(
        f"{path}: segment reaches to {bound_s} s, the recording lasts {duration_s:.3f} s. "
        "Check the manifest's bounds."
    )


def _mono(block: np.ndarray, column: int | None) -> np.ndarray:
    """Return one channel of (n, channels), or the mean of all, summed in order."""
    if column is not None:
        return np.ascontiguousarray(block[:, column])
    mono = block[:, 0].copy()
    for other in range(1, block.shape[1]):
        mono += block[:, other]
    mono /= block.shape[1]
    return mono


def _check_finite(path: Path, mono: np.ndarray, start: int, rate_hz: int) -> None:
    finite = np.isfinite(mono)
    if finite.all():
        return
    first = int(np.argmin(finite))
    raise AudioError(
        f"{path}: the sample at {(start + first) / rate_hz:.3f} s is {mono[first]}; "
        "expected finite numbers. Export the recording again."
    )


def _check_length(
    path: Path,
    recording: Recording,
    start: int,
    stop: int | None,
    end_s: float | None,
    frames: int,
) -> None:
    """Refuse a recording that ended before its header or the segment said."""
    info = recording.info
    ended = start + frames
    if frames == 0:
        if start == 0:
            raise AudioError(f"{path}: no samples in it (0 s of audio).")
        raise AudioError(
            f"{path}: ends before {start / info.rate_hz:.3f} s, where the segment starts. "
            "Check the manifest's bounds."
        )
    if stop is not None:
        if stop - ended > (0 if recording.exact else END_TOLERANCE_S * info.rate_hz):
            raise _beyond(path, end_s, ended / info.rate_hz)
        return
    tolerance = recording.tolerance_frames
    if tolerance is not None and ended < info.frames - tolerance:
        raise AudioError(
            f"{path}: truncated. Its header promises {info.duration_s:.2f} s, "
            f"{ended / info.rate_hz:.2f} s are there. Fetch it again."
        )


class _Samples:
    """A float32 array that grows."""

    def __init__(self, expected: int) -> None:
        self.data = np.empty(max(1, expected), np.float32)
        self.length = 0

    def append(self, samples: np.ndarray) -> None:
        end = self.length + len(samples)
        if end > len(self.data):
            self.data.resize(end + end // 2, refcheck=False)
        self.data[self.length : end] = samples
        self.length = end

    def take(self) -> np.ndarray:
        self.data.resize(self.length, refcheck=False)
        return self.data
