"""The embedding cache: stores of features, each a Zarr v3 group of immutable parts.

B keys of a request, T frames, D width, N distinct utterances of a store.

>>> cache = Cache.from_url("features")                         # doctest: +SKIP
>>> store = cache.open(extractor.spec, create=True)            # doctest: +SKIP
>>> with store.writer() as writer:                             # doctest: +SKIP
...     writer.add(key, input_length=16000, arrays={"final": frames})
>>> data, lengths = store.batch([key], "final")                # doctest: +SKIP

The truth is the parts alone: there is no database, no lock and no index on disk. A store object
works on the list of parts it saw last; ``refresh`` looks again, and a writer does so for its own
store. Store objects may be used by several threads, survive ``fork`` and are pickled as their path.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from numpy.typing import DTypeLike

from mer.cache import layout
from mer.cache.errors import (
    DamagedStoreError,
    MissingFeatureError,
    StoreError,
    StoreFormatError,
    UsageError,
)
from mer.cache.identity import FINGERPRINT_IN_NAME, KEY_BYTES, fingerprint, store_name
from mer.cache.index import KeyIndex, key_array
from mer.cache.reader import PartReader, part_folders
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.staging import publish, staged, write_file, writing
from mer.cache.writer import PartWriter

logger = logging.getLogger(__name__)

_refreshing = threading.Lock()  # so that an older listing never replaces a newer one


def _forget_lock() -> None:
    global _refreshing
    _refreshing = threading.Lock()


if hasattr(os, "register_at_fork"):  # a thread that holds it does not exist in the child
    os.register_at_fork(after_in_child=_forget_lock)

_STORE_NAME = re.compile(rf".+-[0-9a-f]{{{FINGERPRINT_IN_NAME}}}")
_OUTPUT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_RESERVED = {layout.KEY, layout.INPUT_LENGTH, layout.METADATA}


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
    utterances: int = 0
    parts: int = 0
    bytes: int = 0
    outputs: dict[str, OutputInfo] = field(default_factory=dict)
    damage: tuple[str, ...] = ()


class Cache:
    """A folder of stores.

    Parameters
    ----------
    root : Path
        Need not exist; it is created with the first store.

    Raises
    ------
    StoreFormatError
        The path, or a folder above it, is a file.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().absolute()
        for folder in (self.root, *self.root.parents):
            if os.path.isdir(folder):
                break
            if os.path.exists(folder):
                raise StoreFormatError(
                    f"{folder} is a file; a cache is a folder. Choose another --cache."
                )

    def __repr__(self) -> str:
        return f"Cache({str(self.root)!r})"

    @classmethod
    def from_url(cls, url: str | None = None) -> Cache:
        """Return the cache at a path or ``file://`` URL.

        ``None`` is ``$MER_CACHE``, else the platform's cache directory.

        Raises
        ------
        UsageError
            A URL of another kind.
        StoreFormatError
            The path is a file.
        """
        if url is None:
            url = os.environ.get("MER_CACHE") or None
        if url is None:
            import platformdirs

            return cls(Path(platformdirs.user_cache_dir("mer", appauthor=False)))
        if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", url):
            if not url.strip():
                raise UsageError("The cache path is empty; expected a folder or file:// URL.")
            return cls(Path(url))
        parts = urlsplit(url)
        if parts.scheme.lower() != "file" or parts.netloc not in ("", "localhost"):
            raise UsageError(
                f"Cache {url!r} is on {parts.scheme}://, which this release cannot read; "
                "expected a folder or a file:/// URL."
            )
        return cls(Path(url2pathname(parts.path)))

    def stores(self) -> list[Store]:
        """Return all stores by name, unopened: ``info`` of a damaged one says what is wrong."""
        try:
            with os.scandir(self.root) as entries:
                names = sorted(
                    e.name for e in entries if _STORE_NAME.fullmatch(e.name) and e.is_dir()
                )
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"Cannot read {self.root}: {error.strerror}.") from error
        return [Store(self.root / name) for name in names]

    def open(self, spec: FeatureSpec, create: bool = False) -> Store | None:
        """Return the store of a feature, its parts listed and their manifests verified.

        Parameters
        ----------
        spec : FeatureSpec
            The store is found by the fingerprint of its identity, whatever slug it was created
            under.
        create : bool, default=False
            Make an empty store if there is none.

        Returns
        -------
        Store or None
            None if there is no store and ``create`` is false.

        Raises
        ------
        DamagedStoreError, StoreFormatError
            There is one that cannot be trusted, or read.
        StorageFullError, StoreError
            It cannot be created.
        """
        path = self._find(spec)
        if path is None:
            if not create:
                return None
            path = self.root / store_name(spec)
            _create(path, spec)
        store = Store(path)
        _check_same(store, spec)
        store.refresh()
        return store

    def _find(self, spec: FeatureSpec) -> Path | None:
        path = self.root / store_name(spec)
        if path.is_dir():
            return path
        ending = "-" + fingerprint(spec.identity)[:FINGERPRINT_IN_NAME]
        try:
            names = sorted(name for name in os.listdir(self.root) if name.endswith(ending))
        except OSError:
            return None
        return self.root / names[0] if names else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _create(path: Path, spec: FeatureSpec) -> None:
    """Make an empty store; someone else having made it at the same time is as good."""
    names = [output.name for output in spec.outputs]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"Outputs of {spec.slug!r} are {names}; expected distinct names.")
    for output in spec.outputs:
        _check_output(output)
    mer = {
        "format": layout.FORMAT_VERSION,
        "slug": spec.slug,
        "identity": spec.identity,
        "fingerprint": fingerprint(spec.identity),
        "outputs": [layout.output_to_json(output) for output in spec.outputs],
        "licence": spec.licence,
        "created": _now(),
    }
    with writing(path), staged(path) as folder:
        (folder / layout.PARTS).mkdir(parents=True)
        parts = layout.to_bytes(layout.group_document())
        write_file(folder / layout.PARTS / layout.METADATA, [parts])
        write_file(folder / layout.METADATA, [layout.to_bytes(layout.group_document(mer))])
        publish(folder, path)


def _check_output(output: OutputSpec) -> None:
    if not _OUTPUT_NAME.fullmatch(output.name) or output.name in _RESERVED:
        raise ValueError(f"{output.name!r} cannot be the name of an output.")
    allowed = layout.CODE_DTYPES if output.kind == "codes" else layout.FLOAT_DTYPES
    if output.dtype not in allowed:
        raise ValueError(
            f"Output {output.name!r} of kind {output.kind!r} has the type {output.dtype!r}, "
            f"expected one of {', '.join(allowed)}."
        )
    if output.dim < 1:
        raise ValueError(f"Output {output.name!r} has the width {output.dim}.")


def _check_same(store: Store, spec: FeatureSpec) -> None:
    """Refuse a store of another identity, or one whose extractor changed without saying so."""
    if store.fingerprint != fingerprint(spec.identity):
        raise StoreFormatError(f"{store.path} belongs to another feature: {store.spec.identity}.")
    for ours, theirs in zip(spec.outputs, store.spec.outputs, strict=False):
        if _shape(ours) != _shape(theirs):
            raise StoreFormatError(
                f"{store.path} holds {theirs}, the extractor now yields {ours}. "
                "An extractor whose outputs change must raise its version."
            )
    if len(spec.outputs) != len(store.spec.outputs):
        raise StoreFormatError(
            f"{store.path} holds {len(store.spec.outputs)} outputs, the extractor now yields "
            f"{len(spec.outputs)}. An extractor whose outputs change must raise its version."
        )


def _shape(output: OutputSpec) -> tuple[Any, ...]:
    return output.name, output.dim, output.rate_hz, output.dtype, output.kind, output.num_codes


class _Snapshot:
    """The parts seen at one time and what follows from them; never changed, only replaced."""

    def __init__(self, parts: Sequence[PartReader]) -> None:
        self.parts = tuple(parts)
        counts = [part.num_utterances for part in self.parts]
        self.part_of_row = np.repeat(np.arange(len(counts)), counts)
        self._first_row = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._spans: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @cached_property
    def index(self) -> KeyIndex:
        keys = [part.keys() for part in self.parts]
        return KeyIndex(np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *keys]))

    @cached_property
    def input_length(self) -> np.ndarray:
        lengths = [part.input_length() for part in self.parts]
        return np.concatenate([np.empty(0, np.int64), *lengths])

    def spans(self, output: str) -> tuple[np.ndarray, np.ndarray]:
        """Return for every row where its frames start in its part and how many they are."""
        spans = self._spans.get(output)
        if spans is None:
            none = np.empty(0, np.int64)
            offsets = [part.offsets(output) for part in self.parts]
            starts = np.concatenate([none, *(o[:-1] for o in offsets)])
            lengths = np.concatenate([none, *(np.diff(o) for o in offsets)])
            spans = self._spans[output] = (starts, lengths)
        return spans

    def row_in_part(self, rows: np.ndarray) -> np.ndarray:
        """Return rows counted within their part."""
        return rows - self._first_row[self.part_of_row[rows]]


class Store:
    """All that is stored of one extractor configuration.

    Parameters
    ----------
    path : Path
        Folder of the store. Nothing is read before it is needed.

    Notes
    -----
    Any method may raise ``DamagedStoreError`` when it meets bytes that are not what was written,
    and ``StoreFormatError`` when the folder is of a newer format or no store.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self._seen: _Snapshot | None = None
        self._stale = True

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return Store, (self.path,)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    @property
    def name(self) -> str:
        """Folder name: slug and 16 hex digits."""
        return self.path.name

    @property
    def fingerprint(self) -> str:
        """32 hex digits of the identity."""
        return str(self._attributes["fingerprint"])

    @cached_property
    def spec(self) -> FeatureSpec:
        """What the store holds, as it was created."""
        mer = self._attributes
        return FeatureSpec(
            slug=mer["slug"],
            identity=mer["identity"],
            outputs=tuple(layout.output_from_json(fields) for fields in mer["outputs"]),
            licence=mer["licence"],
        )

    @cached_property
    def _attributes(self) -> dict[str, Any]:
        metadata = self.path / layout.METADATA
        try:
            data = metadata.read_bytes()
        except FileNotFoundError as error:
            raise DamagedStoreError(f"{metadata} is missing: the store has no metadata.") from error
        except OSError as error:
            raise StoreError(f"Cannot read {metadata}: {error.strerror}.") from error
        mer = layout.unseal(data, str(metadata))
        if mer["fingerprint"] != fingerprint(mer["identity"]):
            raise DamagedStoreError(f"{metadata} names another fingerprint than its identity has.")
        return mer

    def refresh(self) -> None:
        """Look again which parts there are; only new ones are read.

        Raises
        ------
        DamagedStoreError
            A manifest does not hold, or a file it lists is missing or of another size.
        """
        with _refreshing:
            self._stale = False  # before looking: what is committed meanwhile is found next time
            try:
                known = {} if self._seen is None else {part.id: part for part in self._seen.parts}
                parts: list[PartReader] = []
                for folder in self._part_folders():
                    part = known.get(folder.name) or self._read_part(folder)
                    if part is not None:
                        parts.append(part)
            except BaseException:
                self._stale = True
                raise
            if self._seen is None or [part.id for part in parts] != list(known):
                self._seen = _Snapshot(parts)

    def _part_folders(self) -> list[Path]:
        parts = self.path / layout.PARTS
        try:
            return list(part_folders(parts))
        except FileNotFoundError as error:
            raise DamagedStoreError(
                f"{parts} is missing: the store has no parts folder."
            ) from error
        except OSError as error:
            raise StoreError(f"Cannot read {parts}: {error.strerror}.") from error

    def _read_part(self, folder: Path) -> PartReader | None:
        try:
            return PartReader(folder, self.spec.outputs)
        except DamagedStoreError:
            if not folder.exists():  # merged into another and removed since it was listed
                return None
            raise
        except OSError as error:
            raise StoreError(f"Cannot read {folder}: {error.strerror}.") from error

    @property
    def _snapshot(self) -> _Snapshot:
        if self._stale or self._seen is None:
            self.refresh()
        assert self._seen is not None
        return self._seen

    def _mark_stale(self) -> None:
        self._stale = True

    def __len__(self) -> int:
        """Return N."""
        return len(self._snapshot.index)

    def __contains__(self, key: bytes) -> bool:
        return bool(self.contains([key])[0])

    def contains(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return which keys are stored, (B,) bool."""
        return self._snapshot.index.find(key_array(keys)) >= 0

    def parts(self) -> tuple[PartInfo, ...]:
        """Return the parts in their order."""
        return tuple(
            PartInfo(id=part.id, utterances=part.num_utterances, bytes=part.num_bytes)
            for part in self._snapshot.parts
        )

    def frames(self, key: bytes, output: str) -> np.ndarray:
        """Return a copy of an utterance's frames in the type they are stored in, (T, D).

        Raises
        ------
        MissingFeatureError
            The key is not stored.
        UnknownNameError
            There is no such output.
        """
        self.spec.output(output)
        seen = self._snapshot
        row = int(self._rows(seen, [key])[0])
        starts, lengths = seen.spans(output)
        start = int(starts[row])
        part = seen.parts[seen.part_of_row[row]]
        return part.frames(output, start, start + int(lengths[row]))

    def num_frames(self, keys: Sequence[bytes], output: str) -> np.ndarray:
        """Return T of each key, (B,) int64. Raises like ``frames``."""
        self.spec.output(output)
        seen = self._snapshot
        return seen.spans(output)[1][self._rows(seen, keys)]

    def input_length(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the prepared steps of each key, before padding to a minimum, (B,) int64."""
        seen = self._snapshot
        return seen.input_length[self._rows(seen, keys)]

    def pooled(self, keys: Sequence[bytes], output: str) -> np.ndarray:
        """Return mean and population standard deviation over each key's frames, (B, 2, D) float32.

        NaN for an utterance without frames. Raises like ``frames``, and ``ValueError`` for an
        output that is no sequence of vectors.
        """
        spec = self.spec.output(output)
        if spec.kind != "frames":
            raise ValueError(f"Output {output!r} is of kind {spec.kind!r}, which is not pooled.")
        seen = self._snapshot
        rows = self._rows(seen, keys)
        out = np.empty((len(rows), 2, spec.dim), np.float32)
        part_of, row_in = seen.part_of_row[rows], seen.row_in_part(rows)
        for number in np.unique(part_of):
            mine = part_of == number
            out[mine] = seen.parts[number].pooled(output)[row_in[mine]]
        return out

    def batch(
        self,
        keys: Sequence[bytes],
        output: str,
        dtype: DTypeLike = "float32",
        out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the frames of several utterances, padded with zeros at the end.

        Parameters
        ----------
        keys : sequence of bytes
            B keys, in the order of the result; one may occur more than once.
        output : str
            Which output.
        dtype : dtype, default="float32"
            Type of the result: floating point for frames, any that holds the codes for codes.
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
        spec = self.spec.output(output)
        seen = self._snapshot
        rows = self._rows(seen, keys)
        starts, all_lengths = seen.spans(output)
        lengths = all_lengths[rows]
        shape = (len(rows), int(lengths.max(initial=0)), spec.dim)
        kind = np.dtype(dtype)
        data = np.zeros(shape, kind) if out is None else _shaped(out, shape, kind)
        parts = seen.part_of_row[rows].tolist()
        spans = zip(parts, starts[rows].tolist(), lengths.tolist(), strict=True)
        for i, (number, start, length) in enumerate(spans):
            part = seen.parts[number]
            stored = part.dtype(output)
            if stored == kind or (stored.kind == "f" and kind.itemsize >= stored.itemsize):
                _check_castable(stored, kind, output)
                part.copy_frames(output, start, start + length, data[i, :length])
            else:
                data[i, :length] = _narrow(part.frames(output, start, start + length), kind, output)
            if out is not None:
                data[i, length:] = 0
        return data, lengths

    def _rows(self, seen: _Snapshot, keys: Sequence[bytes]) -> np.ndarray:
        rows = seen.index.find(key_array(keys))
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            raise MissingFeatureError(
                f"{len(missing)} of {len(rows)} utterances are not in {self.path} "
                f"(the first has the key {bytes(keys[missing[0]]).hex()}). "
                "Run `mer extract` for this feature and data set."
            )
        return rows

    def writer(self, part_bytes: int = 64 << 20, part_seconds: float = 30.0) -> PartWriter:
        """Return a context manager that adds utterances; see ``PartWriter``."""
        seen = self._snapshot
        return PartWriter(
            self.path,
            self.spec,
            known=lambda key: bool(seen.index.find(key_array([key]))[0] >= 0),
            committed=self._mark_stale,
            part_bytes=part_bytes,
            part_seconds=part_seconds,
        )

    def info(self) -> StoreInfo:
        """Return what the store holds; damage is reported in the result, not raised."""
        try:
            spec, mer = self.spec, self._attributes
        except (StoreError, KeyError, TypeError) as error:
            return StoreInfo(name=self.name, path=str(self.path), damage=(str(error),))
        parts: list[PartReader] = []
        damage: list[str] = []
        try:
            folders = self._part_folders()
        except StoreError as error:
            folders, damage = [], [str(error)]
        for folder in folders:
            try:
                part = self._read_part(folder)
                if part is not None:
                    part.keys()
                    parts.append(part)
            except StoreError as error:
                damage.append(str(error))
        seen = _Snapshot(parts)
        outputs = {}
        for output in spec.outputs:
            try:
                frames = int(seen.spans(output.name)[1][seen.index.rows].sum())
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
            path=str(self.path),
            fingerprint=self.fingerprint,
            identity=dict(spec.identity),
            created=mer["created"],
            licence=spec.licence,
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
    try:
        with np.errstate(over="raise"):
            return frames.astype(dtype)
    except FloatingPointError as error:
        raise ValueError(
            f"Output {output!r} holds values beyond {dtype}; ask for float32."
        ) from error
