"""Sound files for tests: every container and the ways in which they come damaged."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np


def tone(
    hz: float = 220.0, seconds: float = 1.0, rate_hz: int = 16_000, level: float = 0.3
) -> np.ndarray:
    """Return a sine, (N,) float32."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    return (level * np.sin(2 * np.pi * hz * t)).astype(np.float32)


def voice(
    seconds: float = 1.0, rate_hz: int = 16_000, hz: float = 150.0, seed: int = 0
) -> np.ndarray:
    """Return a voice-like buzz with syllables and a little noise, (N,) float32."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    phase = 2 * np.pi * np.cumsum(hz * (1 + 0.1 * np.sin(2 * np.pi * 1.3 * t))) / rate_hz
    buzz = sum(np.cos(k * phase) / k for k in range(1, 12))
    syllables = 0.55 + 0.45 * np.sin(2 * np.pi * 3 * t)
    return (0.1 * buzz * syllables + 0.005 * rng.standard_normal(len(t))).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate_hz: int = 16_000, **options: object) -> Path:
    """Write (N,) or (N, channels) by libsndfile: wav, flac, ogg, mp3 by the suffix."""
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate_hz, **options)
    return path


def write_aac(
    path: Path, samples: np.ndarray, rate_hz: int = 44_100, layout: str | None = None
) -> Path:
    """Write (N,) or (N, channels) as AAC by FFmpeg: m4a, mp4, aac by the suffix."""
    import av

    planes = np.atleast_2d(samples.T).astype(np.float32)
    layout = layout or {1: "mono", 2: "stereo", 6: "5.1"}[len(planes)]
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=rate_hz, layout=layout)
        for start in range(0, planes.shape[1], 1024):
            block = np.ascontiguousarray(planes[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate_hz, start
            frame.time_base = Fraction(1, rate_hz)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def lfs_pointer(path: Path) -> Path:
    """Write what a clone made without Git LFS holds instead of a recording."""
    path.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'5a' * 32}\nsize 85102\n"
    )
    return path


def keep_half(path: Path) -> Path:
    """Cut a file in the middle."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def with_wav_sizes(path: Path, size: int) -> Path:
    """Overwrite both sizes of a plain wav header, as programs that write to a pipe leave them."""
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[4:8] = content[at : at + 4] = size.to_bytes(4, "little")
    path.write_bytes(content)
    return path
