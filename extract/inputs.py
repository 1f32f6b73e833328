"""From sources to keys: what an utterance's sound and words hash to, reading nothing twice.

The memo maps a recording's path, size and times to its content hash and header. It lies in the
cache folder and is disposable: losing it costs one pass of hashing, never a wrong answer. The time
of the last change of status is among them because tools that unpack or copy set the modification
time to whatever they like, and clips of one length have one size.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from mer.cache.errors import AudioError, MissingDependencyError, TextError
from mer.cache.identity import audio_key, content_hash, normalise_text, text_key
from mer.extract.contract import Source

logger = logging.getLogger(__name__)

MEMO_NAME = "inputs-memo.json"
MEMO_VERSION = 2
# A file changed within this many nanoseconds of being hashed may change again without its time
# moving: not remembered.
RACY_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Failure:
    """One utterance that could not be used: its id, why, and the feature if only it failed."""

    utterance: str
    reason: str
    feature: str | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """A file's content hash (16 bytes) and what its header says."""

    content: bytes
    duration_s: float
    rate_hz: int
    channels: int


FileState = tuple[int, int, int]
"""Size and times of modification and change of status, in ns: what tells that a file changed."""


@dataclass(slots=True)
class Resolved:
    """Keys of a set of sources.

    Parameters
    ----------
    audio_keys, text_keys : dict
        Utterance id to 16-byte key, for those that have sound or words.
    durations_s : dict
        Utterance id to seconds of sound.
    states : dict
        Path of a recording, as written, to its state before it was read.
    failures : list of Failure
        Utterances whose recording or transcript cannot be used, each once.
    """

    audio_keys: dict[str, bytes] = field(default_factory=dict)
    text_keys: dict[str, bytes] = field(default_factory=dict)
    durations_s: dict[str, float] = field(default_factory=dict)
    states: dict[str, FileState] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)


class Memo:
    """Recordings by absolute path, size, and times of modification and change of status."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / MEMO_NAME
        self._files = self._read()
        self._changed = False

    def _read(self) -> dict[str, list[Any]]:
        try:
            stored = json.loads(self.path.read_bytes())
            return dict(stored["files"]) if stored.get("version") == MEMO_VERSION else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            logger.info("the input memo %s is unreadable and is made anew", self.path)
            return {}

    def get(self, path: str, state: FileState) -> Recording | None:
        """Return what is known of ``path`` if it did not change since."""
        row = self._files.get(os.path.abspath(path))
        if row is None or tuple(row[:3]) != state:
            return None
        return Recording(bytes.fromhex(row[3]), *row[4:])

    def put(self, path: str, state: FileState, recording: Recording) -> None:
        """Remember ``recording`` unless the file is too fresh to tell a later change."""
        if time.time_ns() - state[1] < RACY_NS:
            return
        r = recording
        row = [*state, r.content.hex(), r.duration_s, r.rate_hz, r.channels]
        self._files[os.path.abspath(path)] = row
        self._changed = True

    def save(self) -> None:
        """Write what was learnt, merged over what others wrote; a read-only cache is no error."""
        if not self._changed:
            return
        temporary = self.path.with_name(f"{MEMO_NAME}.{uuid4().hex}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            merged = {**self._read(), **self._files}
            temporary.write_text(json.dumps({"version": MEMO_VERSION, "files": merged}))
            temporary.replace(self.path)
        except OSError as error:
            logger.info("the input memo %s was not saved: %s", self.path, error)
            temporary.unlink(missing_ok=True)
        self._changed = False


def _read_recording(path: str) -> Recording:
    from mer.extract.audio import probe

    info = probe(Path(path))
    return Recording(content_hash(Path(path)), info.duration_s, info.rate_hz, info.channels)


def _state(path: str) -> FileState:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        raise AudioError(
            f"{path}: no such file. Check the manifest's path or the corpus root."
        ) from None
    except OSError as error:
        raise AudioError(
            f"{path}: cannot be read ({error.strerror}). Check its permissions."
        ) from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def read_recordings(
    paths: Iterable[str],
    memo: Memo,
    *,
    workers: int = 4,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Recording | AudioError], dict[str, FileState]]:
    """Return content hash and header of every path, from the memo where the file did not change.

    An unreadable recording yields its ``AudioError`` as value: the others are not affected. The
    second result is the state of each file that is there, taken before it was read.
    """
    found: dict[str, Recording | AudioError] = {}
    states: dict[str, FileState] = {}
    fresh: list[str] = []
    for path in paths:
        try:
            state = states[path] = _state(path)
        except AudioError as error:
            found[path] = error
            continue
        known = memo.get(path, state)
        if known is None:
            fresh.append(path)
        else:
            found[path] = known

    def learn(path: str) -> Recording | AudioError:
        try:
            return _read_recording(path)
        except AudioError as error:
            return error
        except OSError as error:
            return AudioError(f"{path}: cannot be read ({error.strerror or error}).")
        except MissingDependencyError:
            raise
        except Exception as error:  # decoders raise what they like at damaged files
            return AudioError(f"{path}: cannot be read ({type(error).__name__}: {error}).")

    if fresh:
        with ThreadPoolExecutor(max_workers=workers) as pool:
            for path, result in zip(fresh, pool.map(learn, fresh), strict=True):
                found[path] = result
                if isinstance(result, Recording):
                    memo.put(path, states[path], result)
                if progress is not None:
                    progress(1)
    return found, states


def check_unchanged(source: Source, state: FileState, key: bytes) -> None:
    """Refuse a recording that is not any more what its key was computed from.

    Only the state is looked at where that did not change; else the file is hashed again.

    Parameters
    ----------
    state : tuple
        From ``Resolved.states``.
    key : bytes
        The source's audio key.

    Raises
    ------
    AudioError
        Its content changed, or it is gone.
    """
    path = str(source.path)
    if _state(path) == state:
        return
    content = content_hash(path)
    if audio_key(content, source.start_s, source.end_s, source.channel) != key:
        raise AudioError(
            f"{path}: changed while it was waiting to be extracted; nothing was stored of it. "
            "Run the same command again."
        )


def resolve(
    sources: Sequence[Source],
    cache_root: Path,
    *,
    audio: bool = True,
    text: bool = True,
    workers: int = 4,
    progress: Callable[[int], None] | None = None,
) -> Resolved:
    """Compute the keys of all sources.

    Parameters
    ----------
    sources : sequence of Source
        Utterances, ids unique.
    cache_root : Path
        Folder of the cache; the memo lies there.
    audio, text : bool
        Which keys are wanted. A source without sound (or words) is a failure only where that key
        is wanted and it has a path; a missing transcript is left out of ``text_keys`` and reported
        by whoever needs it.
    progress : callable, optional
        Called with 1 for every recording that had to be read.
    """
    resolved = Resolved()
    if audio:
        memo = Memo(cache_root)
        paths = dict.fromkeys(str(s.path) for s in sources if s.path is not None)
        try:
            recordings, resolved.states = read_recordings(
                paths, memo, workers=workers, progress=progress
            )
        finally:  # an interruption keeps what was hashed
            memo.save()
        for source in sources:
            if source.path is None:
                continue
            recording = recordings[str(source.path)]
            if isinstance(recording, AudioError):
                resolved.failures.append(Failure(source.id, str(recording)))
                continue
            try:
                key = audio_key(recording.content, source.start_s, source.end_s, source.channel)
            except ValueError as error:  # bounds or a channel that no recording has
                resolved.failures.append(Failure(source.id, f"{source.path}: {error}"))
                continue
            resolved.audio_keys[source.id] = key
            end_s = recording.duration_s if source.end_s is None else source.end_s
            resolved.durations_s[source.id] = max(0.0, end_s - (source.start_s or 0.0))
    if text:
        for source in sources:
            if source.text is not None and normalise_text(source.text):
                with suppress(UnicodeEncodeError):
                    resolved.text_keys[source.id] = text_key(source.text)
    return resolved


def no_text(source: Source) -> TextError:
    """Return the error for an utterance whose transcript is missing, empty or not Unicode."""
    if source.text is not None and normalise_text(source.text):
        return TextError(
            f"the transcript of utterance {source.id!r} holds half a character: "
            f"{source.text[:40]!a}. Export it again."
        )
    hint = "Add a 'text' column or leave text features out."
    return TextError(f"utterance {source.id!r} has no transcript. {hint}")


def no_audio(source: Source) -> AudioError:
    """Return the error for an utterance without a recording."""
    hint = "Add a 'path' column or leave audio features out."
    return AudioError(f"utterance {source.id!r} has no recording. {hint}")
