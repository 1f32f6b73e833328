"""A pitch contour as a sequence of 255 mel-spaced codes, 50 per second.

m(f) = 1127 ln(1 + f/700) from 50 to 1100 Hz is mapped linearly onto 1 … 255 and rounded half to
even: the quantised F0 of the MDAT head's paper, after its authors' code.
"""

from __future__ import annotations

import numpy as np

F0_MIN_HZ = 50.0
F0_MAX_HZ = 1100.0
HOP_STEPS = 320  # samples at 16 kHz per code
NUM_CODES = 257  # 1 … 255, 0 for unvoiced as a token, 256 is left to a head's padding
UNVOICED = 0


def mel(hz: np.ndarray | float) -> np.ndarray:
    """Return 1127 ln(1 + f/700)."""
    return 1127.0 * np.log1p(np.asarray(hz, dtype=np.float64) / 700.0)


def quantise(f0_hz: np.ndarray) -> np.ndarray:
    """Return the code of each frequency.

    Parameters
    ----------
    f0_hz : ndarray
        (T,) in Hz; what lies below 50 (0 included) gets code 1, above 1100 code 255.

    Returns
    -------
    ndarray
        (T,) uint8, 1 … 255.
    """
    low, high = mel(F0_MIN_HZ), mel(F0_MAX_HZ)
    place = (mel(f0_hz) - low) * 254.0 / (high - low) + 1.0
    codes: np.ndarray = np.rint(np.clip(place, 1.0, 255.0)).astype(np.uint8)
    return codes


def num_codes(num_steps: int) -> int:
    """Return how many codes ``num_steps`` samples have: floor(N / 320), at least 1."""
    return max(1, num_steps // HOP_STEPS)


def resize(contour: np.ndarray, num_frames: int) -> np.ndarray:
    """Return the nearest earlier frame for each of ``num_frames`` evenly spaced places."""
    resized: np.ndarray = contour[np.arange(num_frames) * len(contour) // num_frames]
    return resized


def fill_gaps(f0_hz: np.ndarray) -> np.ndarray:
    """Interpolate unvoiced frames (0 Hz) linearly in Hz; the edges take the nearest voiced value.

    A contour without any voiced frame is returned as it is.
    """
    voiced = np.flatnonzero(f0_hz > 0)
    if len(voiced) == 0:
        return f0_hz
    filled: np.ndarray = np.interp(np.arange(len(f0_hz)), voiced, f0_hz[voiced])
    return filled


def encode(f0_hz: np.ndarray, num_steps: int, *, unvoiced: str = "interpolate") -> np.ndarray:
    """Return the codes of a contour.

    Parameters
    ----------
    f0_hz : ndarray
        (T,) contour over the whole clip in Hz at any rate, 0 where unvoiced.
    num_steps : int
        Samples of the clip at 16 kHz.
    unvoiced : {"interpolate", "token"}
        Bridge unvoiced frames (a clip without voice is all 1, as in the authors' code), or give
        them code 0.

    Returns
    -------
    ndarray
        (num_codes(num_steps),) uint8.
    """
    contour = resize(np.asarray(f0_hz, dtype=np.float64), num_codes(num_steps))
    if unvoiced == "token":
        return np.where(contour > 0, quantise(contour), np.uint8(UNVOICED))
    return quantise(fill_gaps(contour))
