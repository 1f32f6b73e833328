"""From per-utterance arrays to padded batches on a device, without a loader.

B utterances, T frames, D width, F frames of all utterances together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mer.heads.contract import Ragged

POOL_BATCHES = 8
"""Batches that are sorted by length together: enough to keep padding small, few enough to mix."""

CHUNK_FRAMES = 1 << 16


@dataclass(frozen=True, slots=True)
class FlatStream:
    """One stream of a set of utterances: all frames in one tensor, nothing padded.

    Parameters
    ----------
    data : Tensor
        (F, D) float of the type it was stored in, or (F,) int32 codes; on ``device`` where it fits.
    starts, lengths : Tensor
        (N,) int64 on the device of ``data``.
    longest : ndarray
        (N,) int64, the lengths once more, for planning without a transfer.
    device : torch.device
        Where batches are wanted.
    shift, scale : Tensor, optional
        (D,) float32 on ``device``; frames become ``(x - shift) * scale``.
    """

    data: Tensor
    starts: Tensor
    lengths: Tensor
    longest: np.ndarray
    device: torch.device
    shift: Tensor | None = None
    scale: Tensor | None = None

    def batch(self, rows: np.ndarray) -> Ragged:
        """Return utterances ``rows`` (B,) as a batch: (B, T, D) float32 or (B, T) int64 codes.

        Beyond an utterance's length stand other utterances' frames, which ``Ragged`` allows.
        """
        index = torch.from_numpy(rows).to(self.data.device)
        lengths = self.lengths[index]
        width = int(self.longest[rows].max())
        steps = torch.arange(width, device=self.data.device)
        frames = (self.starts[index][:, None] + steps).clamp_(max=len(self.data) - 1)
        data = self.data.index_select(0, frames.view(-1))
        data = data.view(frames.shape + self.data.shape[1:]).to(self.device)
        lengths = lengths.to(self.device)
        if self.data.dim() == 1:
            return Ragged(data.long(), lengths)
        data = data.float()
        if self.shift is not None and self.scale is not None:
            data.sub_(self.shift).mul_(self.scale)
        return Ragged(data, lengths)


def flatten(
    arrays: Sequence[np.ndarray], kind: Literal["frames", "codes"], device: torch.device
) -> FlatStream:
    """Return the arrays, each (T, D) or codes (T,) or (T, 1), end to end."""
    if kind == "codes":
        flat = np.concatenate([a.reshape(-1) for a in arrays]).astype(np.int32)
    else:
        flat = np.concatenate(arrays)
        if flat.dtype not in (np.float16, np.float32):
            flat = flat.astype(np.float32)
    lengths = np.array([len(a) for a in arrays], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    data = torch.from_numpy(np.ascontiguousarray(flat))
    home = device if _fits(data, device) else torch.device("cpu")
    return FlatStream(
        data.to(home),
        torch.from_numpy(starts).to(home),
        torch.from_numpy(lengths).to(home),
        lengths,
        device,
    )


def _fits(data: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return data.nbytes < 0.5 * free  # the other half is for the head and its batches


def first_not_finite(stream: FlatStream) -> int | None:
    """Return the first utterance that holds NaN or Inf."""
    if stream.data.dim() == 1:
        return None
    for start in range(0, len(stream.data), CHUNK_FRAMES):
        bad = ~torch.isfinite(stream.data[start : start + CHUNK_FRAMES]).all(1)
        if bad.any():
            frame = start + int(bad.int().argmax())
            return int(torch.searchsorted(stream.starts, frame, right=True)) - 1
    return None


def moments(stream: FlatStream) -> tuple[Tensor, Tensor]:
    """Return shift and scale, (D,) float32, that make all frames zero-mean and unit-variance.

    A dimension that does not vary is only shifted.
    """
    chunks = torch.split(stream.data, CHUNK_FRAMES)
    mean = torch.stack([c.double().sum(0) for c in chunks]).sum(0) / len(stream.data)
    square = torch.stack([(c.double() - mean).square().sum(0) for c in chunks]).sum(0)
    std = (square / len(stream.data)).sqrt()
    varies = std > 1e-6 * mean.abs().clamp_min(1e-6)  # below is the rounding of float32
    scale = torch.where(varies, 1 / std, torch.ones_like(std))
    return mean.float(), scale.float()


def epoch_batches(
    lengths: np.ndarray, batch_size: int, generator: np.random.Generator, *, bucketing: bool = True
) -> list[np.ndarray]:
    """Return all utterances once, in random batches; with ``bucketing``, of similar length.

    Utterances are shuffled, cut into pools of a few batches, sorted by length within a pool, and
    the batches shuffled again.
    """
    order = generator.permutation(len(lengths))
    if not bucketing:
        return _cut(order, batch_size)
    batches: list[np.ndarray] = []
    for pool in _cut(order, batch_size * POOL_BATCHES):
        batches += _cut(pool[np.argsort(lengths[pool], kind="stable")], batch_size)
    return [batches[i] for i in generator.permutation(len(batches))]


def sorted_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Return all utterances once, longest first, so that memory runs out at once or never."""
    return _cut(np.argsort(-lengths, kind="stable"), batch_size)


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[i : i + size] for i in range(0, len(order), size)]
