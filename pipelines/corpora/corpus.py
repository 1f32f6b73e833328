"""What is known about a corpus before its files are seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mer.pipelines.manifest import Manifest, Utterance


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Counts that the authors of a corpus state.

    Parameters
    ----------
    total : int
        Utterances.
    labels, speakers : mapping of str to int
        Utterances per canonical label and per speaker; empty where not stated.
    rate_hz, channels : int, optional
        Format of the recordings.
    """

    total: int
    labels: Mapping[str, int] = field(default_factory=dict)
    speakers: Mapping[str, int] = field(default_factory=dict)
    rate_hz: int | None = None
    channels: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A corpus that mer reads as its authors distribute it.

    Parameters
    ----------
    name : str
        DATASET on the command line.
    title : str
        One line for people.
    licence : str
        Terms of the recordings.
    layout : str
        Files expected below the root.
    read : callable
        Turns a root folder into a manifest.
    published : Published, optional
        Counts to check against; None where the corpus is the user's own.
    scheme, protocol : str
        What a recipe takes when it names none.
    """

    name: str
    title: str
    licence: str
    layout: str
    read: Callable[[Path], Manifest]
    published: Published | None = None
    scheme: str = "as-given"
    protocol: str = "loso"


def differences(utterances: Iterable[Utterance], published: Published) -> tuple[str, ...]:
    """Return where the counts of ``utterances`` differ from the published ones, in words."""
    rows = list(utterances)
    notes = []
    if len(rows) != published.total:
        notes.append(f"{len(rows):,} utterances, {published.total:,} published.")
    labels = Counter(u.label for u in rows if u.label is not None)
    if wrong := [
        f"{name} {labels[name]:,} of {count:,}"
        for name, count in published.labels.items()
        if labels[name] != count
    ]:
        notes.append(f"Per label: {', '.join(wrong)}.")
    if strange := sorted(set(labels).difference(published.labels)) if published.labels else []:
        notes.append(f"Labels that are not published: {', '.join(strange)}.")
    speakers = Counter(u.speaker for u in rows if u.speaker is not None)
    absent = [name for name in published.speakers if name not in speakers]
    if absent:
        notes.append(
            f"Speakers: {len(speakers)} of {len(published.speakers)}; absent: {_some(absent)}."
        )
    if short := [
        f"{name} {speakers[name]:,} of {count:,}"
        for name, count in published.speakers.items()
        if name in speakers and speakers[name] != count
    ]:
        notes.append(f"Per speaker: {_some(short)}.")
    return tuple(notes)


def _some(items: list[str], limit: int = 24) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
