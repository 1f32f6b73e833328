"""Collecting utterances and writing them as immutable parts, the writing on a thread of its own.

U utterances of a part, F frames, T frames of one utterance, D width.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from mer.cache import layout
from mer.cache.errors import StoreError
from mer.cache.identity import KEY_BYTES
from mer.cache.intake import FLOAT16_MAX, Buffers, Column, Intake, peak_of
from mer.cache.part import PartFolder
from mer.cache.place import Place
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.staging import writing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Utterance:
    input_length: int
    stops: tuple[int, ...]  # per output: frames of the part up to and with this utterance
    pooled: tuple[np.ndarray | None, ...]  # per output: (2, D) float32, if it is pooled
    wide: Mapping[int, np.ndarray]  # by output: (T, D) float32 where float16 cannot hold it
    num_bytes: int  # of the part up to and with this utterance


class _Part:
    """Utterances of one part. Adding to the dictionary is what adds one: no step can be halved."""

    def __init__(self, outputs: Sequence[OutputSpec], buffers: Buffers) -> None:
        self.columns = [Column(output, buffers) for output in outputs]
        self.utterances: dict[bytes, _Utterance] = {}
        self.since = 0.0
        self._nothing = _Utterance(0, (0,) * len(outputs), (), {}, 0)

    @property
    def last(self) -> _Utterance:
        """What was added last."""
        return next(reversed(self.utterances.values()), self._nothing)

    def release(self) -> None:
        """Forget everything; the memory may be used by another part."""
        self.utterances = {}
        for column in self.columns:
            column.release()


class _Flight:
    """A part on its way into the store, on a thread of its own.

    The thread is no daemon: a process that ends without leaving the writer still finishes it.
    """

    def __init__(self, part: _Part, publish: Callable[[_Part], None]) -> None:
        self.part = part
        self.error: BaseException | None = None
        self.landed = threading.Event()
        self._publish = publish
        self._taken = threading.Lock()

    def start(self) -> None:
        """Start once, however often it is called."""
        if self._taken.locked():
            return
        try:
            threading.Thread(target=self._run, name="mer-part").start()
        except RuntimeError:  # no more threads to be had
            self._run()

    def _run(self) -> None:
        if not self._taken.acquire(blocking=False):
            return
        try:
            self._publish(self.part)
        except BaseException as error:
            self.error = error
        finally:
            self.landed.set()


class PartWriter:
    """Adds utterances to a store; a context manager. Threads that share it wait for each other.

    A full part is written by a thread in the background while the next one fills, so memory is
    bounded by two parts and the largest utterance. An error there is raised by the next call. After
    an error of the file system nothing more is accepted, and what was not committed is dropped.

    Leaving the context commits what was added, on an exception and on Ctrl-C too.

    Parameters
    ----------
    place : Place
        Where the store lies.
    spec : FeatureSpec
        What it holds.
    fingerprint : str
        Its fingerprint, 32 hex digits.
    known : callable
        Whether a key is in the store already: those are skipped.
    committed : callable
        Called after each new part, by the thread that wrote it.
    part_bytes : int, default=64 MiB
        A part is full once its arrays take this many bytes …
    part_seconds : float, default=30
        … or this long after its first utterance, as seen by the next ``add``.
    """

    def __init__(
        self,
        place: Place,
        spec: FeatureSpec,
        fingerprint: str,
        known: Callable[[bytes], bool],
        committed: Callable[[], None],
        part_bytes: int = 64 << 20,
        part_seconds: float = 30.0,
    ) -> None:
        self._place = place
        self._spec = spec
        self._fingerprint = fingerprint
        self._known = known
        self._committed = committed
        self._part_bytes = part_bytes
        self._part_seconds = part_seconds
        self._names = {output.name for output in spec.outputs}
        self._buffers = Buffers(2 * part_bytes)
        self._intake = Intake()
        self._added: set[bytes] = set()  # in parts handed over
        self._filling = self._new_part()
        self._flight: _Flight | None = None
        self._failed = False
        # A second Ctrl-C may leave the context while another thread is still adding.
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        self._place.sweep()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._failed:
            self.commit()

    def add(self, key: bytes, input_length: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Add one utterance; one that is stored or was added before is skipped.

        Parameters
        ----------
        key : bytes
            16 bytes.
        input_length : int
            Real steps of the prepared input, before any padding to a minimum length.
        arrays : mapping of str to ndarray
            Every output of the store: (T, D) floats, or integers within the range of the codes.
            They are copied. float16 is taken as it is, wider floats are rounded to it; of values
            beyond 65504 the part becomes float32.

        Raises
        ------
        ValueError
            An output is missing, unknown, of a wrong shape or type, out of range, NaN or infinite.
            Nothing is added.
        StorageFullError, StoreError
            An earlier part could not be written.
        """
        with self._lock:
            self._add(key, input_length, arrays, {}, stored=False)

    def add_stored(
        self,
        key: bytes,
        input_length: int,
        arrays: Mapping[str, np.ndarray],
        pooled: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Add one utterance as a store holds it; every bit is kept.

        Parameters
        ----------
        key, input_length
            As for ``add``.
        arrays : mapping of str to ndarray
            Every output: (T, D) in its declared type. float32 may be given for float16; the part
            then becomes float32.
        pooled : mapping of str to ndarray, optional
            (2, D) float32 for outputs of kind ``frames``; computed where it is not given.

        Raises
        ------
        ValueError, StorageFullError, StoreError
            Like ``add``.
        """
        with self._lock:
            self._add(key, input_length, arrays, pooled or {}, stored=True)

    def commit(self) -> None:
        """Make what was added visible; it is durable when this returns.

        Raises
        ------
        StorageFullError
            No space left; the unfinished part is removed, earlier ones are intact.
        StoreError
            Any other refusal of the file system, now or before.
        """
        with self._lock:
            self._refuse_after_failure()
            self._hand_over()
            self._land()

    def _add(
        self,
        key: bytes,
        input_length: int,
        arrays: Mapping[str, np.ndarray],
        pooled: Mapping[str, np.ndarray],
        *,
        stored: bool,
    ) -> None:
        self._refuse_after_failure()
        self._settle()
        if self._flight is not None and self._flight.landed.is_set():
            self._land()
        if len(key) != KEY_BYTES:
            raise ValueError(f"A key has {len(key)} bytes, expected {KEY_BYTES}.")
        if input_length < 0:
            raise ValueError(f"input_length={input_length} is negative.")
        if arrays.keys() != self._names:
            raise ValueError(
                f"Outputs {sorted(arrays)} were given, "
                f"{self._spec.slug!r} has {sorted(self._names)}."
            )
        part = self._filling
        if key in part.utterances or key in self._added or self._known(key):
            return
        if not part.utterances:
            part.since = time.monotonic()
        last = part.last
        stops: list[int] = []
        moments: list[np.ndarray | None] = []
        wide: dict[int, np.ndarray] = {}
        num_bytes = last.num_bytes
        for i, (output, column, start) in enumerate(
            zip(self._spec.outputs, part.columns, last.stops, strict=True)
        ):
            array = np.asarray(arrays[output.name])
            _check_shape(array, output)
            given = _given_pooled(pooled, output)
            take = self._take_stored if stored else self._take
            of_wide, of_pooled = take(array, column, start, given)
            if of_wide is not None:
                wide[i] = of_wide
            moments.append(of_pooled)
            stops.append(start + len(array))
            item = 4 if of_wide is not None else column.dtype.itemsize
            num_bytes += array.size * item + (0 if of_pooled is None else of_pooled.nbytes)
        part.utterances[bytes(key)] = _Utterance(
            int(input_length), tuple(stops), tuple(moments), wide, num_bytes
        )
        waited = time.monotonic() - part.since
        if num_bytes >= self._part_bytes or waited >= self._part_seconds:
            self._hand_over()

    def _take(
        self, array: np.ndarray, column: Column, start: int, pooled: np.ndarray | None
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Put frames into a column; return them in float32 if they need it, and pooled."""
        output = column.output
        if output.dtype in layout.FLOAT_DTYPES:
            if array.dtype.kind != "f":
                raise ValueError(
                    f"Output {output.name!r} has the type {array.dtype}, expected floating point."
                )
            pool = output.kind == "frames" and pooled is None
            wide, computed = self._intake.take(array, column, start, pool=pool)
            return wide, computed if pool else pooled
        _check_codes(array, output)
        column.put(array, start)
        return None, None

    def _take_stored(
        self, array: np.ndarray, column: Column, start: int, pooled: np.ndarray | None
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        output = column.output
        is_wide = array.dtype == np.float32 and output.dtype == "float16"
        if array.dtype != np.dtype(output.dtype) and not is_wide:
            raise ValueError(
                f"Output {output.name!r} has the type {array.dtype}, expected {output.dtype}."
            )
        wide, pooled = self._take(array, column, start, pooled)
        if is_wide and wide is None:
            wide = np.array(array, np.float32, order="C")
        return wide, pooled

    def _refuse_after_failure(self) -> None:
        if self._failed:
            raise StoreError(f"Writing to {self._place.url} failed before; open a new writer.")

    def _new_part(self) -> _Part:
        return _Part(self._spec.outputs, self._buffers)

    def _hand_over(self) -> None:
        """Give the filled part to the background, once the one before has landed."""
        self._land()
        if self._filling.utterances:
            self._flight = _Flight(self._filling, self._publish)
            self._settle()

    def _settle(self) -> None:
        """Finish handing over; Ctrl-C may have come between any two steps of it."""
        flight = self._flight
        if flight is None:
            return
        if flight.part is self._filling:
            self._added.update(flight.part.utterances)
            self._filling = self._new_part()
        flight.start()

    def _land(self) -> None:
        """Wait for the part in the background, if any, and raise its error."""
        self._settle()
        flight = self._flight
        if flight is None:
            return
        flight.landed.wait()
        if flight.error is not None:
            self._failed = True
            self._filling = self._new_part()
        self._flight = None
        if flight.error is not None:
            raise flight.error

    def _publish(self, part: _Part) -> None:
        with writing(self._place.url), self._place.staging() as folder:
            files = PartFolder(folder)
            outputs = {
                output.name: _write_output(files, output, i, part, self._place.name)
                for i, output in enumerate(self._spec.outputs)
            }
            _write_rows(files, part)
            name = files.manifest(
                self._fingerprint, len(part.utterances), outputs, layout.content_part_id
            )
            if not self._place.publish(folder, name):
                logger.info("Part %s of %s exists already.", name, self._place.name)
        self._committed()
        part.release()


def _check_shape(array: np.ndarray, output: OutputSpec) -> None:
    where = f"Output {output.name!r}"
    if array.ndim != 2 or array.shape[1] != output.dim:
        raise ValueError(f"{where} has the shape {array.shape}, expected (T, {output.dim}).")
    if output.kind == "pooled" and len(array) != 1:
        raise ValueError(f"{where} has {len(array)} rows; a pooled output has one.")


def _check_codes(array: np.ndarray, output: OutputSpec) -> None:
    where = f"Output {output.name!r}"
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where} has the type {array.dtype}, expected integers.")
    limit = int(np.iinfo(output.dtype).max)
    if output.num_codes is not None:
        limit = min(limit, output.num_codes - 1)
    if array.size and (int(array.min()) < 0 or int(array.max()) > limit):
        raise ValueError(
            f"{where} holds codes from {array.min()} to {array.max()}, expected 0 to {limit}."
        )


def _given_pooled(pooled: Mapping[str, np.ndarray], output: OutputSpec) -> np.ndarray | None:
    if output.kind != "frames" or output.name not in pooled:
        return None
    values = np.array(pooled[output.name], order="C")
    if values.shape != (2, output.dim) or values.dtype != np.float32:
        raise ValueError(
            f"Pooled values of output {output.name!r} are {values.dtype} of shape {values.shape}, "
            f"expected float32 of (2, {output.dim})."
        )
    return values


def _write_rows(files: PartFolder, part: _Part) -> None:
    keys = np.frombuffer(b"".join(part.utterances), np.uint8)
    files.array(layout.KEY, keys.reshape(-1, KEY_BYTES), "uint8")
    lengths = np.array([u.input_length for u in part.utterances.values()], np.int64)
    files.array(layout.INPUT_LENGTH, lengths, "int64")


def _write_output(
    files: PartFolder, output: OutputSpec, number: int, part: _Part, store: str
) -> dict[str, Any]:
    """Write the arrays of one output and return what the manifest says of it."""
    column, utterances = part.columns[number], list(part.utterances.values())
    stops = [u.stops[number] for u in utterances]
    num_frames = stops[-1]
    rows = max(1, min(column.rows, num_frames))
    dtype, chunks = output.dtype, column.chunks(num_frames)
    wide = [
        (start, u.wide[number])
        for start, u in zip([0, *stops], utterances, strict=False)
        if number in u.wide
    ]
    if wide:
        dtype, chunks = "float32", column.wide_chunks(num_frames, wide)
        peak = max(peak_of(frames, output) for _, frames in wide)
        if peak > FLOAT16_MAX:
            logger.warning(
                "Output %r of %s reaches %.4g, beyond float16; this part holds it as float32.",
                output.name,
                store,
                peak,
            )
    name, shape = output.name, (num_frames, output.dim)
    files.group(name)
    crcs = files.shard(f"{name}/{layout.FRAMES}", shape, dtype, rows, chunks)
    files.array(f"{name}/{layout.OFFSETS}", np.array([0, *stops]), "int64")
    if output.kind == "frames":
        pooled = [u.pooled[number] for u in utterances]
        files.array(f"{name}/{layout.POOLED}", np.stack(cast(Any, pooled)), "float32")
    return {
        "frames": num_frames,
        "dtype": dtype,
        "chunk_frames": rows,
        "crc32c": layout.crc_text(crcs),
    }
