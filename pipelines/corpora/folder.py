"""Any tree with one folder per class: ``ROOT/angry/…/a.wav`` or ``ROOT/train/angry/…/a.wav``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mer.pipelines.corpora.corpus import Corpus
from mer.pipelines.corpora.files import AUDIO_SUFFIXES, checked_root, nothing_found, walk
from mer.pipelines.manifest import Manifest, Utterance

SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def read(root: Path) -> Manifest:
    """Read a tree; ids are the paths below the root, labels the names of the class folders.

    A first level made of nothing but ``train``, ``validation`` (``dev``, ``val``, ``valid``) and
    ``test`` is taken as the official split, and the level below it as the classes.
    """
    root = checked_root(root, FOLDER.name, FOLDER.layout)
    audio: list[tuple[Path, tuple[str, ...]]] = []
    skipped: Counter[str] = Counter()
    for path in walk(root):
        if path.suffix.lower() in AUDIO_SUFFIXES:
            audio.append((path, path.relative_to(root).parts))
        else:
            skipped[path.suffix.lower() or path.name] += 1
    folders = {parts[0] for _, parts in audio if len(parts) > 1}
    split = "train" in {f.lower() for f in folders} and all(f.lower() in SPLITS for f in folders)
    depth = 1 if split else 0
    stray = [parts for _, parts in audio if len(parts) < depth + 2]
    utterances = tuple(
        Utterance(
            id="/".join(parts),
            path=path,
            label=parts[depth],
            split=SPLITS[parts[0].lower()] if split else None,
        )
        for path, parts in audio
        if len(parts) >= depth + 2
    )
    if not utterances:
        raise nothing_found(root, FOLDER.name, FOLDER.layout)
    notes = []
    if stray:
        notes.append(
            f"{len(stray):,} recordings outside the class folders left out, "
            f"e.g. {'/'.join(stray[0])}."
        )
    if skipped:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in skipped.most_common(6))
        notes.append(f"{sum(skipped.values()):,} files that are not audio left out: {kinds}.")
    labels = {u.label for u in utterances}
    if len(labels) == 1:
        notes.append(f"Only one class folder, {labels.pop()!r}: nothing to tell apart.")
    notes.append(
        "Speakers are unknown, so a split may mix them. A manifest with a 'speaker' column "
        "allows speaker-independent protocols."
    )
    return Manifest(FOLDER.name, utterances, tuple(notes))


FOLDER = Corpus(
    name="folder",
    title="Your own recordings: one folder per class",
    licence="yours",
    layout="one folder per class with recordings in it: ROOT/CLASS/…/NAME.wav",
    read=read,
    scheme="as-given",
    protocol="utterance-kfold-5",
)
