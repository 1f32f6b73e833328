"""Label schemes: which classes a task has, and what every label of a corpus becomes.

Corpora name their labels canonically (angry, happy, sad, neutral, fear, disgust,
surprise, calm, contempt, excited, frustrated, boredom, worried, other, no-agreement). A scheme maps
those onto its classes, or drops them; anything else is an error, never a silent loss.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from mer.cache.errors import ManifestError, UnknownNameError
from mer.pipelines.manifest import Manifest, Utterance

CANONICAL = (
    "angry",
    "happy",
    "sad",
    "neutral",
    "fear",
    "disgust",
    "surprise",
    "calm",
    "contempt",
    "excited",
    "frustrated",
    "boredom",
    "worried",
    "other",
    "no-agreement",
)

# Whole words only: single letters and short codes mean different things in different corpora (A is
# anger in MSP-Podcast and fear in EmoDB), so those maps live beside the corpora.
SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        "anger": "angry",
        "joy": "happy",
        "happiness": "happy",
        "sadness": "sad",
        "neutrality": "neutral",
        "fearful": "fear",
        "afraid": "fear",
        "anxiety": "fear",
        "disgusted": "disgust",
        "surprised": "surprise",
        "calmness": "calm",
        "excitement": "excited",
        "frustration": "frustrated",
        "bored": "boredom",
        "worry": "worried",
        "no_agreement": "no-agreement",
        "no agreement": "no-agreement",
    }
)

AS_GIVEN = "as-given"


def canonical(label: str) -> str:
    """Return the canonical name of a label word, or the label itself where there is none.

    Examples
    --------
    >>> canonical("Happiness"), canonical("angry"), canonical("W")
    ('happy', 'angry', 'W')
    """
    word = label.strip().lower()
    if word in CANONICAL:
        return word
    return SYNONYMS.get(word, label)


@dataclass(frozen=True, slots=True)
class LabelScheme:
    """The classes of a task, in index order.

    Parameters
    ----------
    name : str
        Name in recipes and reports.
    classes : tuple of str
        Class c of a head's output is ``classes[c]``.
    mapping : mapping of str to str
        Canonical label to class; a class maps to itself without being listed.
    drop : frozenset of str
        Canonical labels whose utterances take no part.
    """

    name: str
    classes: tuple[str, ...]
    mapping: Mapping[str, str] = field(default_factory=dict)
    drop: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes) or not self.classes:
            raise ValueError(f"Classes of scheme {self.name!r} must be distinct: {self.classes}.")
        if stray := sorted(set(self.mapping.values()).difference(self.classes)):
            raise ValueError(f"Scheme {self.name!r} maps to {stray}, which are not its classes.")
        if both := sorted(self.drop.intersection((*self.classes, *self.mapping))):
            raise ValueError(f"Scheme {self.name!r} both keeps and drops {both}.")

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classes)

    def class_of(self, label: str) -> str | None:
        """Return the class of ``label``, None where it is dropped.

        Raises
        ------
        KeyError
            A label that the scheme neither maps nor drops.
        """
        for name in (label, canonical(label)):
            if name in self.classes:
                return name
            if name in self.mapping:
                return self.mapping[name]
            if name in self.drop:
                return None
        raise KeyError(label)


@dataclass(frozen=True, slots=True)
class Labelled:
    """The utterances of a manifest that take part in a task.

    Parameters
    ----------
    scheme : LabelScheme
        The task.
    utterances : tuple of Utterance
        In manifest order; ``label`` is now the class.
    targets : tuple of int
        Class index of each utterance.
    dropped : mapping of str to int
        Labels that the scheme drops, and how many utterances had them.
    unlabelled : int
        Utterances without a label.
    """

    scheme: LabelScheme
    utterances: tuple[Utterance, ...]
    targets: tuple[int, ...]
    dropped: Mapping[str, int]
    unlabelled: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What the scheme left out, in words."""
        notes = [
            f"Scheme {self.scheme.name!r} drops {count} utterances labelled {label!r}."
            for label, count in self.dropped.items()
        ]
        if self.unlabelled:
            notes.append(f"{self.unlabelled} utterances have no label and take no part.")
        present = set(self.targets)
        if absent := [c for i, c in enumerate(self.scheme.classes) if i not in present]:
            notes.append(f"No utterance of class {', '.join(map(repr, absent))}.")
        return tuple(notes)


def _scheme(name: str, classes: str, drop: str = "", **mapping: str) -> LabelScheme:
    return LabelScheme(name, tuple(classes.split()), mapping, frozenset(drop.split()))


_RAVDESS = "neutral calm happy sad angry fear disgust surprise"
_EKMAN = "angry disgust fear happy sad surprise"

SCHEMES: Mapping[str, LabelScheme] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            _scheme("ravdess-8", _RAVDESS),
            _scheme("ravdess-7", _RAVDESS.replace("calm ", ""), calm="neutral"),
            _scheme("ravdess-7-nocalm", _RAVDESS.replace("calm ", ""), drop="calm"),
            _scheme("ravdess-song-6", "neutral calm happy sad angry fear"),
            _scheme("crema-d-6", "angry disgust fear happy neutral sad", drop="no-agreement"),
            _scheme("emodb-7", "angry boredom disgust fear happy neutral sad"),
            _scheme("nemo-6", "angry fear happy neutral sad surprise"),
            _scheme("demo-4", "angry happy neutral sad"),
            _scheme(
                "ekman-6", _EKMAN, drop=" ".join(sorted(set(CANONICAL).difference(_EKMAN.split())))
            ),
        )
    }
)


def names() -> tuple[str, ...]:
    """Return the names of all schemes, sorted; ``as-given`` is one more."""
    return tuple(sorted(SCHEMES))


def scheme(name: str) -> LabelScheme:
    """Return the scheme called ``name``.

    Raises
    ------
    UnknownNameError
        No such scheme; near misses are suggested.
    """
    try:
        return SCHEMES[name]
    except KeyError:
        raise UnknownNameError("label scheme", name, (*SCHEMES, AS_GIVEN)) from None


def as_given(utterances: Iterable[Utterance], target: str | None = None) -> LabelScheme:
    """Return the scheme whose classes are the labels as the manifest has them, sorted.

    Raises
    ------
    ManifestError
        Fewer than two different labels.
    """
    classes = sorted({label for u in utterances if (label := _label(u, target)) is not None})
    if len(classes) < 2:
        raise ManifestError(
            f"A task needs at least two classes; the {_where(target)} has "
            f"{', '.join(map(repr, classes)) or 'none'}."
        )
    return LabelScheme(AS_GIVEN, tuple(classes))


def resolve(name: str, manifest: Manifest, target: str | None = None) -> LabelScheme:
    """Return the scheme called ``name``, where ``as-given`` takes the labels of ``manifest``."""
    return as_given(manifest.utterances, target) if name == AS_GIVEN else scheme(name)


def apply(manifest: Manifest, scheme: LabelScheme, target: str | None = None) -> Labelled:
    """Select and name the utterances of a task.

    Parameters
    ----------
    manifest : Manifest
        All utterances of the corpus.
    scheme : LabelScheme
        The task.
    target : str, optional
        Take ``Utterance.labels[target]`` (a ``label:NAME`` column) instead of ``Utterance.label``.

    Raises
    ------
    ManifestError
        A label the scheme does not know (with the utterance and the nearest known label), or no
        labelled utterance at all.
    """
    kept: list[Utterance] = []
    targets: list[int] = []
    dropped: Counter[str] = Counter()
    unlabelled = 0
    index = {name: i for i, name in enumerate(scheme.classes)}
    classes: dict[str, str | None] = {}  # every label is looked up once
    for utterance in manifest.utterances:
        label = _label(utterance, target)
        if label is None:
            unlabelled += 1
            continue
        if label not in classes:
            try:
                classes[label] = scheme.class_of(label)
            except KeyError:
                raise _unknown(manifest, utterance, label, scheme) from None
        name = classes[label]
        if name is None:
            dropped[label] += 1
            continue
        kept.append(
            utterance if utterance.label == name else dataclasses.replace(utterance, label=name)
        )
        targets.append(index[name])
    if not kept:
        raise ManifestError(
            f"Manifest {manifest.name!r} has no utterance for scheme {scheme.name!r}: of "
            f"{len(manifest.utterances)}, {unlabelled} have no value in the {_where(target)} and "
            f"{sum(dropped.values())} are dropped by the scheme."
        )
    return Labelled(scheme, tuple(kept), tuple(targets), dict(dropped), unlabelled)


def _label(utterance: Utterance, target: str | None) -> str | None:
    return utterance.label if target is None else utterance.labels.get(target)


def _where(target: str | None) -> str:
    return "column 'label'" if target is None else f"column 'label:{target}'"


def _unknown(
    manifest: Manifest, utterance: Utterance, label: str, scheme: LabelScheme
) -> ManifestError:
    known = sorted({*scheme.classes, *scheme.mapping, *scheme.drop})
    near = difflib.get_close_matches(label.lower(), [*known, *SYNONYMS], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ManifestError(
        f"Manifest {manifest.name!r}, utterance {utterance.id!r}: label {label!r} is unknown to "
        f"scheme {scheme.name!r}.{hint} It knows: {', '.join(known)}. Scheme {AS_GIVEN!r} takes "
        "labels as they are."
    )
