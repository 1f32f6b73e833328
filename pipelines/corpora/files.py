"""Finding a corpus's files, wherever a mirror or an archive tool has put them."""

from __future__ import annotations

import csv
import filecmp
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mer.cache.errors import ManifestError

AUDIO_SUFFIXES = (
    ".wav",
    ".flac",
    ".ogg",
    ".opus",
    ".mp3",
    ".m4a",
    ".mp4",
    ".aac",
    ".aif",
    ".aiff",
    ".au",
    ".mkv",
    ".avi",
    ".webm",
)
_POINTER = b"version https://git-lfs.github.com/spec/"


def checked_root(root: Path | str, corpus: str, layout: str) -> Path:
    """Return ``root`` as an absolute path.

    Raises
    ------
    ManifestError
        It is not a folder.
    """
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ManifestError(
            f"Root {root} of corpus {corpus!r} {what}. Expected a folder with {layout}."
        )
    return root


def nothing_found(root: Path, corpus: str, layout: str) -> ManifestError:
    """Return the error of a root in which no file of the corpus lies."""
    return ManifestError(
        f"No file of corpus {corpus!r} below {root}. Expected {layout}. "
        "Pass the folder that holds them as --root."
    )


def walk(root: Path) -> list[Path]:
    """Return all files below ``root`` in a stable order.

    Links are followed, each folder once. Hidden files and folders, and what macOS archives leave
    behind (``._name``, ``__MACOSX``), are skipped.
    """
    files: list[Path] = []
    seen = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        keep = []
        for name in sorted(subfolders):
            if name.startswith(".") or name == "__MACOSX":
                continue
            path = os.path.join(folder, name)
            if os.path.islink(path):
                real = os.path.realpath(path)
                if real in seen or any(s.startswith(real + os.sep) for s in seen):
                    continue
                seen.add(real)
            keep.append(name)
        subfolders[:] = keep
        files.extend(Path(folder, name) for name in sorted(names) if not name.startswith("."))
    return files


@dataclass(frozen=True, slots=True)
class Found:
    """Recordings whose names follow a corpus's pattern.

    Parameters
    ----------
    matches : list of (Path, re.Match)
        One per name, sorted by name.
    notes : tuple of str
        Copies that were left out, and audio files with other names.
    """

    matches: list[tuple[Path, re.Match[str]]]
    notes: tuple[str, ...]


def find(
    files: Iterable[Path], root: Path, pattern: re.Pattern[str], suffixes: Sequence[str] = (".wav",)
) -> Found:
    """Select the files whose stems match ``pattern``, each name once.

    Mirrors often hold a recording twice, in a nested copy of the corpus or in a second format. The
    first of ``suffixes`` wins, then the shallowest path, then alphabetical order; copies of one
    format are compared byte by byte, and a name that stands for different recordings is noted.
    """
    named: dict[str, list[tuple[int, int, str, Path, re.Match[str]]]] = {}
    others: list[Path] = []
    for path in files:
        stem, suffix = os.path.splitext(path.name)
        suffix = suffix.lower()
        match = pattern.match(stem)
        if match is None or suffix not in suffixes:
            if match is None and suffix in AUDIO_SUFFIXES:
                others.append(path)
            continue
        rank = (suffixes.index(suffix), len(path.parts), str(path), path, match)
        named.setdefault(stem, []).append(rank)
    matches = []
    same: list[str] = []
    different: list[str] = []
    for stem in sorted(named):
        kept, *copies = sorted(named[stem], key=lambda rank: rank[:3])
        matches.append((kept[3], kept[4]))
        for copy in copies:
            if copy[0] == kept[0]:
                (same if _equal(kept[3], copy[3]) else different).append(_below(copy[3], root))
    notes = []
    if same:
        notes.append(f"{len(same):,} identical copies of recordings left out, e.g. {same[0]}.")
    if different:
        notes.append(
            f"{len(different):,} files left out that bear the name of another recording but differ "
            f"in content: {_some(different)}."
        )
    if others:
        notes.append(
            f"{len(others):,} audio files with names of another pattern left out, "
            f"e.g. {_below(others[0], root)}."
        )
    return Found(matches, tuple(notes))


def locate(files: Iterable[Path], root: Path, name: str) -> Path | None:
    """Return the shallowest file called ``name``, below ``root`` or just above it."""
    found = [path for path in files if path.name == name]
    if found:
        return min(found, key=lambda path: (len(path.parts), str(path)))
    above = root.parent / name
    return above if above.is_file() else None


def read_rows(path: Path, delimiter: str = ",") -> Iterator[dict[str, str]]:
    """Yield the rows of a table that a corpus ships, blanks around cells removed.

    Raises
    ------
    ManifestError
        The table cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if delimiter == "\t":  # quotes in transcripts are quotes
                reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                reader = csv.reader(file, delimiter=delimiter)
            header = [name.strip() for name in next(reader, [])]
            for row in reader:
                yield dict(zip(header, map(str.strip, row), strict=False))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: the table cannot be read: {error}.") from error


def is_lfs_pointer(path: Path) -> bool:
    """Tell whether ``path`` is a Git-LFS pointer: a few lines of text posing as the recording."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _equal(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b) or filecmp.cmp(a, b, shallow=False)
    except OSError:
        return False


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _some(items: list[str], limit: int = 5) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
