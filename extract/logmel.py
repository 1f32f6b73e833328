"""Log-mel spectrogram.

Frames of ``window_ms`` every ``hop_ms``, none of them beyond the recording (no centring, no
reflected edges), Hann window, power spectrum, triangular filters evenly spaced on the HTK mel
scale, natural logarithm above a floor. Nothing depends on other frames: no dither, no pre-emphasis,
no normalisation.

B utterances, T samples, F frames, M mel bands, K bins of the spectrum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mer.cache.errors import UsageError
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.extract.audio import FRONT_END
from mer.extract.contract import SAMPLE_RATE_HZ, BatchPolicy, Extractor, RaggedBatch, take
from mer.extract.options import check_choice, real, whole
from mer.extract.precision import STORED

if TYPE_CHECKING:
    from torch import Tensor

DEFAULTS = {
    "n_mels": "80",
    "window_ms": "25",
    "hop_ms": "10",
    "fmin": "20",
    "fmax": "7600",
    "floor": "1e-10",
    "dtype": "float16",
}
FRAMES_AT_ONCE = 16_384  # of 512 samples: 32 MiB
MAX_FFT = 16_384


def hz_to_mel(hz: Any) -> Any:
    """HTK mel scale: 2595 log10(1 + f/700)."""
    return 2595.0 * np.log10(1.0 + np.asarray(hz) / 700.0)


def mel_to_hz(mel: Any) -> Any:
    """Inverse of `hz_to_mel`."""
    return 700.0 * (10.0 ** (np.asarray(mel) / 2595.0) - 1.0)


def mel_filters(n_mels: int, num_bins: int, fmin: float, fmax: float) -> np.ndarray:
    """Return triangular filters of height 1.

    Parameters
    ----------
    n_mels : int
        Bands M.
    num_bins : int
        Bins K of the one-sided spectrum, 0 Hz to half the sample rate.
    fmin, fmax : float
        Lower edge of the first and upper edge of the last band in Hz.

    Returns
    -------
    ndarray
        (M, K) float64.

    Notes
    -----
    Source: S. Young et al., The HTK Book, sec. 5.6; but the triangles are linear in Hz, as in most
    toolkits since.
    """
    edges = mel_to_hz(np.linspace(hz_to_mel(fmin), hz_to_mel(fmax), n_mels + 2))
    bins = np.linspace(0, SAMPLE_RATE_HZ / 2, num_bins)
    low, centre, high = (edges[i : i + n_mels, None] for i in range(3))
    rising = (bins - low) / (centre - low)
    falling = (high - bins) / (high - centre)
    filters: np.ndarray = np.maximum(0.0, np.minimum(rising, falling))
    return filters


class LogMel(Extractor):
    """Log-mel energies, one vector per hop.

    Parameters
    ----------
    n_mels : int, default=80
        Mel bands M.
    window_ms, hop_ms : float, default=25, 10
        Length of a frame and time from frame to frame; rounded to samples.
    fmin, fmax : float, default=20, 7600
        Range of the filters in Hz. The top 400 Hz are left out: there lies the flank of the
        resampler's filter, which only recordings brought to 16 kHz went through.
    floor : float, default=1e-10
        Least power before the logarithm; a full-scale sine has 0.25.
    dtype : {"float16", "float32"}
        Stored type.

    Notes
    -----
    N samples yield 1 + (max(N, window) - window) // hop frames: shorter input is padded with zeros
    to one window. Frame t covers the samples from t * hop on. The spectrum has the least power of
    two of points that holds a window and gives every band a bin (512 by default).
    """

    policy = BatchPolicy.ANY

    def __init__(
        self,
        n_mels: int = 80,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        fmin: float = 20.0,
        fmax: float = 7600.0,
        floor: float = 1e-10,
        dtype: str = "float16",
    ) -> None:
        self.window_steps = round(window_ms * SAMPLE_RATE_HZ / 1000)
        self.hop_steps = round(hop_ms * SAMPLE_RATE_HZ / 1000)
        self.floor = floor
        if fmin >= fmax:
            raise UsageError(f"Feature 'logmel': fmin={fmin:g} must be below fmax={fmax:g}.")
        self.n_fft = 1 << (self.window_steps - 1).bit_length()
        while True:
            self._filters = mel_filters(n_mels, self.n_fft // 2 + 1, fmin, fmax)
            if self._filters.any(axis=1).all():
                break
            if self.n_fft >= MAX_FFT:
                raise UsageError(
                    f"Feature 'logmel': {n_mels} bands from {fmin:g} to {fmax:g} Hz are too "
                    "narrow. Use fewer bands or a wider range."
                )
            self.n_fft *= 2
        self._device: str | None = None
        self.spec = FeatureSpec(
            slug=f"logmel-{n_mels}",
            identity={
                "extractor": "logmel",
                "version": self.version,
                "options": {
                    "n_mels": n_mels,
                    "window_steps": self.window_steps,
                    "hop_steps": self.hop_steps,
                    "fmin": fmin,
                    "fmax": fmax,
                    "floor": floor,
                    "dtype": dtype,
                },
                "model": None,
                "front_end": FRONT_END,
            },
            outputs=(
                OutputSpec(
                    name="logmel", dim=n_mels, rate_hz=SAMPLE_RATE_HZ / self.hop_steps, dtype=dtype
                ),
            ),
        )

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, str]) -> Self:
        """See `Extractor.from_options`."""
        o = take(options, name, DEFAULTS)
        return cls(
            n_mels=whole(name, "n_mels", o["n_mels"], 1, 512),
            window_ms=real(name, "window_ms", o["window_ms"], 2, 1000),
            hop_ms=real(name, "hop_ms", o["hop_ms"], 1, 1000),
            fmin=real(name, "fmin", o["fmin"], 0, SAMPLE_RATE_HZ / 2),
            fmax=real(name, "fmax", o["fmax"], 0, SAMPLE_RATE_HZ / 2),
            floor=real(name, "floor", o["floor"], 1e-30, 1),
            dtype=check_choice(name, "dtype", o["dtype"], STORED),
        )

    def load(self, device: str) -> None:
        """See `Extractor.load`."""
        import torch

        if self._device == device:
            return
        hann = torch.hann_window(self.window_steps, dtype=torch.float64)
        # Scaled so that a sine of amplitude a peaks at a²/4, whatever the window.
        self._window = (hann / hann.sum()).float().to(device)
        self._bank = torch.from_numpy(self._filters.T.copy()).float().to(device)  # (K, M)
        self._device = device

    def prepare(self, source: np.ndarray | str) -> Tensor:
        """Return the samples, (T,), padded with zeros to one window."""
        import torch

        samples = torch.from_numpy(np.ascontiguousarray(source, dtype=np.float32))
        return torch.nn.functional.pad(samples, (0, max(0, self.window_steps - len(samples))))

    def num_frames(self, num_steps: int) -> dict[str, int]:
        """See `Extractor.num_frames`."""
        beyond = max(num_steps, self.window_steps) - self.window_steps
        return {"logmel": 1 + beyond // self.hop_steps}

    def forward(self, batch: RaggedBatch) -> dict[str, RaggedBatch]:
        """See `Extractor.forward`; the rows are (F, M)."""
        import torch

        frames = batch.data.unfold(1, self.window_steps, self.hop_steps)  # (B, F, window), a view
        at_once = max(1, FRAMES_AT_ONCE // len(frames))
        parts = []
        with torch.inference_mode():
            for first in range(0, frames.shape[1], at_once):
                block = frames[:, first : first + at_once] * self._window
                spectrum = torch.fft.rfft(block, n=self.n_fft)  # (B, F', K)
                power = spectrum.real.square() + spectrum.imag.square()
                parts.append((power @ self._bank).clamp_min(self.floor).log())
        lengths = torch.tensor([self.num_frames(n)["logmel"] for n in batch.lengths.tolist()])
        return {"logmel": RaggedBatch(torch.cat(parts, dim=1), lengths)}
