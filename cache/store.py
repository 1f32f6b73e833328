"""One store: all that is kept of one extractor configuration, a Zarr v3 group of immutable parts.

B keys of a request, T frames, D width, N distinct utterances of a store.

>>> store = Cache.from_url("features").open(extractor.spec, create=True)    # doctest: +SKIP
>>> with store.writer() as writer:                                          # doctest: +SKIP
...     writer.add(key, input_length=16000, arrays={"final": frames})
>>> data, lengths = store.batch([key], "final")                             # doctest: +SKIP

The truth is the parts alone: there is no database and no lock. A store object works on the list of
parts it saw last; ``refresh`` looks again, and a writer does so for its own store. Store objects
may be used by several threads, survive ``fork`` and are pickled as their path or URL.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from mer.cache import layout, snapshot
from mer.cache.casting import copy_into, read_dtype
from mer.cache.errors import (
    DamagedStoreError,
    MissingFeatureError,
    StoreError,
    UsageError,
)
from mer.cache.identity import fingerprint
from mer.cache.index import key_array
from mer.cache.listing import Listing
from mer.cache.place import LocalPlace, Place, place_at
from mer.cache.reader import PartGoneError, PartReader
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.writer import PartWriter

if TYPE_CHECKING:
    import dask.array
    import torch
    import xarray

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_SAVE_AFTER = 32  # manifests read: from there on opening takes long enough to keep a snapshot

_TRIES = 10  # while others merge parts all the time
_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _forget_locks() -> None:
    for store in _stores:
        store.forget_lock()


if hasattr(os, "register_at_fork"):  # a thread that holds one does not exist in the child
    os.register_at_fork(after_in_child=_forget_locks)


class Batch(NamedTuple):
    """Utterances padded with zeros at the end.

    Attributes
    ----------
    data : ndarray
        (B, Tmax, D).
    lengths : ndarray
        (B,) int64, the real T.
    """

    data: np.ndarray
    lengths: np.ndarray

    def mask(self) -> np.ndarray:
        """Return where frames are real, (B, Tmax) bool."""
        return np.arange(self.data.shape[1]) < self.lengths[:, None]

    def torch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both as tensors that share the memory."""
        import torch

        return torch.from_numpy(self.data), torch.from_numpy(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartInfo:
    """One part: its id, utterances and size in bytes."""

    id: str
    utterances: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputInfo:
    """One output over all parts: frames stored, width, and the types its parts are stored in."""

    frames: int
    dim: int
    rate_hz: float | None
    kind: str
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What ``mer cache ls`` and ``info`` show; of a damaged store what could be read.

    Parameters
    ----------
    name, path : str
        Folder name and where it lies.
    fingerprint : str or None
        32 hex digits; None where the store's own metadata cannot be read, as for ``identity``,
        ``created``, ``licence``.
    source : dict or None
        Where imported values come from.
    utterances, parts, bytes : int
        Distinct utterances, parts and bytes of the sound parts.
    outputs : dict of str to OutputInfo
        By name, in order.
    damage : tuple of str
        One message per fault found by opening; empty if there is none.
    """

    name: str
    path: str
    fingerprint: str | None = None
    identity: dict[str, Any] | None = None
    created: str | None = None
    licence: str | None = None
    source: dict[str, Any] | None = None
    utterances: int = 0
    parts: int = 0
    bytes: int = 0
    outputs: dict[str, OutputInfo] = field(default_factory=dict)
    damage: tuple[str, ...] = ()


class Store:
    """All that is stored of one extractor configuration.

    Parameters
    ----------
    at : Path, str or Place
        Folder or URL of the store. Nothing is read before it is needed.

    Notes
    -----
    Where an output is asked for, None is the only one there is, else ``"final"``.

    Any method may raise ``DamagedStoreError`` when it meets bytes that are not what was written,
    and ``StoreFormatError`` when the folder is of a newer format or no store.
    """

    def __init__(self, at: Path | str | Place) -> None:
        self.place: Place
        if isinstance(at, str):
            self.place = place_at(at)
        else:
            self.place = LocalPlace(at) if isinstance(at, Path) else at
        self._seen: Listing | None = None
        self._signatures: dict[str, bytes] = {}
        self._kept: snapshot.Snapshot | None = None
        self._saved: frozenset[str] = frozenset()  # parts that the snapshot on disk knows
        self._changes = 0  # commits of our own writers
        self._looked = -1  # how many there were when the list of parts was begun
        self.forget_lock()
        _stores.add(self)

    def forget_lock(self) -> None:
        """Start with a fresh lock: after a fork the old one may be held by a thread left behind."""
        self._refreshing = threading.RLock()  # so that an older listing never replaces a newer one

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.place.url,)

    def __repr__(self) -> str:
        return f"Store({self.place.url!r})"

    @property
    def name(self) -> str:
        """Folder name: slug and 16 hex digits."""
        return self.place.name

    @property
    def url(self) -> str:
        """Path or URL."""
        return self.place.url

    @property
    def path(self) -> Path:
        """Folder of the store; ``UsageError`` if it lies in an object store."""
        if self.place.path is None:
            raise UsageError(f"{self.url} is not a folder. Copy the store first: `mer cache cp`.")
        return self.place.path

    @property
    def fingerprint(self) -> str:
        """32 hex digits of the identity."""
        return str(self.attributes["fingerprint"])

    @cached_property
    def spec(self) -> FeatureSpec:
        """What the store holds, as it was created."""
        mer = self.attributes
        return FeatureSpec(
            slug=mer["slug"],
            identity=mer["identity"],
            outputs=tuple(layout.output_from_json(fields) for fields in mer["outputs"]),
            licence=mer["licence"],
            source=mer.get("source"),
        )

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """The sealed attributes of the root (``FORMAT.md`` section 4)."""
        metadata = f"{self.url}/{layout.METADATA}"
        mer = layout.unseal(self.place.metadata(), metadata)
        try:
            sound = mer["fingerprint"] == fingerprint(mer["identity"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedStoreError(f"{metadata} lacks what a store holds: {error!r}.") from error
        if not sound:
            raise DamagedStoreError(f"{metadata} names another fingerprint than its identity has.")
        return mer

    # -- which parts there are ---------------------------------------------------------------------

    def refresh(self) -> None:
        """Look again which parts there are; only new ones are read.

        Raises
        ------
        DamagedStoreError
            A manifest does not hold, or a file it lists is missing or of another size.
        """
        with self._refreshing:
            changes = (
                self._changes
            )  # before looking: what is committed meanwhile is found next time
            # A part that is gone was merged into one that the list does not have yet.
            for _ in range(_TRIES):
                if self._refresh():
                    break
            self._looked = changes

    def _refresh(self) -> bool:
        """Look once; False if a part has disappeared between listing and reading it."""
        names = self.place.part_names()
        signed = self.place.signatures(names)
        # A place without signatures never changes a part.
        signatures = {
            n: b"" if signed is None else signed[i].tobytes() for i, n in enumerate(names)
        }
        known = {} if self._seen is None else {part.id: part for part in self._seen.parts}
        parts: dict[str, PartReader] = {
            name: known[name]
            for name in names
            if name in known and self._signatures.get(name) == signatures[name]
        }
        if self._seen is not None and list(parts) == names == list(known):
            return True
        if self._seen is None:
            self._kept = self._read_snapshot()
        kept, outputs, store = self._kept, self.spec.outputs, self.fingerprint
        for name in names if kept is not None else ():
            number = None if kept is None or name in parts else kept.number.get(name)
            if kept is None or number is None:
                continue
            if kept.signatures[number].tobytes() == signatures[name]:
                part = parts[name] = self.place.lazy_part(name, outputs, store)
                part.preset(int(kept.utterances[number]), int(kept.num_bytes[number]))
        fresh = [name for name in names if name not in parts]
        read = self.place.read_parts(fresh, outputs, store) if fresh else []
        for name, found in zip(fresh, read, strict=True):
            if isinstance(found, DamagedStoreError):
                raise found
            if found is not None:
                parts[name] = found
        if self._seen is None:
            self._saved = frozenset(parts.keys() - fresh)
        self._seen = Listing([parts[name] for name in names if name in parts], kept)
        self._signatures = signatures
        if len(parts.keys() - self._saved) >= _SAVE_AFTER and len(parts) == len(names):
            self._save_snapshot(self._seen, signed)
        return len(parts) == len(names)

    def _read_snapshot(self) -> snapshot.Snapshot | None:
        path = self.place.index_path()
        if path is None:
            return None
        return snapshot.read(path, self.fingerprint, [o.name for o in self.spec.outputs])

    def _save_snapshot(self, seen: Listing, signed: np.ndarray | None) -> None:
        path = self.place.index_path()
        if path is None or signed is None:
            return
        try:
            columns = seen.columns(signed, [output.name for output in self.spec.outputs])
        except StoreError as error:  # of an output that nobody may ask for
            logger.info("No snapshot of the index is kept: %s", error)
            return
        snapshot.write(path, self.fingerprint, columns)
        self._saved = frozenset(part.id for part in seen.parts)

    @property
    def listing(self) -> Listing:
        """The parts as last seen."""
        if self._looked != self._changes or self._seen is None:
            self.refresh()
        assert self._seen is not None
        return self._seen

    def _mark_changed(self) -> None:
        self._changes += 1

    def _reading(self, read: Callable[[Listing], _Result]) -> _Result:
        """Read; if a part has been merged into another meanwhile, look again and read there."""
        for _ in range(_TRIES):
            try:
                return read(self.listing)
            except PartGoneError:
                self.refresh()
        return read(self.listing)

    def parts(self) -> tuple[PartInfo, ...]:
        """Return the parts in their order."""
        return tuple(
            PartInfo(id=part.id, utterances=part.num_utterances, bytes=part.num_bytes)
            for part in self.listing.parts
        )

    def readers(self) -> tuple[PartReader, ...]:
        """Return the readers of the parts, in their order."""
        return self.listing.parts

    # -- which utterances there are ----------------------------------------------------------------

    def __len__(self) -> int:
        """Return N."""
        return len(self._reading(lambda seen: seen.index))

    def __contains__(self, key: bytes) -> bool:
        return self._reading(lambda seen: seen.index).find_one(key) >= 0

    def contains(self, keys: Iterable[bytes]) -> np.ndarray:
        """Return which keys are stored, (B,) bool."""
        return self._reading(lambda seen: seen.index).find(key_array(list(keys))) >= 0

    def keys(self) -> list[bytes]:
        """Return the N keys in the order in which they are stored."""
        return self._reading(lambda seen: seen.keys_of(seen.rows))

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.keys())

    def num_frames(self, keys: Iterable[bytes], output: str | None = None) -> np.ndarray:
        """Return T of each key, (B,) int64. Raises like ``frames``."""
        name, wanted = self.output(output).name, list(keys)
        return self._reading(lambda seen: seen.spans(name)[1][self._rows(seen, wanted)])

    def input_length(self, keys: Iterable[bytes]) -> np.ndarray:
        """Return the prepared steps of each key, before padding to a minimum, (B,) int64."""
        wanted = list(keys)
        return self._reading(lambda seen: seen.input_length[self._rows(seen, wanted)])

    def all_rows(
        self, output: str | None = None, keys: Iterable[bytes] | None = None
    ) -> tuple[Listing, np.ndarray]:
        """Return what is seen, with all that reading an output needs, and the rows that count.

        Parameters
        ----------
        output : str, optional
            Which output.
        keys : sequence of bytes, optional
            Only these, each once.

        Returns
        -------
        listing : Listing
            The parts as seen.
        rows : ndarray
            Rows of it in storage order, (B,) int64.
        """
        name = self.output(output).name
        wanted = None if keys is None else list(keys)

        def read(seen: Listing) -> tuple[Listing, np.ndarray]:
            _ = seen.spans(name), seen.keys
            return seen, seen.rows if wanted is None else np.unique(self._rows(seen, wanted))

        return self._reading(read)

    def _rows(self, seen: Listing, keys: Sequence[bytes]) -> np.ndarray:
        rows = seen.index.find(key_array(keys))
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            raise self._missing(keys[missing[0]], len(missing), len(rows))
        return rows

    def _missing(self, first: bytes, missing: int, wanted: int) -> MissingFeatureError:
        return MissingFeatureError(
            f"{missing} of {wanted} utterances are not in {self.url} "
            f"(the first has the key {bytes(first).hex()}). "
            "Run `mer extract` for this feature and data set."
        )

    @cached_property
    def _outputs(self) -> dict[str, OutputSpec]:
        return {output.name: output for output in self.spec.outputs}

    def output(self, name: str | None = None) -> OutputSpec:
        """Return an output of the store.

        Raises
        ------
        UnknownNameError
            There is no such output.
        UsageError
            No name is given, there are several outputs and none is called ``"final"``.
        """
        outputs = self._outputs
        if name is not None:
            return outputs[name] if name in outputs else self.spec.output(name)
        if len(outputs) == 1:
            return self.spec.outputs[0]
        if "final" in outputs:
            return outputs["final"]
        raise UsageError(f"{self.name} has the outputs {', '.join(outputs)}; name one.")

    # -- what is stored of them --------------------------------------------------------------------

    def __getitem__(self, key: bytes | tuple[bytes, str]) -> np.ndarray:
        """Return ``frames(key)``, or of ``store[key, output]`` those of an output."""
        return self.frames(*key) if isinstance(key, tuple) else self.frames(key)

    def frames(self, key: bytes, output: str | None = None) -> np.ndarray:
        """Return a copy of an utterance's frames in the type they are stored in, (T, D).

        Raises
        ------
        MissingFeatureError
            The key is not stored.
        UnknownNameError
            There is no such output.
        """
        name = self.output(output).name
        try:
            return self._frames(self.listing, key, name)
        except PartGoneError:
            return self._reading(lambda seen: self._frames(seen, key, name))

    def _frames(self, seen: Listing, key: bytes, output: str) -> np.ndarray:
        row = seen.index.find_one(key)
        if row < 0:
            raise self._missing(key, 1, 1)
        starts, lengths = seen.spans(output)
        start = int(starts[row])
        part = seen.parts[seen.part_of_row[row]]
        stop = start + int(lengths[row])
        if self.place.path is None:
            self.place.prefetch([(part, output, start, stop)])
        return part.frames(output, start, stop)

    def pooled(self, output: str | None = None, keys: Iterable[bytes] | None = None) -> np.ndarray:
        """Return mean and population standard deviation over each utterance's frames.

        Parameters
        ----------
        output : str, optional
            Which output, a sequence of vectors.
        keys : sequence of bytes, optional
            B keys; all of the store in the order of ``keys()`` if not given.

        Returns
        -------
        ndarray
            (B, 2, D) float32; NaN for an utterance without frames.

        Raises
        ------
        ValueError
            The output is no sequence of vectors. Else like ``frames``.
        """
        spec = self.output(output)
        if spec.kind != "frames":
            raise ValueError(f"Output {spec.name!r} is of kind {spec.kind!r}, which is not pooled.")
        wanted = None if keys is None else list(keys)

        def read(seen: Listing) -> np.ndarray:
            rows = seen.rows if wanted is None else self._rows(seen, wanted)
            out = np.empty((len(rows), 2, spec.dim), np.float32)
            part_of, row_in = seen.part_of_row[rows], seen.row_in_part(rows)
            for number in np.unique(part_of):
                mine = part_of == number
                out[mine] = seen.parts[number].pooled(spec.name)[row_in[mine]]
            return out

        return self._reading(read)

    def batch(
        self,
        keys: Iterable[bytes],
        output: str | None = None,
        dtype: DTypeLike | None = None,
        out: np.ndarray | None = None,
    ) -> Batch:
        """Return the frames of several utterances, padded with zeros at the end.

        Parameters
        ----------
        keys : sequence of bytes
            B keys, in the order of the result; one may occur more than once.
        output : str, optional
            Which output.
        dtype : dtype, optional
            Type of the result: floating point for frames (float32 if not given), any that holds
            the codes for codes (the declared one).
        out : ndarray, optional
            One-dimensional array of ``dtype`` to write into, with at least B · Tmax · D elements.
            Reusing one spares the system from clearing fresh memory for every batch.

        Returns
        -------
        data : ndarray
            (B, Tmax, D); a view of ``out`` where that was given.
        lengths : ndarray
            (B,) int64, the real T.

        Raises
        ------
        MissingFeatureError
            A key is not stored.
        UnknownNameError
            There is no such output.
        ValueError
            ``dtype`` cannot hold the values, or ``out`` does not fit.
        """
        spec = self.output(output)
        kind = read_dtype(spec) if dtype is None else np.dtype(dtype)
        wanted = list(keys)
        return self._reading(lambda seen: self._batch(seen, wanted, spec, kind, out))

    def _batch(
        self,
        seen: Listing,
        keys: Sequence[bytes],
        spec: OutputSpec,
        kind: np.dtype,
        out: np.ndarray | None,
    ) -> Batch:
        output = spec.name
        rows = self._rows(seen, keys)
        starts, all_lengths = seen.spans(output)
        lengths = all_lengths[rows]
        shape = (len(rows), int(lengths.max(initial=0)), spec.dim)
        # Fresh memory is zero already, without anybody touching it.
        data = np.zeros(shape, kind) if out is None else _shaped(out, shape, kind)
        numbers, begins = seen.part_of_row[rows].tolist(), starts[rows].tolist()
        counts = lengths.tolist()
        spans = zip(numbers, begins, counts, strict=True)
        self.place.prefetch([(seen.parts[n], output, b, b + c) for n, b, c in spans])
        for i, (number, start, length) in enumerate(zip(numbers, begins, counts, strict=True)):
            part = seen.parts[number]
            stored = part.dtype(output)
            if stored == kind or (stored.kind == "f" and kind.itemsize >= stored.itemsize):
                _check_castable(stored, kind, output)
                part.copy_frames(output, start, start + length, data[i, :length])
            else:
                data[i, :length] = _narrow(part.frames(output, start, start + length), kind, output)
            if out is not None:
                data[i, length:].view(np.uint8).fill(0)  # as bytes: twice as fast as numbers
        return Batch(data, lengths)

    # -- many of them ------------------------------------------------------------------------------

    def scan(
        self,
        output: str | None = None,
        keys: Iterable[bytes] | None = None,
        block_bytes: int = 16 << 20,
    ) -> Iterator[tuple[bytes, np.ndarray]]:
        """Yield every utterance once, in the order in which they are stored, read ahead in blocks.

        Parameters
        ----------
        output : str, optional
            Which output.
        keys : sequence of bytes, optional
            Only these (each once, whatever their order).
        block_bytes : int, default=16 MiB
            Read at a time; two blocks are in flight.

        Yields
        ------
        key : bytes
            Of the utterance.
        frames : ndarray
            (T, D) in the stored type.
        """
        from mer.cache.streaming import scan

        return scan(self, self.output(output), keys, block_bytes)

    def epoch(
        self,
        batch_size: int,
        output: str | None = None,
        keys: Iterable[bytes] | None = None,
        *,
        seed: int = 0,
        dtype: DTypeLike | None = None,
        block_bytes: int = 16 << 20,
        buffer_blocks: int = 8,
    ) -> Iterator[tuple[list[bytes], Batch]]:
        """Yield every utterance once in random batches, reading large blocks ahead.

        Blocks are visited in random order and utterances shuffled within ``buffer_blocks`` of them:
        nearly as random as a full shuffle, and the only one that a cold disk or an object store
        keeps up with.

        Parameters
        ----------
        batch_size : int
            B; the last batch may be smaller.
        output : str, optional
            Which output.
        keys : sequence of bytes, optional
            Only these, each once.
        seed : int
            Another order for another epoch.
        dtype : dtype
            As for ``batch``.
        block_bytes : int, default=16 MiB
            Stored bytes that are read together.
        buffer_blocks : int, default=8
            Blocks that are shuffled together and kept in memory.

        Yields
        ------
        keys : list of bytes
            B keys.
        batch : Batch
            Their frames.
        """
        from mer.cache.streaming import epoch

        spec = self.output(output)
        return epoch(
            self,
            spec,
            keys,
            batch_size=batch_size,
            seed=seed,
            dtype=read_dtype(spec) if dtype is None else np.dtype(dtype),
            block_bytes=block_bytes,
            buffer_blocks=buffer_blocks,
        )

    def dask(self, output: str | None = None, dtype: DTypeLike | None = None) -> dask.array.Array:
        """Return all frames of an output behind each other, (F, D), one chunk a part.

        Each utterance is in it once, in the order of ``keys()``. ``dtype`` is as for ``batch``:
        sums over float16 would overflow.
        """
        from mer.cache.arrays import flat_frames

        return flat_frames(self, self.output(output), dtype)

    def xarray(self, output: str | None = None, dtype: DTypeLike | None = None) -> xarray.DataArray:
        """Return ``dask`` with names: dimensions frame and feature, and each frame's utterance.

        Raises
        ------
        MissingDependencyError
            xarray is not installed.
        """
        from mer.cache.arrays import labelled_frames

        return labelled_frames(self, self.output(output), dtype)

    # -- writing and telling -----------------------------------------------------------------------

    def writer(self, part_bytes: int = 64 << 20, part_seconds: float = 30.0) -> PartWriter:
        """Return a context manager that adds utterances; see ``PartWriter``."""
        index = self._reading(lambda seen: seen.index)
        return PartWriter(
            self.place,
            self.spec,
            self.fingerprint,
            known=lambda key: index.find_one(key) >= 0,
            committed=self._mark_changed,
            part_bytes=part_bytes,
            part_seconds=part_seconds,
        )

    def info(self) -> StoreInfo:
        """Return what the store holds; damage is reported in the result, not raised."""
        try:
            spec, mer = self.spec, self.attributes
        except (StoreError, KeyError, TypeError) as error:
            return StoreInfo(name=self.name, path=self.url, damage=(str(error),))
        parts: list[PartReader] = []
        damage: list[str] = []
        try:
            names = self.place.part_names()
        except StoreError as error:
            names, damage = [], [str(error)]
        for part in self.place.read_parts(names, spec.outputs, self.fingerprint):
            try:
                if isinstance(part, DamagedStoreError):
                    raise part
                if part is not None:
                    part.keys()
                    parts.append(part)
            except PartGoneError:
                continue
            except StoreError as error:
                damage.append(str(error))
        seen = Listing(parts)
        outputs = {}
        for output in spec.outputs:
            try:
                frames = int(seen.spans(output.name)[1][seen.rows].sum())
            except StoreError as error:
                damage.append(str(error))
                frames = sum(part.num_frames(output.name) for part in parts)
            outputs[output.name] = OutputInfo(
                frames=frames,
                dim=output.dim,
                rate_hz=output.rate_hz,
                kind=output.kind,
                dtypes=tuple(sorted({part.dtype(output.name).name for part in parts})),
            )
        return StoreInfo(
            name=self.name,
            path=self.url,
            fingerprint=self.fingerprint,
            identity=dict(spec.identity),
            created=mer["created"],
            licence=spec.licence,
            source=None if spec.source is None else dict(spec.source),
            utterances=len(seen.index),
            parts=len(parts),
            bytes=sum(part.num_bytes for part in parts),
            outputs=outputs,
            damage=tuple(damage),
        )


def _shaped(out: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape))
    if out.ndim != 1 or out.dtype != dtype or out.size < size or not out.flags.c_contiguous:
        raise ValueError(
            f"out is {out.dtype} of shape {out.shape}, "
            f"expected contiguous {dtype} of at least {size} elements."
        )
    return out[:size].reshape(shape)


def _check_castable(stored: np.dtype, wanted: np.dtype, output: str) -> None:
    if stored.kind == "f" and wanted.kind == "f":
        return
    if not np.can_cast(stored, wanted, "safe"):
        raise ValueError(
            f"Output {output!r} is stored as {stored}; {wanted} cannot hold its values."
        )


def _narrow(frames: np.ndarray, dtype: np.dtype, output: str) -> np.ndarray:
    """Return frames in a type of less range, or refuse."""
    _check_castable(frames.dtype, dtype, output)
    narrowed = np.empty(frames.shape, dtype)
    copy_into(narrowed, frames)
    if np.isinf(narrowed).any():  # stored values are finite
        raise ValueError(f"Output {output!r} holds values beyond {dtype}; ask for float32.")
    return narrowed
