"""Running one loaded extractor: batches by its policy, windows, and isolation of what fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mer.cache.errors import ModelOutputError, StoreError
from mer.extract.contract import BatchPolicy, Extractor, RaggedBatch
from mer.extract.windows import Window, cut

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class _Piece:
    """One window of one prepared input."""

    window: Window
    data: Tensor


class Runner:
    """Runs a loaded extractor on lists of prepared inputs and counts what padding costs.

    Attributes
    ----------
    real_steps, padded_steps : int
        Input steps that were data, and that were padding, over all forward passes.
    """

    def __init__(self, extractor: Extractor, device: str) -> None:
        self.extractor = extractor
        self.device = device
        self.real_steps = 0
        self.padded_steps = 0

    def __call__(self, inputs: Sequence[Tensor], budget_steps: float) -> list[Arrays | Exception]:
        """Return each input's outputs as (T, D) arrays, or the exception that it alone caused.

        Parameters
        ----------
        inputs : sequence of Tensor
            What ``Extractor.prepare`` returned.
        budget_steps : float
            Padded steps that may share a forward pass.
        """
        pieces: list[_Piece] = []
        ranges: list[range] = []
        frames, leading = self.extractor.num_frames, self.extractor.outputs[0].name
        for data in inputs:
            windows = cut(len(data), self.extractor.window, lambda n: frames(n)[leading])
            ranges.append(range(len(pieces), len(pieces) + len(windows)))
            pieces += [_Piece(window, data[window.start : window.stop]) for window in windows]
        outcomes: dict[int, Arrays | Exception] = {}
        for batch in self._batches(pieces, budget_steps):
            outcomes.update(zip(batch, self._isolating([pieces[i] for i in batch]), strict=True))
        return [_join([outcomes[i] for i in of_input]) for of_input in ranges]

    def _batches(self, pieces: Sequence[_Piece], budget_steps: float) -> Iterator[list[int]]:
        """Yield batches of indices into ``pieces``, as the policy allows and the budget holds."""
        policy = self.extractor.policy
        sizes = [len(piece.data) for piece in pieces]
        batch: list[int] = []
        longest = 0
        for i in sorted(range(len(pieces)), key=lambda i: -sizes[i]):
            full = longest * (len(batch) + 1) > budget_steps
            unequal = policy is BatchPolicy.EQUAL_LENGTH and sizes[i] != longest
            if batch and (full or unequal or policy is BatchPolicy.SINGLE):
                yield batch
                batch = []
            if not batch:
                longest = sizes[i]
            batch.append(i)
        if batch:
            yield batch

    def _isolating(self, batch: list[_Piece]) -> list[Arrays | Exception]:
        """Run a batch; halve what fails until the culprit, or a size that fits, is found."""
        import torch

        try:
            return list(self._forward(batch))
        except StoreError:
            raise
        except (
            Exception
        ) as error:  # whatever a model raises is one utterance's failure, not the run's
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
                logger.warning("out of memory on a batch of %d: retrying in halves", len(batch))
            if len(batch) == 1:
                return [error]
        half = len(batch) // 2
        return self._isolating(batch[:half]) + self._isolating(batch[half:])

    def _forward(self, batch: list[_Piece]) -> Iterator[Arrays]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        lengths = torch.tensor([len(piece.data) for piece in batch])
        data = pad_sequence([piece.data for piece in batch], batch_first=True)
        real = int(lengths.sum())
        self.real_steps += real
        self.padded_steps += data.shape[0] * data.shape[1] - real
        with torch.inference_mode():
            outputs = self.extractor.forward(RaggedBatch(data.to(self.device), lengths))
            rows = {name: [_to_numpy(row) for row in out.unpad()] for name, out in outputs.items()}
        for i, piece in enumerate(batch):
            keep = slice(piece.window.keep_from, piece.window.keep_to)
            whole = self.extractor.window is None
            yield {
                name: of_name[i] if whole else of_name[i][keep] for name, of_name in rows.items()
            }


def _to_numpy(row: Tensor) -> np.ndarray:
    """Return floats as float32: what the writer rounds from."""
    return (row.float() if row.is_floating_point() else row).cpu().numpy()


def _join(parts: Sequence[Arrays | Exception]) -> Arrays | Exception:
    """Join the windows of one input; a window's failure, or a value not finite, fails it."""
    arrays: list[Arrays] = []
    for part in parts:
        if isinstance(part, Exception):
            return part
        arrays.append(part)
    joined = arrays[0]
    if len(arrays) > 1:
        joined = {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}
    for name, array in joined.items():
        if array.dtype.kind != "f":
            continue
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if len(bad):
            return ModelOutputError(
                f"output {name!r} is not finite in {len(bad)} of {len(array)} frames "
                f"(first: {bad[0]}). Nothing was stored: check the recording or the precision."
            )
    return joined
