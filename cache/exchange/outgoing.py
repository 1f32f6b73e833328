"""What every export shares: what is exported in which order, where it came from, how it appears.

N exported utterances, F frames of all of them, T frames of one, D width.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mer.cache import layout
from mer.cache.errors import UsageError
from mer.cache.spec import OutputSpec
from mer.cache.staging import staged, sweep, writing

if TYPE_CHECKING:
    from mer.cache.store import Store

EXPORT_VERSION = 1
PROVENANCE = "provenance.json"

Ids = Mapping[bytes, str | Sequence[str]]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written.

    Parameters
    ----------
    format : str
        Name of the layout.
    paths : tuple of Path
        Files and folders that are new.
    utterances : int
        Written; one that has two ids counts twice.
    frames : dict of str to int
        Per output.
    bytes : int
        Size of what was written.
    missing : int
        Utterances asked for by ``ids`` that the store does not hold.
    notes : tuple of str
        What a reader should know, e.g. that half floats were widened.
    """

    format: str
    paths: tuple[Path, ...]
    utterances: int
    frames: dict[str, int]
    bytes: int
    missing: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One utterance on its way out: ``arrays`` hold (T, D) per output in the stored type."""

    id: str
    key: bytes
    input_length: int
    arrays: Mapping[str, np.ndarray]


@dataclass(slots=True)
class Outgoing:
    """The utterances of a store that are exported, in the order in which they are stored.

    Parameters
    ----------
    store : Store
        Source.
    outputs : tuple of OutputSpec
        Those exported.
    keys, ids : list
        Of the N utterances; a key that has two ids occurs twice, next to each other.
    progress : callable, optional
        Called with the number of utterances just written.
    notes : list of str
        Collected for the report.
    left_out : int
        Utterances that a layout has no place for.
    """

    store: Store
    outputs: tuple[OutputSpec, ...]
    keys: list[bytes]
    ids: list[str]
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list)
    left_out: int = 0

    def __len__(self) -> int:
        """Return N."""
        return len(self.keys)

    def num_frames(self, output: str) -> np.ndarray:
        """Return T of every utterance, (N,) int64."""
        return np.asarray(self.store.num_frames(self.keys, output))

    def input_length(self) -> np.ndarray:
        """Return the prepared steps of every utterance, (N,) int64."""
        return np.asarray(self.store.input_length(self.keys))

    def dtype(self, output: str) -> np.dtype:
        """Return the type that holds every part's values: float32 as soon as one part needs it."""
        return max(self._dtypes(output), key=lambda kind: kind.itemsize)

    def one_type(self, output: str) -> np.dtype:
        """Return the same for layouts that have one type for all; says so where it widens."""
        if len(self._dtypes(output)) > 1:
            note = (
                f"Output {output!r} is stored as float16 and, where that would overflow, as "
                "float32; here all of it is float32, value for value."
            )
            if note not in self.notes:
                self.notes.append(note)
        return self.dtype(output)

    def _dtypes(self, output: str) -> set[np.dtype]:
        kinds = {part.dtype(output) for part in self.store.readers()}
        return kinds or {layout.little(self.store.spec.output(output).dtype)}

    def scan(self, output: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the place of each utterance and its frames (T, D) in the stored type."""
        place = 0
        for key, frames in self.store.scan(output, list(dict.fromkeys(self.keys))):
            while place < len(self.keys) and self.keys[place] == key:
                yield place, frames
                place += 1
        assert place == len(self.keys)

    def rows(self, lengths: bool = True) -> Iterator[Row]:
        """Yield every utterance with all outputs; reports progress."""
        input_length = self.input_length()
        names = [output.name for output in self.outputs]
        for together in zip(*(self.scan(name) for name in names), strict=True):
            place = together[0][0]
            arrays = {name: frames for name, (_, frames) in zip(names, together, strict=True)}
            yield Row(self.ids[place], self.keys[place], int(input_length[place]), arrays)
            self.advance()

    def advance(self, utterances: int = 1) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(utterances)

    def provenance(self) -> dict[str, Any]:
        """Return where the features come from, as JSON types: goes into every export."""
        from mer import __version__

        spec = self.store.spec
        return {
            "mer_export": EXPORT_VERSION,
            "mer_version": __version__,
            "store": self.store.name,
            "fingerprint": self.store.fingerprint,
            "slug": spec.slug,
            "identity": dict(spec.identity),
            "outputs": [
                {**layout.output_to_json(output), "stored": self.dtype(output.name).name}
                for output in self.outputs
            ],
            "licence": spec.licence,
            "source": None if spec.source is None else dict(spec.source),
            "utterances": len(self),
        }

    @property
    def provenance_json(self) -> str:
        """The same as text."""
        return json.dumps(self.provenance(), sort_keys=True, ensure_ascii=True, allow_nan=False)

    def frames(self) -> dict[str, int]:
        """Return F per output."""
        return {output.name: int(self.num_frames(output.name).sum()) for output in self.outputs}


def select(
    store: Store,
    ids: Ids | None = None,
    outputs: Sequence[str] | None = None,
    keys: Sequence[bytes] | None = None,
    progress: Progress | None = None,
) -> tuple[Outgoing, int]:
    """Return what is exported, and how many utterances of ``ids`` the store lacks.

    Raises
    ------
    UsageError
        Nothing is left to export, or two utterances have the same id.
    UnknownNameError
        There is no such output.
    MissingFeatureError
        One of ``keys`` is not stored.
    """
    chosen = store.spec.outputs
    if outputs is not None:
        chosen = tuple(store.spec.output(name) for name in dict.fromkeys(outputs))
    missing = 0
    if keys is not None:
        store.input_length(keys)  # refuses a key that is not stored
        wanted = set(keys)
    elif ids is not None:
        wanted = set(ids)
        missing = int((~store.contains(list(ids))).sum()) if ids else 0
    else:
        wanted = None
    in_order = [key for key in store if wanted is None or key in wanted]
    all_keys: list[bytes] = []
    all_ids: list[str] = []
    for key in in_order:
        names: str | Sequence[str] = key.hex() if ids is None else ids.get(key, key.hex())
        for name in (names,) if isinstance(names, str) else names:
            all_keys.append(key)
            all_ids.append(name)
    if not all_keys:
        raise UsageError(
            f"Store {store.name} holds none of the utterances asked for: nothing to export."
        )
    if len(set(all_ids)) < len(all_ids):
        seen: set[str] = set()
        twice = next(name for name in all_ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise UsageError(f"Two utterances have the id {twice!r}; an export needs distinct ids.")
    return Outgoing(store, chosen, all_keys, all_ids, progress), missing


# -- appearing whole or not at all -----------------------------------------------------------------


@contextmanager
def appearing(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to; it takes its place when it is whole.

    What is written there, a file or a folder, is synced and renamed on leaving, and removed on an
    exception. Leftovers of processes that were killed are swept first.

    Raises
    ------
    UsageError
        ``target`` exists and ``overwrite`` is false.
    StorageFullError, StoreError
        The file system refuses.
    """
    check_free(target, overwrite)
    sweep(target)
    with writing(target), staged(target) as temporary:
        yield temporary
        check_free(target, overwrite)
        _sync_all(temporary)
        if target.is_dir() and not target.is_symlink():
            aside = temporary.with_name("replaced")
            os.rename(target, aside)
            try:
                os.rename(temporary, target)
            except BaseException:
                os.rename(aside, target)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        elif temporary.is_dir():
            target.unlink(missing_ok=True)
            os.rename(temporary, target)
        else:
            os.replace(temporary, target)
        _sync(target.parent)


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists, unless it may be replaced: a file, or a folder of ours.

    Raises
    ------
    UsageError
        It may not.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise UsageError(
            f"{target} exists already. Choose another name, or replace it with --overwrite "
            "(overwrite=True in Python)."
        )
    if target.is_dir() and not (target / PROVENANCE).is_file():
        raise UsageError(
            f"{target} is a folder without {PROVENANCE}, so no export made it: it is not "
            "overwritten. Choose another name."
        )


def _sync_all(path: Path) -> None:
    if path.is_dir():
        for parent, _, names in os.walk(path):
            for name in [*names, ""]:
                _sync(os.path.join(parent, name))
    else:
        _sync(path)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of(paths: Sequence[Path]) -> int:
    """Return the bytes of files and of folders with all that is in them."""
    total = 0
    for path in paths:
        if path.is_dir():
            total += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        else:
            total += path.stat().st_size
    return total
