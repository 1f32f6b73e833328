"""What a head is: streams of cached features in, logits out.

B utterances, T frames, D feature width, C classes.
"""

from __future__ import annotations

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
    kind : {"frames", "codes"}
        Vectors of any width, or integers.
    num_codes : int, optional
        Codes must be below it.
    optional : bool, default=False
        Whether the head works without the stream.
    """

    kind: Literal["frames", "codes"] = "frames"
    num_codes: int | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """Logits (B, C) and whatever else a loss or a figure needs, by name."""

    logits: Tensor
    aux: Mapping[str, Tensor] = field(default_factory=dict)


class Head(nn.Module):
    """Base of all heads.

    Subclasses define ``Config`` (a frozen keyword-only dataclass; every number of the paper is a field), the class attribute
    ``inputs``, and are constructed as ``Head(config, dims, num_classes)`` where ``dims`` maps each stream given to its
    width D (``num_codes`` for codes). A stream in ``inputs`` that is not optional and not in ``dims`` is a ``ValueError``.

    Contract, proved by the suite in ``tests/heads``: padding never changes an output; gradient reaches every parameter; the
    same seed gives the same weights.
    """

    Config: ClassVar[type[Any]]
    inputs: ClassVar[Mapping[str, InputSpec]]

    def forward(self, streams: Mapping[str, Ragged]) -> HeadOutput:
        """Return logits (B, C) for the given streams."""
        raise NotImplementedError

    def loss(self, output: HeadOutput, target: Tensor, class_weight: Tensor | None = None) -> dict[str, Tensor]:
        """Return named terms; ``"total"`` is what is minimised.

        Parameters
        ----------
        target : Tensor
            (B,) int64.
        class_weight : Tensor, optional
            (C,), weights of the cross-entropy, normalised by their sum over the batch as in ``torch``.
        """
        return {"total": nn.functional.cross_entropy(output.logits, target, weight=class_weight)}
