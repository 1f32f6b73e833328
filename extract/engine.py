"""Stage one: from a plan to stored features, with every stage overlapped.

::

    workers             main thread             writer thread
    decode ▸ prepare ─► pad ▸ forward ▸ join ─► round ▸ part ▸ commit

Utterances are sorted by duration and cut into blocks of bounded seconds, so that what shares a
forward pass has nearly one length. A block is decoded once for all extractors that miss any of it.
One bad utterance costs only itself.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mer.cache.errors import MissingDependencyError, UsageError
from mer.cache.home import Cache
from mer.cache.identity import normalise_text
from mer.cache.store import Store
from mer.cache.writer import PartWriter
from mer.extract.contract import Extractor, Source
from mer.extract.inputs import Failure
from mer.extract.plan import FeaturePlan, Plan
from mer.extract.runner import Arrays, Runner

if TYPE_CHECKING:
    from torch import Tensor

# Padded seconds per forward pass. A CPU is kept busy by one clip of speech, and larger batches were
# slower there (benchmarks/README.md); transcripts are short, and a GPU wants much.
BATCH_SECONDS = {
    ("cpu", "audio"): 8.0,
    ("cpu", "text"): 60.0,
    ("cuda", "audio"): 480.0,
    ("cuda", "text"): 480.0,
}
BLOCKS_AHEAD = 2
WRITES_AHEAD = 64
BYTES_AHEAD = 1 << 30


class Progress(Protocol):
    """What the engine tells a progress bar."""

    def start(self, utterances: int, seconds: float) -> None:
        """Begin a run over so many utterance × feature pairs and seconds of input."""

    def advance(self, utterances: int, seconds: float) -> None:
        """Count so many more as done."""


@dataclass(slots=True)
class Report:
    """What a run did; ``computed``, ``reused`` and ``failed`` count utterances × features."""

    utterances: int
    hours: float
    computed: int = 0
    reused: int = 0
    failed: int = 0
    seconds: float = 0.0
    padded_steps: int = 0
    real_steps: int = 0
    failures: list[Failure] = field(default_factory=list)

    @property
    def padding_waste(self) -> float:
        """Padded steps ÷ real steps over all forward passes."""
        return self.padded_steps / self.real_steps if self.real_steps else 0.0


def resolve_device(device: str) -> str:
    """Return ``"cpu"`` or ``"cuda…"`` for ``auto``.

    Raises
    ------
    UsageError
        CUDA was asked for and there is none.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            "Device 'cuda' was asked for, but there is none. Use --device cpu or auto."
        )
    return device


def blocks(
    indices: Iterable[int], seconds: Callable[[int], float], block_seconds: float
) -> Iterator[list[int]]:
    """Cut ``indices``, longest first, into blocks whose padded size stays within ``block_seconds``.

    Longest first means that a batch which does not fit in memory shows itself at the start, and
    that time left is estimated from the slow end.
    """
    block: list[int] = []
    longest = 0.0
    for index in sorted(indices, key=seconds, reverse=True):
        if block and longest * (len(block) + 1) > block_seconds:
            yield block
            block = []
        if not block:
            longest = seconds(index)
        block.append(index)
    if block:
        yield block


def run(
    planned: Plan,
    cache: Cache,
    *,
    device: str = "auto",
    batch_seconds: float | None = None,
    workers: int = 4,
    progress: Progress | None = None,
) -> Report:
    """Compute everything a plan misses.

    Parameters
    ----------
    batch_seconds : float, optional
        Padded seconds of input that share a forward pass; see ``BATCH_SECONDS``.
    workers : int, default=4
        Threads that decode and prepare.

    Raises
    ------
    StoreError
        The cache cannot be written to; what was committed before stays.
    """
    started = time.monotonic()
    report = Report(len(planned.sources), planned.hours)
    report.reused = sum(feature.reused for feature in planned.features)
    todo = [feature for feature in planned.features if feature.missing]
    if todo:
        device = resolve_device(device)
        for feature in todo:
            feature.extractor.load(device)
        if progress is not None:
            total = [planned.seconds(i, f.extractor.modality) for f in todo for i in f.missing]
            progress.start(len(total), sum(total))
        _Run(planned, cache, todo, device, batch_seconds, report)(workers, progress)
    report.failures = planned.failures.entries
    report.failed = planned.failures.pairs
    report.seconds = time.monotonic() - started
    return report


Prepared = dict[int, "Tensor | Exception"]
"""One utterance's input for each feature that misses it, by the feature's place in the run."""


def prepare(
    planned: Plan, source: Source, extractors: dict[int, Extractor]
) -> Prepared | Exception:
    """Decode one utterance once and prepare it for each of ``extractors`` (all of one modality)."""
    raw: np.ndarray | str
    try:
        if next(iter(extractors.values())).modality == "text":
            raw = normalise_text(source.text or "")
        else:
            from mer.extract.audio import decode

            assert source.path is not None
            raw = decode(source.path, source.start_s, source.end_s, source.channel)
            planned.check_unchanged(source)  # hours may lie between its hash and now
    except MissingDependencyError:
        raise
    except Exception as error:  # decoders raise what they like at damaged files
        return error
    prepared: Prepared = {}
    for n, extractor in extractors.items():
        try:
            prepared[n] = extractor.prepare(raw)
        except Exception as error:  # one utterance's failure, listed with its reason
            prepared[n] = error
    return prepared


def _create(cache: Cache, extractor: Extractor) -> Store:
    store = cache.open(extractor.spec, create=True)
    assert store is not None
    return store


class _Run:
    """The features of one run that miss anything, and what they share."""

    def __init__(
        self,
        planned: Plan,
        cache: Cache,
        todo: Sequence[FeaturePlan],
        device: str,
        batch_seconds: float | None,
        report: Report,
    ) -> None:
        self.planned = planned
        self.todo = todo
        self.missing = [frozenset(feature.missing) for feature in todo]
        self.runners = [Runner(feature.extractor, device) for feature in todo]
        self.stores = [_create(cache, feature.extractor) for feature in todo]
        kind = device.split(":")[0]
        self.batch_seconds = {
            modality: batch_seconds or BATCH_SECONDS[kind, modality]
            for modality in ("audio", "text")
        }
        self.report = report

    def __call__(self, workers: int, progress: Progress | None) -> None:
        with ExitStack() as stack:
            self.writers = [stack.enter_context(store.writer()) for store in self.stores]
            self.sink = _Sink()
            stack.callback(self.sink.close)  # empty the queue before the writers commit
            pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="mer-decode")
            stack.callback(pool.shutdown, cancel_futures=True)
            for modality in ("audio", "text"):
                self._run_modality(modality, pool, progress)
        self.report.padded_steps = sum(runner.padded_steps for runner in self.runners)
        self.report.real_steps = sum(runner.real_steps for runner in self.runners)

    def _run_modality(
        self, modality: str, pool: ThreadPoolExecutor, progress: Progress | None
    ) -> None:
        wanted: dict[int, list[int]] = {}
        for n, feature in enumerate(self.todo):
            if feature.extractor.modality == modality:
                for index in feature.missing:
                    wanted.setdefault(index, []).append(n)

        def seconds(index: int) -> float:
            return self.planned.seconds(index, modality)

        all_blocks = blocks(wanted, seconds, self.batch_seconds[modality])
        for block, prepared in self._prepared(all_blocks, wanted, pool):
            for n, feature in enumerate(self.todo):
                if feature.extractor.modality == modality:
                    self._run_block(n, block, prepared)
            if progress is not None:
                pairs = [index for index in block for _ in wanted[index]]
                progress.advance(len(pairs), sum(map(seconds, pairs)))

    def _prepared(
        self,
        all_blocks: Iterator[list[int]],
        wanted: dict[int, list[int]],
        pool: ThreadPoolExecutor,
    ) -> Iterator[tuple[list[int], list[Prepared | Exception]]]:
        """Yield blocks with their prepared inputs while the next ones are being decoded."""
        pending: deque[tuple[list[int], list[Future[Prepared | Exception]]]] = deque()
        for block in all_blocks:
            pending.append((block, []))
            for index in block:
                extractors = {n: self.todo[n].extractor for n in wanted[index]}
                source = self.planned.sources[index]
                pending[-1][1].append(pool.submit(prepare, self.planned, source, extractors))
            if len(pending) > BLOCKS_AHEAD:
                ready, futures = pending.popleft()
                yield ready, [future.result() for future in futures]
        for ready, futures in pending:
            yield ready, [future.result() for future in futures]

    def _run_block(
        self, n: int, block: Sequence[int], prepared: Sequence[Prepared | Exception]
    ) -> None:
        """Run feature ``n`` over the part of a block that misses it."""
        feature = self.todo[n]
        rows: list[int] = []
        inputs: list[Tensor] = []
        for index, item in zip(block, prepared, strict=True):
            if index not in self.missing[n]:
                continue
            data = item if isinstance(item, Exception) else item[n]
            if isinstance(data, Exception):
                self._fail(n, index, data, only_here=data is not item)
            else:
                rows.append(index)
                inputs.append(data)
        if not inputs:
            return
        modality = feature.extractor.modality
        steps, index = max((len(data), index) for data, index in zip(inputs, rows, strict=True))
        rate = steps / max(self.planned.seconds(index, modality), 1e-2)
        budget = max(self.batch_seconds[modality] * rate, steps)
        for place, outcome in self.runners[n](inputs, budget):
            index, data = rows[place], inputs[place]
            if isinstance(outcome, Exception):
                self._fail(n, index, outcome, only_here=True)
                continue
            key = self.planned.keys[modality][self.planned.sources[index].id]
            self.sink.put(self.writers[n], key, len(data), outcome)
            self.report.computed += 1
            self.report.reused += len(feature.twins.get(index, ()))

    def _fail(self, n: int, index: int, error: Exception, *, only_here: bool) -> None:
        feature = self.todo[n]
        for i in (index, *feature.twins.get(index, ())):
            name = feature.feature if only_here else None
            self.planned.failures.add(self.planned.sources[i], error, name)


class _Sink:
    """Feeds writers from a queue on its own thread; an error surfaces at the next call.

    The queue holds at most ``WRITES_AHEAD`` utterances and ``BYTES_AHEAD`` bytes (or one utterance
    beyond): all layers of a long recording are gigabytes.
    """

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[PartWriter, bytes, int, Arrays] | None]
        self._queue = queue.Queue(WRITES_AHEAD)
        self._error: BaseException | None = None
        self._waiting_bytes = 0
        self._room = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="mer-writer", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            writer, key, length, arrays = item
            if self._error is None:
                try:
                    writer.add(key, length, arrays)
                except BaseException as error:  # carried to the main thread
                    self._error = error
            with self._room:
                self._waiting_bytes -= _num_bytes(arrays)
                self._room.notify()
            del item, arrays  # not to be kept while waiting for the next one

    def put(self, writer: PartWriter, key: bytes, length: int, arrays: Arrays) -> None:
        """Hand one utterance over; waits while the queue is full."""
        if self._error is not None:
            raise self._error
        num_bytes = _num_bytes(arrays)
        with self._room:
            self._room.wait_for(
                lambda: not self._waiting_bytes or self._waiting_bytes + num_bytes <= BYTES_AHEAD
            )
            self._waiting_bytes += num_bytes
        self._queue.put((writer, key, length, arrays))

    def close(self) -> None:
        """Wait until everything handed over has reached its writer."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error


def _num_bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())


def verify(
    planned: Plan, cache: Cache, count: int, *, device: str = "auto", seed: int = 0
) -> dict[str, float]:
    """Compute ``count`` random stored utterances per feature again, each alone, and compare.

    Returns
    -------
    dict
        Feature to the largest difference, each relative to ``max(1, |stored|)``; storage as float16
        alone explains 5e-4.
    """
    device = resolve_device(device)
    worst: dict[str, float] = {}
    for feature in planned.features:
        extractor, keys = feature.extractor, planned.keys[feature.extractor.modality]
        store = cache.open(extractor.spec)
        here = [source for source in planned.sources if source.id in keys]
        if store is None or not here:
            continue
        stored = np.flatnonzero(store.contains([keys[source.id] for source in here]))
        chosen = np.random.default_rng(seed).permutation(stored)[:count]
        extractor.load(device)
        runner = Runner(extractor, device)
        differences = [0.0]
        for source in (here[i] for i in chosen.tolist()):
            prepared = prepare(planned, source, {0: extractor})
            data = prepared if isinstance(prepared, Exception) else prepared[0]
            outcome = data if isinstance(data, Exception) else next(runner([data], len(data)))[1]
            if isinstance(outcome, Exception):
                raise outcome
            for name, array in outcome.items():
                kept = store.frames(keys[source.id], name).astype(np.float64)
                if kept.shape != array.shape:
                    differences.append(np.inf)
                else:
                    relative = np.abs(array - kept) / np.maximum(1.0, np.abs(kept))
                    differences.append(float(relative.max(initial=0.0)))
        worst[feature.feature] = max(differences)
    return worst
