"""What is wrong with a corpus: counts, files and sound, before anybody trains on it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mer.cache.errors import AudioError, MissingDependencyError
from mer.cache.identity import content_hash
from mer.pipelines import corpora
from mer.pipelines.corpora.corpus import Published
from mer.pipelines.corpora.files import is_lfs_pointer
from mer.pipelines.manifest import Manifest, Utterance

if TYPE_CHECKING:
    from mer.extract.audio import AudioInfo

SILENT_PEAK_DB = -60.0
SHORT_S = 0.1
LONG_S = 30.0
SHOWN = 8  # examples per kind of trouble in the text; the JSON has all
_BLOCK_S = 60.0


@dataclass(frozen=True, slots=True)
class Count:
    """How many utterances there are and should be.

    Parameters
    ----------
    kind : {"total", "label", "speaker"}
        What is counted.
    name : str
        Label or speaker; empty for the total.
    found : int
        In the manifest.
    published : int or None
        By the corpus's authors.
    """

    kind: str
    name: str
    found: int
    published: int | None

    @property
    def differs(self) -> bool:
        """Whether a published count is known and is another."""
        return self.published is not None and self.published != self.found


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Result of ``check``; utterances are named by id throughout.

    Parameters
    ----------
    dataset, root : str
        What was checked.
    utterances : int
        In the manifest.
    hours : float
        Readable audio, segments counted by their own length.
    counts : tuple of Count
        Total, per label, per speaker.
    missing : tuple of str
        The file does not exist.
    lfs_pointers : tuple of str
        The file is a Git-LFS pointer.
    unreadable : tuple of (str, str)
        Any other failure to decode, and its reason.
    duplicates : tuple of tuple of str
        Groups whose recordings are byte for byte the same (and the same segment of it).
    conflicting : tuple of tuple of str
        Those groups among them with different labels.
    silent : tuple of (str, float)
        Peak below ``SILENT_PEAK_DB``, in dB of full scale (-inf becomes -999).
    short, long : tuple of (str, float)
        Below ``SHORT_S``, above ``LONG_S``; in seconds.
    rates, channels : mapping of int to int
        Files per sample rate and per number of channels.
    odd_rates, odd_channels : tuple of (str, int)
        Those that differ from the published format, or from most others.
    notes : tuple of str
        The manifest's own.
    """

    dataset: str
    root: str
    utterances: int
    hours: float
    counts: tuple[Count, ...]
    missing: tuple[str, ...]
    lfs_pointers: tuple[str, ...]
    unreadable: tuple[tuple[str, str], ...]
    duplicates: tuple[tuple[str, ...], ...]
    conflicting: tuple[tuple[str, ...], ...]
    silent: tuple[tuple[str, float], ...]
    short: tuple[tuple[str, float], ...]
    long: tuple[tuple[str, float], ...]
    rates: dict[int, int]
    channels: dict[int, int]
    odd_rates: tuple[tuple[str, int], ...]
    odd_channels: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]

    @property
    def failed(self) -> int:
        """Utterances that no feature can be computed from."""
        return len(self.missing) + len(self.lfs_pointers) + len(self.unreadable)

    @property
    def exit_code(self) -> int:
        """3 where an utterance is missing, a pointer or unreadable, else 0."""
        return 3 if self.failed else 0

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "dataset": self.dataset,
            "root": self.root,
            "utterances": self.utterances,
            "hours": round(self.hours, 4),
            "failed": self.failed,
            "counts": [
                {"kind": c.kind, "name": c.name, "found": c.found, "published": c.published}
                for c in self.counts
            ],
            "missing": list(self.missing),
            "lfs_pointers": list(self.lfs_pointers),
            "unreadable": [{"utterance": u, "reason": reason} for u, reason in self.unreadable],
            "duplicates": [list(group) for group in self.duplicates],
            "conflicting": [list(group) for group in self.conflicting],
            "silent": [{"utterance": u, "peak_db": db} for u, db in self.silent],
            "short": [{"utterance": u, "seconds": s} for u, s in self.short],
            "long": [{"utterance": u, "seconds": s} for u, s in self.long],
            "rates": {str(rate): n for rate, n in self.rates.items()},
            "channels": {str(channels): n for channels, n in self.channels.items()},
            "odd_rates": [{"utterance": u, "rate_hz": rate} for u, rate in self.odd_rates],
            "odd_channels": [{"utterance": u, "channels": n} for u, n in self.odd_channels],
            "limits": {"silent_peak_db": SILENT_PEAK_DB, "short_s": SHORT_S, "long_s": LONG_S},
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        """Return the report for people."""
        lines = [f"{self.dataset}: {self.utterances:,} utterances, {self.hours:.2f} h readable"]
        lines += [f"  note: {note}" for note in self.notes]
        lines.append("")
        lines += _count_lines(self.counts)
        lines.append("")
        lines += _kind("missing files", self.missing)
        lines += _kind("Git-LFS pointers (run `git lfs pull`)", self.lfs_pointers)
        lines += _kind("unreadable", [f"{u}: {reason}" for u, reason in self.unreadable])
        lines += _kind("identical recordings", [" = ".join(g) for g in self.duplicates])
        lines += _kind(
            "identical recordings with different labels", [" = ".join(g) for g in self.conflicting]
        )
        lines += _kind(
            f"silent (peak below {SILENT_PEAK_DB:g} dB)",
            [f"{u} ({db:.0f} dB)" for u, db in self.silent],
        )
        lines += _kind(f"shorter than {SHORT_S:g} s", [f"{u} ({s:.3f} s)" for u, s in self.short])
        lines += _kind(f"longer than {LONG_S:g} s", [f"{u} ({s:.1f} s)" for u, s in self.long])
        lines.append(f"sample rates: {_tally(self.rates, 'Hz')}")
        lines += _kind("  of another rate", [f"{u} ({r} Hz)" for u, r in self.odd_rates], False)
        lines.append(f"channels: {_tally(self.channels, '')}")
        lines += _kind(
            "  of another number", [f"{u} ({n} channels)" for u, n in self.odd_channels], False
        )
        verdict = (
            f"{self.failed:,} utterances cannot be used." if self.failed else "All can be used."
        )
        return "\n".join([*lines, "", verdict])


@dataclass(frozen=True, slots=True)
class _File:
    """What one recording is like."""

    problem: str | None  # "missing", "pointer", or a reason
    info: AudioInfo | None = None
    content: bytes = b""


@dataclass(frozen=True, slots=True)
class _Sound:
    """What one utterance sounds like."""

    problem: str | None
    seconds: float = 0.0
    peak: float = 0.0


def check(
    dataset: str | Manifest,
    root: Path | str | None = None,
    *,
    workers: int = 4,
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Count, open and listen to every utterance of a dataset.

    Parameters
    ----------
    dataset : str or Manifest
        Corpus name, manifest file, or a manifest.
    root : Path or str, optional
        Folder of the corpus.
    workers : int, default=4
        Threads that read and decode.
    progress : callable, optional
        Called with the number of utterances done since the last call.

    Raises
    ------
    UsageError
        The dataset cannot be read at all.
    """
    manifest = dataset if isinstance(dataset, Manifest) else corpora.load(dataset, root)
    published = (
        corpora.corpus(manifest.name).published if manifest.name in corpora.CORPORA else None
    )
    if isinstance(dataset, str) and corpora.is_manifest(dataset):
        published = None  # a file that happens to be called like a corpus
    by_path: dict[Path, list[Utterance]] = defaultdict(list)
    for utterance in manifest.utterances:
        if utterance.path is not None:
            by_path[utterance.path].append(utterance)
    files: dict[Path, _File] = {}
    sounds: dict[str, _Sound] = {}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for path, file, heard in pool.map(_inspect, by_path, by_path.values()):
            files[path] = file
            sounds.update(heard)
            if progress is not None:
                progress(len(heard))
    return _report(manifest, str(root or ""), published, files, sounds)


def _inspect(path: Path, utterances: list[Utterance]) -> tuple[Path, _File, dict[str, _Sound]]:
    file = _open(path)
    heard = {u.id: _listen(u, file) for u in utterances}
    return path, file, heard


def _open(path: Path) -> _File:
    from mer.extract.audio import probe

    try:
        if not path.exists():
            return _File("missing")
        if path.is_file() and is_lfs_pointer(path):
            return _File("pointer")
        return _File(None, probe(path), content_hash(path))
    except OSError as error:
        return _File(f"cannot be read: {error.strerror or error}")
    except (AudioError, MissingDependencyError) as error:
        return _File(_reason(path, error))


def _listen(utterance: Utterance, file: _File) -> _Sound:
    """Decode at the recording's own rate; long ones a minute at a time, to keep memory bounded."""
    from mer.extract.audio import decode

    if file.problem is not None or file.info is None:
        return _Sound(file.problem)
    assert utterance.path is not None
    start = utterance.start_s or 0.0
    end = file.info.duration_s if utterance.end_s is None else utterance.end_s
    blocks: list[tuple[float | None, float | None]] = [(utterance.start_s, utterance.end_s)]
    if end - start > 2 * _BLOCK_S:
        count = int((end - start) // _BLOCK_S)
        edges = [start + i * _BLOCK_S for i in range(count)]
        blocks = [*zip(edges, edges[1:], strict=False), (edges[-1], utterance.end_s)]
    frames, peak = 0, 0.0
    try:
        for a, b in blocks:
            samples = decode(utterance.path, a, b, utterance.channel, file.info.rate_hz)
            frames += len(samples)
            peak = max(peak, float(samples.max()), -float(samples.min()))
    except (AudioError, MissingDependencyError) as error:
        return _Sound(_reason(utterance.path, error))
    return _Sound(None, frames / file.info.rate_hz, peak)


def _report(
    manifest: Manifest,
    root: str,
    published: Published | None,
    files: dict[Path, _File],
    sounds: dict[str, _Sound],
) -> CheckReport:
    with_path = [u for u in manifest.utterances if u.path is not None]
    good = [(u, sounds[u.id]) for u in with_path if sounds[u.id].problem is None]
    groups: dict[tuple[Any, ...], list[Utterance]] = defaultdict(list)
    for u, _ in good:
        assert u.path is not None
        groups[(files[u.path].content, u.start_s, u.end_s, u.channel)].append(u)
    duplicates = [group for group in groups.values() if len(group) > 1]
    first_of = {
        u.path: u.id for u in reversed(with_path)
    }  # a recording goes by its first utterance
    infos = [(first_of[path], file.info) for path, file in files.items() if file.info is not None]
    rates = Counter(info.rate_hz for _, info in infos)
    channels = Counter(info.channels for _, info in infos)
    usual_rate = (published.rate_hz if published else None) or _most(rates)
    usual_channels = (published.channels if published else None) or _most(channels)
    return CheckReport(
        dataset=manifest.name,
        root=root,
        utterances=len(manifest.utterances),
        hours=sum(sound.seconds for _, sound in good) / 3600,
        counts=_counts(manifest.utterances, published),
        missing=tuple(u.id for u in with_path if sounds[u.id].problem == "missing"),
        lfs_pointers=tuple(u.id for u in with_path if sounds[u.id].problem == "pointer"),
        unreadable=tuple(
            (u.id, problem)
            for u in with_path
            if (problem := sounds[u.id].problem) not in (None, "missing", "pointer")
        ),
        duplicates=tuple(tuple(u.id for u in group) for group in duplicates),
        conflicting=tuple(
            tuple(u.id for u in group) for group in duplicates if len({u.label for u in group}) > 1
        ),
        silent=tuple(
            (u.id, round(_decibel(sound.peak), 1))
            for u, sound in good
            if _decibel(sound.peak) < SILENT_PEAK_DB
        ),
        short=tuple((u.id, sound.seconds) for u, sound in good if sound.seconds < SHORT_S),
        long=tuple((u.id, sound.seconds) for u, sound in good if sound.seconds > LONG_S),
        rates=dict(rates.most_common()),
        channels=dict(channels.most_common()),
        odd_rates=tuple((name, i.rate_hz) for name, i in infos if i.rate_hz != usual_rate),
        odd_channels=tuple((name, i.channels) for name, i in infos if i.channels != usual_channels),
        notes=manifest.notes,
    )


def _counts(utterances: Sequence[Utterance], published: Published | None) -> tuple[Count, ...]:
    labels = Counter(u.label for u in utterances if u.label is not None)
    speakers = Counter(u.speaker for u in utterances if u.speaker is not None)
    counts = [Count("total", "", len(utterances), published.total if published else None)]
    known: tuple[tuple[str, Counter[str], Any], ...] = (
        ("label", labels, published.labels if published else {}),
        ("speaker", speakers, published.speakers if published else {}),
    )
    for kind, found, expected in known:
        for name in sorted({*found, *expected}):
            counts.append(
                Count(kind, name, found[name], expected.get(name, 0) if expected else None)
            )
    return tuple(counts)


def _reason(path: Path, error: Exception) -> str:
    return str(error).removeprefix(f"{path}: ")


def _decibel(peak: float) -> float:
    return 20 * math.log10(peak) if peak > 0 else -999.0


def _most(counter: Counter[int]) -> int | None:
    return counter.most_common(1)[0][0] if counter else None


def _count_lines(counts: Iterable[Count]) -> list[str]:
    lines = []
    rows = list(counts)
    for kind in ("total", "label", "speaker"):
        cells = [
            f"{c.name} {c.found:,}".strip() + (f" of {c.published:,}" if c.differs else "")
            for c in rows
            if c.kind == kind
        ]
        if cells:
            known = any(c.kind == kind and c.published is not None for c in rows)
            agree = known and not any(c.kind == kind and c.differs for c in rows)
            end = "  (as published)" if agree else ""
            lines.append(f"per {kind}: ".replace("per total", "total") + ", ".join(cells) + end)
    return lines


def _kind(title: str, items: Sequence[str], always: bool = True) -> list[str]:
    if not items:
        return [f"{title}: none"] if always else []
    more = f" … and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    return [f"{title}: {len(items):,}", *(f"  {item}" for item in items[:SHOWN])] + (
        [f" {more}"] if more else []
    )


def _tally(counts: dict[int, int], unit: str) -> str:
    return ", ".join(f"{value} {unit}".strip() + f" × {n:,}" for value, n in counts.items()) or "-"
