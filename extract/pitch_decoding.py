"""From pitch salience to frequency: deterministic, without dither.

F frames, S = 360 bins of 20 cents; bin i lies at 1997.38 + 20 i cents above 10 Hz (32 to 2006 Hz).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

CENTS_PER_BIN = 20.0
FIRST_CENTS = 1997.3794084376191  # of bin 0: 31.70 Hz
AVERAGED = 4  # bins on each side of the centre; 9 in all (CREPE, sec. 2.2)
REACH = 12  # bins a pitch may move in one frame, as in CREPE's own decoder

_LEAST = 1e-12  # keeps the logarithm of a salience of 0 finite


def bin_of(hz: float) -> float:
    """Return the (fractional) bin of a frequency."""
    return (1200.0 * math.log2(hz / 10.0) - FIRST_CENTS) / CENTS_PER_BIN


def to_hz(bins: Tensor) -> Tensor:
    """Return the frequency of (fractional) bins."""
    return 10.0 * 2.0 ** ((bins.double() * CENTS_PER_BIN + FIRST_CENTS) / 1200.0)


def local_average(salience: Tensor, centre: Tensor) -> Tensor:
    """Return the mean bin around ``centre``, weighted by salience, (F,) float32.

    Parameters
    ----------
    salience : Tensor
        (F, S), not negative.
    centre : Tensor
        (F,) int64.
    """
    import torch

    offsets = torch.arange(-AVERAGED, AVERAGED + 1, device=salience.device)
    padded = torch.nn.functional.pad(salience, (AVERAGED, AVERAGED))
    near = padded.gather(1, centre[:, None] + AVERAGED + offsets)  # (F, 9)
    shift = (near * offsets).sum(dim=1) / near.sum(dim=1).clamp_min(_LEAST)
    return centre + shift


def best_path(salience: np.ndarray) -> np.ndarray:
    """Return the most likely bin of each frame, by Viterbi in the log domain.

    Emission is the salience normalised per frame; from bin i to j, weights fall linearly with the
    distance, 12 - |i - j|, and are normalised per i; all bins are equally likely at first.

    Parameters
    ----------
    salience : ndarray
        (F, S), not negative.

    Returns
    -------
    ndarray
        (F,) int64.
    """
    frames, bins = salience.shape
    distance = np.arange(-REACH, REACH + 1)
    weight = REACH - np.abs(distance)
    sources = np.arange(bins)[:, None] + distance  # (S, 25): where j may come from
    inside = (sources >= 0) & (sources < bins)
    # Row sums of the transition matrix: what leaves bin i, cut at the ends.
    leaving = (weight * inside).sum(axis=1)
    with np.errstate(divide="ignore"):
        transition = np.log(weight * inside) - np.log(leaving[sources.clip(0, bins - 1)])
    padding = np.full(REACH, -np.inf)

    def emission(frame: np.ndarray) -> np.ndarray:
        likely = np.maximum(frame, _LEAST, dtype=np.float64)
        log: np.ndarray = np.log(likely) - math.log(likely.sum())
        return log

    score = emission(salience[0])
    came = np.empty((frames, bins), np.uint8)
    rows = np.arange(bins)
    for t in range(1, frames):
        window = np.lib.stride_tricks.sliding_window_view(
            np.concatenate((padding, score, padding)), 2 * REACH + 1
        )
        options = window + transition  # (S, 25)
        came[t] = options.argmax(axis=1)
        score = options[rows, came[t]] + emission(salience[t])
    path = np.empty(frames, np.int64)
    path[-1] = score.argmax()
    for t in range(frames - 1, 0, -1):
        path[t - 1] = path[t] + int(came[t, path[t]]) - REACH
    return path
