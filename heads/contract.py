"""What a head is: streams of cached features in, logits out.

B utterances, T frames, D feature width, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Ragged:
    """A padded batch and its real lengths.

    Parameters
    ----------
    data : Tensor
        (B, T, D) float, or (B, T) int64 for codes; anything may stand beyond ``lengths``.
    lengths : Tensor
        (B,) int64, at least 1 each.
    """

    data: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, True on real frames."""
        steps = torch.arange(self.data.shape[1], device=self.data.device)
        return steps[None, :] < self.lengths.to(self.data.device)[:, None]

    def to(self, device: torch.device | str) -> Ragged:
        """Return the batch on ``device``."""
        return Ragged(self.data.to(device), self.lengths.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """What a head expects of one stream.

    Parameters
    ----------
    kind : {"frames", "codes", "any"}
        Vectors of any width, integers, or either.
    num_codes : int, optional
        Codes must be below it.
    optional : bool, default=False
        Whether the head works without the stream.
    """

    kind: Literal["frames", "codes", "any"] = "frames"
    num_codes: int | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class StreamShape:
    """What one stream given to a head looks like.

    Parameters
    ----------
    dim : int
        Width D of frames, ``num_codes`` of codes.
    kind : {"frames", "codes"}
        Vectors or integers.
    """

    dim: int
    kind: Literal["frames", "codes"] = "frames"


Dims = Mapping[str, int | StreamShape]
"""Streams by name; a bare integer is of the kind that the head declares, else of frames."""


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """Logits (B, C) and whatever else a loss or a figure needs, by name."""

    logits: Tensor
    aux: Mapping[str, Tensor] = field(default_factory=dict)


class Head(nn.Module, ABC):
    """Base of all heads.

    Subclasses define ``Config`` (a frozen keyword-only dataclass; every number of the paper is a
    field), the class attribute ``inputs``, and are constructed as ``Head(config, dims,
    num_classes)`` where ``dims`` maps each stream given to its shape. ``stream_shapes`` checks
    them: a stream in ``inputs`` that is not optional and not in ``dims`` is a ``ValueError``.

    Contract, proved by the suite in ``tests/heads``: padding never changes an output (unless
    ``masked`` is False); gradient reaches every parameter except ``inert_parameters``; the same
    seed gives the same weights.

    Attributes
    ----------
    inputs : mapping of str to InputSpec
        Streams by name.
    open_inputs : bool
        Whether streams of other names are taken as well, of either kind.
    inert_parameters : tuple of str
        Parameters whose gradient is zero by construction; the class docstring says why they exist.
    masked : bool
        False where the head lets padding take part, for parity with code that does. Such a head is
        evaluated one utterance at a time.
    mean_first : frozenset of str
        Frame streams of which the head uses nothing but the mean over time. A caller may hand it
        that mean as a single frame and get the same output; training does so, and spares itself the
        frames.
    """

    Config: ClassVar[type[Any]]
    inputs: ClassVar[Mapping[str, InputSpec]]
    open_inputs: ClassVar[bool] = False
    inert_parameters: ClassVar[tuple[str, ...]] = ()
    masked: bool = True
    mean_first: frozenset[str] = frozenset()

    @abstractmethod
    def forward(self, streams: Mapping[str, Ragged]) -> HeadOutput:
        """Return logits (B, C) for the given streams."""

    def loss(
        self,
        output: HeadOutput,
        target: Tensor,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """Return named terms; ``"total"`` is what is minimised.

        Parameters
        ----------
        target : Tensor
            (B,) int64.
        class_weight : Tensor, optional
            (C,), weights of the cross-entropy, normalised by their sum over the batch as in
            ``torch``.
        label_smoothing : float, default=0.0
            Share of the target spread evenly over all classes.
        """
        total = nn.functional.cross_entropy(
            output.logits, target, weight=class_weight, label_smoothing=label_smoothing
        )
        return {"total": total}


def stream_shapes(head: type[Head], dims: Dims) -> dict[str, StreamShape]:
    """Return the shape of every stream given, checked against what ``head`` declares.

    The order is that of ``head.inputs``, then of the names: it does not depend on the order of
    ``dims``.

    Raises
    ------
    ValueError
        A required stream is missing, a stream is unknown, of the wrong kind, empty or has too many
        codes.
    """
    wanted = ", ".join(f"{n}{' (optional)' if s.optional else ''}" for n, s in head.inputs.items())
    for name, spec in head.inputs.items():
        if not spec.optional and name not in dims:
            raise ValueError(
                f"Stream {name!r} is missing. {head.__name__} reads: {wanted}; "
                f"given: {_names(dims)}."
            )
    shapes: dict[str, StreamShape] = {}
    for name in [n for n in head.inputs if n in dims] + sorted(set(dims) - set(head.inputs)):
        if name not in head.inputs and not head.open_inputs:
            raise ValueError(f"Unknown stream {name!r}. {head.__name__} reads: {wanted}.")
        if not name.isidentifier():
            raise ValueError(f"Stream name {name!r} is not an identifier (letters, digits, _).")
        spec = head.inputs.get(name, InputSpec(kind="any"))
        given = dims[name]
        if isinstance(given, int):
            given = StreamShape(given, "frames" if spec.kind == "any" else spec.kind)
        if spec.kind not in ("any", given.kind):
            raise ValueError(
                f"Stream {name!r} of {head.__name__} takes {spec.kind}, given {given.kind}."
            )
        if given.dim < 1:
            raise ValueError(f"Stream {name!r} has width {given.dim}, expected at least 1.")
        if spec.num_codes is not None and given.dim > spec.num_codes:
            raise ValueError(
                f"Stream {name!r} has {given.dim} codes, "
                f"{head.__name__} takes at most {spec.num_codes}."
            )
        shapes[name] = given
    if not shapes:
        raise ValueError(f"{head.__name__} was given no stream. It reads: {wanted}.")
    return shapes


def take(streams: Mapping[str, Ragged], name: str) -> Ragged:
    """Return the stream called ``name``, or say which one a batch lacks.

    Raises
    ------
    ValueError
        The batch has no such stream.
    """
    if name not in streams:
        raise ValueError(
            f"The batch has no stream {name!r}, with which this head was built; "
            f"given: {_names(streams)}."
        )
    return streams[name]


def _names(mapping: Mapping[str, Any]) -> str:
    return ", ".join(mapping) or "none"
