"""eGeMAPS by openSMILE: 88 functionals of an utterance, or its 25 descriptors per frame.

Source: F. Eyben et al., "The Geneva Minimalistic Acoustic Parameter Set (GeMAPS) for Voice Research
and Affective Computing", IEEE Trans. Affective Computing 7(2), 2016; set eGeMAPSv02 of openSMILE.

openSMILE is CPU signal processing on one utterance at a time, releases Python's lock and keeps no
state between calls, so it runs in `prepare`, in the engine's worker threads; `forward` only hands
the result on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mer.cache.errors import MissingDependencyError, ModelOutputError
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.extract.audio import FRONT_END
from mer.extract.contract import SAMPLE_RATE_HZ, BatchPolicy, Extractor, RaggedBatch, take
from mer.extract.options import check_choice
from mer.extract.precision import STORED

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = ("functionals", "lld")
DEFAULTS = {"level": "functionals", "dtype": "float32"}
FEATURE_SET = "eGeMAPSv02"
HOP_STEPS = 160
LEAST_STEPS = 960  # one 60 ms frame and its smoothing; openSMILE yields nothing below

_FORMANTS = tuple(
    f"F{i}{what}_sma3nz"
    for i in (1, 2, 3)
    for what in ("frequency", "bandwidth", "amplitudeLogRelF0")
)
_VOICE = (
    "jitterLocal_sma3nz",
    "shimmerLocaldB_sma3nz",
    "HNRdBACF_sma3nz",
    "logRelF0-H1-H2_sma3nz",
    "logRelF0-H1-A3_sma3nz",
    *_FORMANTS,
)
_CEPSTRUM = tuple(f"mfcc{i}" for i in (1, 2, 3, 4))
_PITCH = "F0semitoneFrom27.5Hz_sma3nz"
_SPECTRUM = ("alphaRatio", "hammarbergIndex", "slope{}0-500", "slope{}500-1500")


def _spectrum(voicing: str) -> tuple[str, ...]:
    return tuple(name.format(voicing) if "{}" in name else name + voicing for name in _SPECTRUM)


LLD_COLUMNS = (
    "Loudness_sma3",
    *(f"{name}_sma3" for name in (*_spectrum(""), "spectralFlux", *_CEPSTRUM)),
    _PITCH,
    *_VOICE,
)
"""Names of the 25 descriptors, as openSMILE gives them."""

FUNCTIONAL_COLUMNS = (
    *(
        f"{name}_{functional}"
        for name in (_PITCH, "loudness_sma3")
        for functional in (
            "amean",
            "stddevNorm",
            "percentile20.0",
            "percentile50.0",
            "percentile80.0",
            "pctlrange0-2",
            "meanRisingSlope",
            "stddevRisingSlope",
            "meanFallingSlope",
            "stddevFallingSlope",
        )
    ),
    *(
        f"{name}_{functional}"
        for name in (
            "spectralFlux_sma3",
            *(f"{name}_sma3" for name in _CEPSTRUM),
            *_VOICE,
            *(f"{name}_sma3nz" for name in _spectrum("V")),
            "spectralFluxV_sma3nz",
            *(f"{name}V_sma3nz" for name in _CEPSTRUM),
        )
        for functional in ("amean", "stddevNorm")
    ),
    *(f"{name}_sma3nz_amean" for name in (*_spectrum("UV"), "spectralFluxUV")),
    "loudnessPeaksPerSec",
    "VoicedSegmentsPerSec",
    "MeanVoicedSegmentLengthSec",
    "StddevVoicedSegmentLengthSec",
    "MeanUnvoicedSegmentLength",
    "StddevUnvoicedSegmentLength",
    "equivalentSoundLevel_dBp",
)
"""Names of the 88 functionals, as openSMILE gives them."""


class Egemaps(Extractor):
    """The extended Geneva minimalistic acoustic parameter set.

    Parameters
    ----------
    level : {"functionals", "lld"}
        Output ``functionals``, 88 per utterance; or ``lld``, 25 per frame at 100 Hz.
    dtype : {"float32", "float16"}
        Stored type. The columns' scales differ by five orders of magnitude: float32 by default.

    Notes
    -----
    openSMILE works on 16-bit samples: louder ones than full scale are clipped. Fewer than 960
    samples (60 ms) are padded with zeros to that; N samples yield max(N, 960) // 160 - 4 frames.
    """

    policy = BatchPolicy.ANY
    licence = "openSMILE: audEERING research licence, not for products"

    def __init__(self, level: str = "functionals", dtype: str = "float32") -> None:
        if importlib.util.find_spec("opensmile") is None:
            raise MissingDependencyError(
                "Feature 'egemaps' takes the package opensmile, which is not installed. "
                "Install it: pip install 'mer[smile]'."
            )
        self.level = level
        self._smile: Any = None
        if level == "functionals":
            columns, rate_hz = FUNCTIONAL_COLUMNS, None
        else:
            columns, rate_hz = LLD_COLUMNS, SAMPLE_RATE_HZ / HOP_STEPS
        self.spec = FeatureSpec(
            slug=f"egemaps-{level}",
            identity={
                "extractor": "egemaps",
                "version": self.version,
                "options": {"set": FEATURE_SET, "level": level, "dtype": dtype},
                "model": None,
                "library": {"opensmile": version("opensmile")},
                "front_end": FRONT_END,
            },
            outputs=(
                OutputSpec(
                    name=level,
                    dim=len(columns),
                    rate_hz=rate_hz,
                    dtype=dtype,
                    kind="pooled" if level == "functionals" else "frames",
                    columns=columns,
                ),
            ),
            licence=self.licence,
        )

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, str]) -> Self:
        """See `Extractor.from_options`."""
        o = take(options, name, DEFAULTS)
        return cls(
            level=check_choice(name, "level", o["level"], LEVELS),
            dtype=check_choice(name, "dtype", o["dtype"], STORED),
        )

    def load(self, device: str) -> None:
        """See `Extractor.load`; the device plays no part."""
        if self._smile is not None:
            return
        import opensmile

        level = "Functionals" if self.level == "functionals" else "LowLevelDescriptors"
        self._smile = opensmile.Smile(
            opensmile.FeatureSet[FEATURE_SET], opensmile.FeatureLevel[level]
        )

    def prepare(self, source: np.ndarray | str) -> Tensor:
        """Return the features themselves, (T, D): one row for functionals.

        Raises
        ------
        ModelOutputError
            openSMILE answered with NaN or Inf.
        """
        import torch

        self.load("cpu")
        samples = np.asarray(source, dtype=np.float32)
        samples = np.pad(samples, (0, max(0, LEAST_STEPS - len(samples))))
        # openSMILE's binding casts to 16 bit without a limit: 1.0 would turn into -1.0.
        samples = samples.clip(-1.0, 32767 / 32768)
        features = self._smile(samples, SAMPLE_RATE_HZ)[0].T  # (channel, D, T) → (T, D)
        finite = np.isfinite(features).all(axis=0)
        if not finite.all():
            columns = self.outputs[0].columns or ()
            bad = [name for name, ok in zip(columns, finite, strict=True) if not ok]
            raise ModelOutputError(f"openSMILE answered with NaN or Inf in {', '.join(bad[:3])}.")
        return torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))

    def num_frames(self, num_steps: int) -> dict[str, int]:
        """Return ``num_steps``: `prepare` yields the frames themselves."""
        return {self.level: num_steps}

    def forward(self, batch: RaggedBatch) -> dict[str, RaggedBatch]:
        """Hand the features on."""
        return {self.level: batch}
