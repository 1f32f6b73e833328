"""What a store holds: the identity of a feature and the shape of its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["frames", "codes", "pooled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """One named array that an extractor yields for every utterance, always (T, D).

    Parameters
    ----------
    name : str
        ``"layer_24"``, ``"final"``, ``"f0_code"`` …
    dim : int
        D.
    rate_hz : float or None
        Frames per second; ``None`` where frames are not evenly spaced in time (tokens, pooled
        vectors).
    dtype : str
        Stored type: ``float16`` (with the overflow guard), ``float32``, or an unsigned integer for
        codes.
    kind : {"frames", "codes", "pooled"}
        A sequence of vectors, a sequence of integers, or one vector (T = 1).
    num_codes : int, optional
        Codes run from 0 to ``num_codes - 1``.
    columns : tuple of str, optional
        Names of the D columns where they have one (functionals).
    """

    name: str
    dim: int
    rate_hz: float | None
    dtype: str = "float16"
    kind: Kind = "frames"
    num_codes: int | None = None
    columns: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpec:
    """One extractor configuration: what one store holds.

    Parameters
    ----------
    slug : str
        Readable prefix of the store's name, e.g. ``"wavlm-large-final"``.
    identity : mapping
        Everything that determines the values, as JSON types: extractor name and version, model,
        options. The fingerprint is a hash of its canonical form.
    outputs : tuple of OutputSpec
        Follows from the identity; not hashed.
    licence : str, optional
        Licence note of the weights.
    source : mapping, optional
        Where values come from that no extractor of ours computed, as JSON types; not hashed.
    """

    slug: str
    identity: Mapping[str, Any]
    outputs: tuple[OutputSpec, ...]
    licence: str | None = None
    source: Mapping[str, Any] | None = None

    def output(self, name: str) -> OutputSpec:
        """Return the output called ``name``.

        Raises
        ------
        UnknownNameError
            The feature has no such output.
        """
        for output in self.outputs:
            if output.name == name:
                return output
        from mer.cache.errors import UnknownNameError

        known = (output.name for output in self.outputs)
        raise UnknownNameError(f"output of feature {self.slug!r}", name, known)
