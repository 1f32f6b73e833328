"""A small source-filter synthesiser: phones, a speaker and a manner of speaking become samples.

A train of glottal pulses (with jitter, shimmer and spectral tilt) and breath noise pass through
five formant resonators that move from phone to phone; fricatives and bursts are shaped noise beside
them. It is a toy with the structure of speech, after Klatt (1980), "Software for a cascade/parallel
formant synthesizer"; formants of vowels are those of Peterson and Barney (1952), men.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.signal import butter, lfilter, sosfilt

RATE_HZ = 16_000
STEP = 80  # samples between two settings of the filters: 5 ms

_Formants = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Phone:
    """How one speech sound is made.

    Parameters
    ----------
    duration_s : float
        At a neutral rate.
    start, end : tuple of float
        First three formants in Hz, at the begin and the end.
    voice : float
        Amplitude of the voice, 1 for vowels.
    noise : float
        Amplitude of frication.
    band_hz : tuple of float
        Band of the frication.
    burst_s : float
        Length of a stop's burst; what precedes it is closure.
    vowel : bool
        May carry an accent.
    """

    duration_s: float
    start: _Formants
    end: _Formants
    voice: float = 1.0
    noise: float = 0.0
    band_hz: tuple[float, float] = (0.0, 0.0)
    burst_s: float = 0.0
    vowel: bool = False


_VOWELS: dict[str, _Formants] = {
    "IY": (270, 2290, 3010),
    "IH": (390, 1990, 2550),
    "EH": (530, 1840, 2480),
    "AE": (660, 1720, 2410),
    "AA": (730, 1090, 2440),
    "AO": (570, 840, 2410),
    "UH": (440, 1020, 2240),
    "UW": (300, 870, 2240),
    "AH": (640, 1190, 2390),
    "ER": (490, 1350, 1690),
}
_GLIDES = {"EY": ("EH", "IY"), "AY": ("AA", "IY"), "OW": ("AO", "UW"), "AW": ("AA", "UW")}
_SONORANTS: dict[str, tuple[_Formants, float]] = {
    "M": ((280, 900, 2200), 0.35),
    "N": ((280, 1700, 2600), 0.35),
    "NG": ((280, 2300, 2750), 0.35),
    "L": ((360, 1200, 2600), 0.55),
    "R": ((310, 1060, 1380), 0.55),
    "W": ((290, 610, 2150), 0.5),
    "Y": ((260, 2070, 3020), 0.5),
}
_FRICATIVES: dict[str, tuple[float, float, float, float]] = {  # voice, noise, band
    "S": (0.0, 0.30, 4200, 7400),
    "Z": (0.25, 0.18, 4200, 7400),
    "SH": (0.0, 0.32, 2200, 5500),
    "F": (0.0, 0.10, 1500, 7500),
    "V": (0.35, 0.05, 1500, 7500),
    "TH": (0.0, 0.08, 2500, 7500),
    "DH": (0.35, 0.04, 2500, 7500),
    "HH": (0.0, 0.12, 500, 3000),
}
_STOPS: dict[str, tuple[float, float, float, float]] = {
    "P": (0.0, 0.15, 500, 2000),
    "T": (0.0, 0.25, 3000, 7000),
    "K": (0.0, 0.22, 1300, 3500),
    "B": (0.15, 0.08, 500, 2000),
    "D": (0.15, 0.12, 3000, 7000),
    "G": (0.15, 0.12, 1300, 3500),
}
_OBSTRUENT: _Formants = (330, 1500, 2500)


def _phones() -> dict[str, Phone]:
    phones = {n: Phone(0.105, f, f, vowel=True) for n, f in _VOWELS.items()}
    for name, (a, b) in _GLIDES.items():
        phones[name] = Phone(0.145, _VOWELS[a], _VOWELS[b], vowel=True)
    for name, (formants, voice) in _SONORANTS.items():
        phones[name] = Phone(0.07, formants, formants, voice)
    for name, (voice, noise, low, high) in _FRICATIVES.items():
        phones[name] = Phone(0.085, _OBSTRUENT, _OBSTRUENT, voice, noise, (low, high))
    for name, (voice, noise, low, high) in _STOPS.items():
        phones[name] = Phone(0.08, _OBSTRUENT, _OBSTRUENT, voice, noise, (low, high), 0.022)
    return phones


PHONES = _phones()


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """A voice.

    Parameters
    ----------
    f0_hz : float
        Mean pitch.
    tract : float
        Scale of the formants; 1 for an average man, about 1.17 for an average woman.
    """

    f0_hz: float
    tract: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How an utterance is spoken; everything that emotion changes.

    Parameters
    ----------
    pitch : float
        Factor on the speaker's mean pitch.
    span : float
        Size of accents and declination, 1 is neutral.
    final : float
        Movement of the last syllable in octaves: negative falls.
    rate : float
        Factor on the speed.
    level_db : float
        RMS level of the recording in dB of full scale.
    tilt : float
        Coefficient of a one-pole low-pass on the source in [0, 1): larger is darker.
    open_quotient : float
        Share of a cycle in which the glottis is open; small is pressed.
    breath : float
        Amplitude of breath noise beside the voice.
    jitter, shimmer : float
        Standard deviation of period and amplitude from cycle to cycle, relative.
    smile : float
        Factor on the formants: spread lips shorten the tract.
    """

    pitch: float = 1.0
    span: float = 1.0
    final: float = -0.25
    rate: float = 1.0
    level_db: float = -24.0
    tilt: float = 0.55
    open_quotient: float = 0.6
    breath: float = 0.02
    jitter: float = 0.008
    shimmer: float = 0.04
    smile: float = 1.0


def speak(
    phones: tuple[str, ...], speaker: Speaker, manner: Manner, rng: np.random.Generator
) -> np.ndarray:
    """Synthesise an utterance.

    Parameters
    ----------
    phones : tuple of str
        Keys of ``PHONES``.
    speaker : Speaker
        Who speaks.
    manner : Manner
        How.
    rng : numpy.random.Generator
        Source of noise, timing and cycle-to-cycle variation.

    Returns
    -------
    ndarray
        (N,) float64 at 16 kHz within (-1, 1), with 60 to 120 ms of room noise at either end.
    """
    lead, trail = rng.integers(12, 24, 2)
    timing = [
        max(4, round(PHONES[p].duration_s / manner.rate * rng.normal(1.0, 0.12) * RATE_HZ / STEP))
        for p in phones
    ]
    starts = np.concatenate(([lead], lead + np.cumsum(timing)))
    num_steps = int(starts[-1] + trail)
    num_samples = num_steps * STEP
    formants, voice = _tracks(phones, starts, num_steps)
    f0 = _pitch(phones, starts, num_steps, speaker, manner, rng)

    source = _source(f0, voice, manner, rng)
    voiced = _vocal_tract(source, formants * speaker.tract * manner.smile, speaker.tract)
    voiced /= np.sqrt(np.mean(voiced**2)) + 1e-9
    samples = 0.3 * voiced + _frication(phones, starts, num_samples, rng)
    gain = 10 ** (manner.level_db / 20) / np.sqrt(np.mean(samples**2))
    samples = samples * gain + rng.normal(0.0, 10 ** (-66 / 20), num_samples)
    peak = np.max(np.abs(samples))
    return samples * min(1.0, 0.98 / peak)


def _tracks(
    phones: tuple[str, ...], starts: np.ndarray, num_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return formants (steps, 3) in Hz and voice amplitude (steps,), smoothed as tongues are."""
    formants = np.empty((num_steps, 3))
    voice = np.zeros(num_steps)
    formants[: starts[0]] = PHONES[phones[0]].start
    formants[starts[-1] :] = PHONES[phones[-1]].end
    for phone, a, b in zip(map(PHONES.__getitem__, phones), starts, starts[1:], strict=False):
        way = np.linspace(0.0, 1.0, b - a)[:, None]
        formants[a:b] = (1 - way) * np.array(phone.start) + way * np.array(phone.end)
        voice[a:b] = phone.voice
    kernel = np.hanning(11)[1:-1]
    kernel /= kernel.sum()
    half = len(kernel) // 2
    padded = np.pad(formants, ((half, half), (0, 0)), mode="edge")
    smooth = np.stack([np.convolve(column, kernel, "valid") for column in padded.T], axis=1)
    return smooth, np.convolve(np.pad(voice, 2), np.full(5, 0.2), "valid")


def _pitch(
    phones: tuple[str, ...],
    starts: np.ndarray,
    num_steps: int,
    speaker: Speaker,
    manner: Manner,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return f0 in Hz per step: declination, an accent on some vowels, a final movement."""
    step = np.arange(num_steps)
    way = np.clip((step - starts[0]) / max(1, starts[-1] - starts[0]), 0.0, 1.0)
    octaves = manner.span * (0.16 - 0.32 * way)
    vowels = [i for i, phone in enumerate(phones) if PHONES[phone].vowel]
    for count, i in enumerate(vowels):
        height = manner.span * (0.28 if count % 2 == 0 else 0.06) * rng.normal(1.0, 0.3)
        centre, width = (starts[i] + starts[i + 1]) / 2, (starts[i + 1] - starts[i]) * 0.8
        octaves += height * np.exp(-0.5 * ((step - centre) / width) ** 2)
    octaves += manner.final * np.clip((way - 0.75) / 0.25, 0.0, 1.0) ** 2
    drift = np.cumsum(rng.normal(0.0, 0.01, num_steps))
    octaves += drift - np.linspace(drift[0], drift[-1], num_steps)
    return np.clip(speaker.f0_hz * manner.pitch * 2**octaves, 55.0, 700.0)


def _source(
    f0: np.ndarray, voice: np.ndarray, manner: Manner, rng: np.random.Generator
) -> np.ndarray:
    """Return the derivative of the glottal flow with breath noise, (steps * STEP,)."""
    num_samples = len(f0) * STEP
    time = np.arange(num_samples) / STEP
    steps = np.arange(len(f0)) + 0.5
    f0 = np.interp(time, steps, f0)
    amplitude = np.interp(time, steps, voice)
    cycle = np.floor(np.cumsum(f0) / RATE_HZ).astype(np.int64)
    wobble = rng.normal(0.0, 1.0, (2, cycle[-1] + 2))
    phase = np.cumsum(f0 * (1 + manner.jitter * wobble[0, cycle])) / RATE_HZ % 1.0
    amplitude = amplitude * (1 + manner.shimmer * wobble[1, cycle])
    opening, closed = manner.open_quotient * 0.67, manner.open_quotient
    flow = np.where(
        phase < opening,
        0.5 - 0.5 * np.cos(np.pi * phase / opening),
        np.where(phase < closed, np.cos(0.5 * np.pi * (phase - opening) / (closed - opening)), 0.0),
    )
    pulses = np.diff(flow, prepend=flow[0])
    pulses /= np.sqrt(np.mean(pulses**2))
    breath = manner.breath * rng.normal(0.0, 1.0, num_samples) * (0.5 + flow)
    tilted = lfilter([1 - manner.tilt], [1.0, -manner.tilt], pulses)
    return amplitude * (tilted + breath)


def _vocal_tract(source: np.ndarray, formants: np.ndarray, tract: float) -> np.ndarray:
    """Pass ``source`` through five resonators in cascade, set anew at every step."""
    num_steps = len(formants)
    centre = np.empty((num_steps, 5))
    centre[:, :3] = formants
    centre[:, 3:] = np.array([3500.0, 4500.0]) * tract
    centre = np.clip(centre, 150.0, 7600.0)
    width = np.array([70.0, 90.0, 130.0, 250.0, 350.0])
    c = -np.exp(-2 * np.pi * width / RATE_HZ)
    b = 2 * np.exp(-np.pi * width / RATE_HZ) * np.cos(2 * np.pi * centre / RATE_HZ)
    sections = np.zeros((num_steps, 5, 6))
    sections[:, :, 0] = 1 - b - c  # unit gain at 0 Hz
    sections[:, :, 3] = 1.0
    sections[:, :, 4] = -b
    sections[:, :, 5] = -c
    state = np.zeros((5, 2))
    result = np.empty_like(source)
    for step in range(num_steps):
        block = slice(step * STEP, (step + 1) * STEP)
        result[block], state = sosfilt(sections[step], source[block], zi=state)
    return result


def _frication(
    phones: tuple[str, ...], starts: np.ndarray, num_samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the noise of fricatives and bursts, (num_samples,)."""
    result = np.zeros(num_samples)
    for phone, a, b in zip(map(PHONES.__getitem__, phones), starts, starts[1:], strict=False):
        if not phone.noise:
            continue
        end = int(b) * STEP
        begin = end - int(phone.burst_s * RATE_HZ) if phone.burst_s else int(a) * STEP
        sections = butter(2, phone.band_hz, "bandpass", fs=RATE_HZ, output="sos")
        noise = sosfilt(sections, rng.normal(0.0, 1.0, end - begin))
        ramp = np.minimum(1.0, np.arange(end - begin) / (0.004 * RATE_HZ))
        result[begin:end] += 0.5 * phone.noise * noise * ramp * ramp[::-1]
    return result
