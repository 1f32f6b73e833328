"""What an extractor is: the contract between models and the engine.

B utterances in a batch, T steps (samples, tokens or frames), D feature width.

Constructing an extractor is cheap: it reads options, configuration and weight checksums, and
imports neither torch nor transformers, so that planning a finished run stays instant. ``load``
brings the model in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from mer.cache.spec import FeatureSpec, OutputSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SAMPLE_RATE_HZ = 16_000


class BatchPolicy(Enum):
    """How utterances may share a forward pass without changing a number."""

    ANY = "any"  # steps are independent of padding by construction
    MASK = "mask"  # padding is masked exactly
    EQUAL_LENGTH = "equal-length"  # only inputs of one length may share a batch
    SINGLE = "single"  # one at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One utterance as the engine sees it: where its sound and words are, nothing about labels.

    Parameters
    ----------
    id : str
        Utterance id, for messages only; it is not part of any key.
    path : Path, optional
        Recording. Audio features need it.
    start_s, end_s : float, optional
        Segment within the recording, in seconds; ``None`` is the recording's own bound.
    channel : int, optional
        Channel to take, from 0; ``None`` applies the downmix rule.
    text : str, optional
        Transcript. Text features need it.
    """

    id: str
    path: Path | None = None
    start_s: float | None = None
    end_s: float | None = None
    channel: int | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRule:
    """How inputs beyond a model's limit are cut: overlapping windows, each output frame taken once.

    Parameters
    ----------
    size : int
        Steps a window holds; inputs of at most this many run whole.
    overlap : int
        Steps shared by neighbours; half of it is given to each side.
    hop : int
        Steps per output frame; window starts are multiples of it.
    """

    size: int
    overlap: int
    hop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Which weights: hub id and commit (``"local"`` and None for a folder), sha256 of the files."""

    id: str
    revision: str | None
    weights: str


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Padded data and real lengths.

    Parameters
    ----------
    data : Tensor
        (B, T) or (B, T, D); beyond ``lengths`` it is zero on the way in and meaningless on the way
        out.
    lengths : Tensor
        (B,) int64, on the CPU.
    """

    data: Tensor
    lengths: Tensor

    def unpad(self) -> list[Tensor]:
        """Return the B rows cut to their real lengths."""
        return [row[:n] for row, n in zip(self.data, self.lengths.tolist(), strict=True)]


class Extractor(ABC):
    """A frozen model (or fixed signal processing) that turns utterances into named outputs.

    Class attributes
    ----------------
    modality : {"audio", "text"}
        What ``prepare`` receives: samples or a normalised transcript.
    version : int
        Raised whenever the extractor's own numbers change.
    policy : BatchPolicy
        A claim that the contract suite proves for every registered extractor.
    cost_steps : int
        Steps that every input costs at least, however short: what a fixed window holds.
    licence : str or None
        Licence note of the weights, stored with the features.
    """

    modality: ClassVar[Literal["audio", "text"]] = "audio"
    version: ClassVar[int] = 1
    policy: BatchPolicy = BatchPolicy.MASK
    licence: str | None = None
    window: WindowRule | None = None
    cost_steps: int = 0

    spec: FeatureSpec  # identity, slug and outputs; set by the constructor

    @classmethod
    @abstractmethod
    def from_options(cls, name: str, options: Mapping[str, str]) -> Self:
        """Build from a registered name and the options of a feature string, presets included.

        Raises
        ------
        UsageError
            An unknown option (with near misses) or a value out of range.
        CheckpointError
            Weights that cannot be found or do not fit.
        """

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """The declared outputs, in order."""
        return self.spec.outputs

    @abstractmethod
    def load(self, device: str) -> None:
        """Bring the model onto ``device`` in evaluation mode; a second call is free."""

    @abstractmethod
    def prepare(self, source: np.ndarray | str) -> Tensor:
        """Turn one utterance into the model's input: on the CPU, in worker threads, unbatched.

        Parameters
        ----------
        source : ndarray or str
            (N,) float32 at 16 kHz in [-1, 1], or the normalised transcript.

        Returns
        -------
        Tensor
            (T,) or (T, D). Everything that depends on one utterance alone (normalisation, minimum
            length, tokens) happens here, so that no padding can reach it.
        """

    @abstractmethod
    def num_frames(self, num_steps: int) -> dict[str, int]:
        """Return the frames each output has for a prepared input of ``num_steps`` real steps."""

    @abstractmethod
    def forward(self, batch: RaggedBatch) -> dict[str, RaggedBatch]:
        """Run the model on prepared inputs; keys are the names of ``outputs``, rows are (T', D)."""


def take(options: Mapping[str, str], name: str, allowed: Mapping[str, Any]) -> dict[str, str]:
    """Return ``allowed`` defaults updated by ``options``.

    Raises
    ------
    UnknownNameError
        An option that feature ``name`` does not have.
    """
    from mer.cache.errors import UnknownNameError

    merged = dict(allowed)
    for key, value in options.items():
        if key not in allowed:
            raise UnknownNameError(f"option of feature {name!r}", key, allowed)
        merged[key] = value
    return merged
