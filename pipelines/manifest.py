"""Manifests: the utterances of a corpus, their labels and where their sound lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """One labelled stretch of one speaker.

    Parameters
    ----------
    id : str
        Unique within the manifest.
    path : Path, optional
        Absolute path of the recording.
    start_s, end_s : float, optional
        Segment of the recording in seconds.
    channel : int, optional
        Channel to take, from 0.
    text : str, optional
        Transcript.
    speaker, gender, session, dialogue : str, optional
        Who and where; protocols split by them. Gender is ``"female"``, ``"male"`` or ``"other"``.
    label : str, optional
        Canonical label name (``angry``, ``happy`` …).
    labels : mapping of str to str
        Other targets by name (``{"voice": "sad", "intensity": "strong"}``).
    votes : mapping of str to float
        Raters per canonical label, where the corpus has them.
    split : str, optional
        Official split: ``train``, ``validation`` or ``test``.
    """

    id: str
    path: Path | None = None
    start_s: float | None = None
    end_s: float | None = None
    channel: int | None = None
    text: str | None = None
    speaker: str | None = None
    gender: str | None = None
    session: str | None = None
    dialogue: str | None = None
    label: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    votes: Mapping[str, float] = field(default_factory=dict)
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The utterances of one corpus, ids unique, in a stable order.

    Parameters
    ----------
    name : str
        Corpus name, or the stem of the manifest file.
    utterances : tuple of Utterance
        All of them.
    notes : tuple of str
        What a reader should know: counts that differ from the published ones, entries skipped and why.
    """

    name: str
    utterances: tuple[Utterance, ...]
    notes: tuple[str, ...] = ()
