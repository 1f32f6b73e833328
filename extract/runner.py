"""Running one loaded extractor: batches by its policy, windows, and isolation of what fails."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from mer.cache.errors import ModelOutputError
from mer.extract.contract import BatchPolicy, Extractor, RaggedBatch
from mer.extract.windows import Window, cut

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class _Piece:
    """One window of the input at ``place``."""

    place: int
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

    def __call__(
        self, inputs: Sequence[Tensor], budget_steps: float
    ) -> Iterator[tuple[int, Arrays | Exception]]:
        """Yield each input's place and outputs (T, D), or the exception that it alone caused.

        An input is yielded as soon as its last window is done, so that an interruption loses no
        more than the batch in flight.

        Parameters
        ----------
        inputs : sequence of Tensor
            What ``Extractor.prepare`` returned.
        budget_steps : float
            Padded steps that may share a forward pass.
        """
        pieces: list[_Piece] = []
        frames, leading = self.extractor.num_frames, self.extractor.outputs[0].name
        for place, data in enumerate(inputs):
            for window in cut(len(data), self.extractor.window, lambda n: frames(n)[leading]):
                pieces.append(_Piece(place, window, data[window.start : window.stop]))
        waiting = Counter(piece.place for piece in pieces)
        outcomes: dict[int, list[tuple[int, Arrays | Exception]]] = defaultdict(list)
        for batch in self._batches(pieces, budget_steps):
            for piece, outcome in zip(batch, self._isolating(batch), strict=True):
                outcomes[piece.place].append((piece.window.start, outcome))
                waiting[piece.place] -= 1
                if not waiting[piece.place]:
                    in_order = sorted(outcomes.pop(piece.place), key=itemgetter(0))
                    yield piece.place, _join([part for _, part in in_order])

    def _batches(self, pieces: Sequence[_Piece], budget_steps: float) -> Iterator[list[_Piece]]:
        """Yield batches, longest pieces first, as the policy allows and the budget holds."""
        policy = self.extractor.policy
        batch: list[_Piece] = []
        longest = 0  # a batch holds its longest piece first
        for piece in sorted(pieces, key=lambda piece: -len(piece.data)):
            cost = max(longest, self.extractor.cost_steps)
            full = cost * (len(batch) + 1) > budget_steps
            unequal = policy is BatchPolicy.EQUAL_LENGTH and len(piece.data) != longest
            if batch and (full or unequal or policy is BatchPolicy.SINGLE):
                yield batch
                batch = []
            if not batch:
                longest = len(piece.data)
            batch.append(piece)
        if batch:
            yield batch

    def _isolating(self, batch: list[_Piece]) -> list[Arrays | Exception]:
        """Run a batch; halve what fails until the culprit, or a size that fits, is found."""
        import torch

        try:
            return list(self._forward(batch))
        except (
            Exception
        ) as error:  # whatever a model raises is an utterance's failure, not the run's
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
    """Return floats as the writer takes them: float16 as it is, all others as float32."""
    import torch

    widen = row.is_floating_point() and row.dtype != torch.float16
    return (row.float() if widen else row).cpu().numpy()


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
