"""Protocols: named, versioned ways to divide a corpus into training, validation and test.

================================ ===================================================================
``loso``                         one speaker is the test part, in turn
``emodb-loso`` …                 the same under the corpus's name, which reports then bear
``ravdess-6fold-emobox``         EmoBox's six folds of four RAVDESS actors
``speaker-kfold-K``              K folds of whole speakers, balanced in gender and size
``utterance-kfold-K``            K folds of utterances balanced in classes, speakers mixed
``official``                     the corpus's own split
================================ ===================================================================

The validation part serves model selection and never comes from the test part. Its rule is part of a
protocol's result and of every report: ``next-fold`` takes the test part of the following fold,
``stratified-20%`` a fifth of the training utterances of every class, ``speakers-20%`` a fifth of
the training speakers, ``official`` the corpus's own.

A leak guard refuses folds in which a speaker, a dialogue or one stretch of a recording is on both
sides of the test border; ``allow_leak`` overrides it with a reason that the result records.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from mer.cache.errors import ProtocolError, UnknownNameError
from mer.pipelines.manifest import Utterance

EMOBOX_RAVDESS_ACTORS = (
    ("01", "11", "20", "21"),
    ("04", "10", "12", "14"),
    ("08", "09", "19", "23"),
    ("03", "05", "07", "24"),
    ("02", "15", "16", "18"),
    ("06", "13", "17", "22"),
)
EMODB_SPEAKERS = ("03", "08", "09", "10", "11", "12", "13", "14", "15", "16")
MIN_TRAINING_GROUPS = 2  # next-fold needs so many folds' test parts left to train on
NAMED = 5


@dataclass(frozen=True, slots=True)
class Fold:
    """One division of utterance ids, parts disjoint and none empty.

    Parameters
    ----------
    name : str
        Unique within a protocol.
    train, validation, test : tuple of str
        Utterance ids.

    Raises
    ------
    ProtocolError
        An empty part, an id that occurs twice in a part, or one in two parts.
    """

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        for part, ids in parts.items():
            if not ids:
                raise ProtocolError(f"Fold {self.name!r} has no utterance in its {part} part.")
            if len(set(ids)) != len(ids):
                twice = [name for name, n in Counter(ids).items() if n > 1]
                raise ProtocolError(
                    f"Fold {self.name!r} lists utterances twice in its {part} part: {_some(twice)}."
                )
        for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
            if both := set(parts[a]).intersection(parts[b]):
                raise ProtocolError(
                    f"Fold {self.name!r} has utterances both in its {a} and its {b} part: "
                    f"{_some(sorted(both))}."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Folds(Sequence[Fold]):
    """The folds of a protocol and all that names them; a sequence of ``Fold``.

    Parameters
    ----------
    protocol : str
        Name as given.
    version : int
        Raised whenever the same name would divide the same utterances differently.
    folds : tuple of Fold
        In order.
    validation : str
        The rule that made the validation parts.
    seed : int
        Of whatever is drawn.
    leak : str, optional
        The reason for which the leak guard was overridden, and what it had found.
    notes : tuple of str
        What a reader of results should know.
    """

    protocol: str
    version: int
    folds: tuple[Fold, ...]
    validation: str
    seed: int
    leak: str | None = None
    notes: tuple[str, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Fold: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Fold]: ...
    def __getitem__(self, index: int | slice) -> Fold | Sequence[Fold]:
        return self.folds[index]

    def __len__(self) -> int:
        return len(self.folds)

    def __iter__(self) -> Iterator[Fold]:
        return iter(self.folds)

    @property
    def hash(self) -> str:
        """``split_hash`` of the folds."""
        return split_hash(self.folds)


_Parts = list[tuple[str, list[Utterance]]]  # fold name, test utterances


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """A way to choose test parts.

    Parameters
    ----------
    name : str
        Name in recipes and reports.
    summary : str
        One line for people.
    divide : callable
        Utterances and seed to test parts; raises ``ProtocolError`` where it cannot.
    version : int
        See ``Folds``.
    """

    name: str
    summary: str
    divide: Callable[[Sequence[Utterance], int], tuple[_Parts, list[str]]]
    version: int = 1


def make_folds(
    protocol: str | Protocol,
    utterances: Iterable[Utterance],
    seed: int = 0,
    *,
    validation: str | None = None,
    allow_leak: str | None = None,
    content: Mapping[str, bytes] | None = None,
) -> Folds:
    """Divide utterances by a named protocol.

    Parameters
    ----------
    protocol : str or Protocol
        A name of the module docstring, or a way of one's own.
    utterances : iterable of Utterance
        Those that take part in the task; ``label`` is what parts are balanced in.
    seed : int, default=0
        Of whatever is drawn; the same seed gives the same folds whatever the order of the
        utterances.
    validation : str, optional
        ``"next-fold"``, ``"stratified-N%"``, ``"speakers-N%"`` or ``"official"``. Default is the
        official part where there is one, ``next-fold`` where two folds' test parts remain to train
        on, else ``stratified-20%``.
    allow_leak : str, optional
        A reason. Leaks are then recorded in ``Folds.leak`` instead of refused.
    content : mapping of str to bytes, optional
        Hash of the whole recording that each utterance is cut from, by id, to find the same
        recording under two paths.

    Raises
    ------
    UnknownNameError
        No such protocol or validation rule.
    ProtocolError
        No utterances, no speakers, too few of them, an empty part, or a leak.
    """
    chosen = protocol if isinstance(protocol, Protocol) else _find(protocol)
    name = chosen.name
    rows = sorted(utterances, key=lambda u: u.id)
    if len({u.id for u in rows}) != len(rows):
        raise ProtocolError("Utterance ids are not unique, so they cannot be divided.")
    if not rows:
        raise ProtocolError(f"Protocol {name!r} got no utterances. Check labels and scheme.")
    if allow_leak is not None and not allow_leak.strip():
        raise ProtocolError("allow_leak needs the reason in words; reports print it.")
    parts, notes = chosen.divide(rows, seed)
    rule = validation or _default_rule(rows, parts)
    if name == "official" and rule != "official" and any(u.split == "validation" for u in rows):
        notes.append(f"The official validation part is trained on, too: the rule is {rule!r}.")
    folds = _with_validation(rows, parts, rule, seed, name)
    notes += _missing_classes(rows, folds)
    leaks = find_leaks(rows, folds, content)
    if leaks and allow_leak is None:
        raise ProtocolError(
            f"Protocol {name!r} leaks: {leaks[0]} Scores would be too good. Choose a protocol "
            "that keeps them apart (speaker-kfold-5, loso), or give the reason for wanting this "
            "one as evaluation.allow_leak."
        )
    leak = f"{allow_leak} ({' '.join(leaks)})" if leaks else None
    return Folds(
        protocol=name,
        version=chosen.version,
        folds=folds,
        validation=rule,
        seed=seed,
        leak=leak,
        notes=tuple(notes),
    )


def split_hash(folds: Iterable[Fold]) -> str:
    """Return 16 hex digits that tell one division from another; order within a part is ignored."""
    plain = [
        [fold.name, sorted(fold.train), sorted(fold.validation), sorted(fold.test)]
        for fold in folds
    ]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


# --- protocols -----------------------------------------------------------------------------------


def _speakers(rows: Sequence[Utterance], name: str) -> dict[str, list[Utterance]]:
    """Group by speaker; every utterance must have one, and there must be two."""
    unknown = [u.id for u in rows if u.speaker is None]
    if unknown:
        raise ProtocolError(
            f"Protocol {name!r} keeps speakers apart, but {len(unknown):,} of {len(rows):,} "
            f"utterances have no speaker ({_some(unknown)}). Add a 'speaker' column to the "
            "manifest, or accept mixed speakers with protocol 'utterance-kfold-5'."
        )
    groups: dict[str, list[Utterance]] = defaultdict(list)
    for u in rows:
        groups[u.speaker or ""].append(u)
    if len(groups) < 2:
        raise ProtocolError(
            f"Protocol {name!r} needs at least two speakers, the corpus has only "
            f"{next(iter(groups))!r}. Add speakers, or accept their mixture with protocol "
            "'utterance-kfold-5'."
        )
    return dict(sorted(groups.items()))


def _loso(
    name: str, expected: int | None = None, known: Sequence[str] = ()
) -> Callable[[Sequence[Utterance], int], tuple[_Parts, list[str]]]:
    def divide(rows: Sequence[Utterance], seed: int) -> tuple[_Parts, list[str]]:
        groups = _speakers(rows, name)
        if known and (strange := sorted(set(groups).difference(known))):
            raise ProtocolError(
                f"Protocol {name!r} is for the speakers {', '.join(known)}; the corpus has "
                f"{_some(strange)}. Use 'loso'."
            )
        notes = []
        if expected is not None and len(groups) != expected:
            notes.append(f"{len(groups)} of the {expected} speakers of {name!r} are there.")
        return list(groups.items()), notes

    return divide


def _emobox(rows: Sequence[Utterance], seed: int) -> tuple[_Parts, list[str]]:
    name = "ravdess-6fold-emobox"
    groups = _speakers(rows, name)
    known = {actor for actors in EMOBOX_RAVDESS_ACTORS for actor in actors}
    if strange := sorted(set(groups).difference(known)):
        raise ProtocolError(
            f"Protocol {name!r} is for RAVDESS with speakers '01' to '24'; the corpus has "
            f"{_some(strange)}. Use 'loso' or 'speaker-kfold-6'."
        )
    parts: _Parts = []
    notes = []
    for number, actors in enumerate(EMOBOX_RAVDESS_ACTORS, start=1):
        present = [actor for actor in actors if actor in groups]
        if not present:
            notes.append(f"Fold {number} dropped: none of its actors {', '.join(actors)} is there.")
            continue
        if len(present) < len(actors):
            notes.append(f"Fold {number} has only {', '.join(present)} of {', '.join(actors)}.")
        parts.append((f"fold-{number}", [u for actor in present for u in groups[actor]]))
    if len(parts) < 2:
        raise ProtocolError(
            f"Protocol {name!r}: actors {', '.join(groups)} lie within one fold, so nothing is "
            "left to train on. Use 'loso'."
        )
    return parts, notes


def _speaker_kfold(
    num_folds: int,
) -> Callable[[Sequence[Utterance], int], tuple[_Parts, list[str]]]:
    name = f"speaker-kfold-{num_folds}"

    def divide(rows: Sequence[Utterance], seed: int) -> tuple[_Parts, list[str]]:
        groups = _speakers(rows, name)
        if len(groups) < num_folds:
            raise ProtocolError(
                f"Protocol {name!r} needs {num_folds} speakers, the corpus has {len(groups)}. "
                f"Use 'speaker-kfold-{len(groups)}' or 'loso'."
            )
        bins: list[list[str]] = [[] for _ in range(num_folds)]
        genders = [Counter[str | None]() for _ in range(num_folds)]
        sizes = [0] * num_folds
        # Largest speakers first, each to the fold that lacks its gender most, then the smallest.
        for speaker in sorted(groups, key=lambda s: (-len(groups[s]), s)):
            gender = groups[speaker][0].gender
            cost = [(genders[i][gender], len(bins[i]), sizes[i], i) for i in range(num_folds)]
            place = min(cost)[-1]
            bins[place].append(speaker)
            genders[place][gender] += 1
            sizes[place] += len(groups[speaker])
        parts = [
            (f"fold-{i}", [u for speaker in sorted(names) for u in groups[speaker]])
            for i, names in enumerate(bins, start=1)
        ]
        return parts, []

    return divide


def _utterance_kfold(
    num_folds: int,
) -> Callable[[Sequence[Utterance], int], tuple[_Parts, list[str]]]:
    name = f"utterance-kfold-{num_folds}"

    def divide(rows: Sequence[Utterance], seed: int) -> tuple[_Parts, list[str]]:
        if len(rows) < num_folds:
            raise ProtocolError(
                f"Protocol {name!r} needs {num_folds} utterances, the corpus has {len(rows)}."
            )
        bins: list[list[Utterance]] = [[] for _ in range(num_folds)]
        count = 0
        for label in sorted({u.label or "" for u in rows}):
            ids = [u for u in rows if (u.label or "") == label]
            for u in sorted(ids, key=lambda u: _draw(seed, name, u.id)):
                bins[count % num_folds].append(u)
                count += 1
        notes = []
        if unknown := sum(u.speaker is None for u in rows):
            notes.append(
                f"Speakers of {unknown:,} utterances are unknown and may be in training and test "
                "at once: scores may be too good for new speakers."
            )
        return [(f"fold-{i}", part) for i, part in enumerate(bins, start=1)], notes

    return divide


def _official(rows: Sequence[Utterance], seed: int) -> tuple[_Parts, list[str]]:
    splits = Counter(u.split for u in rows)
    if not splits["test"] or not splits["train"]:
        found = ", ".join(f"{n:,} of {repr(s) if s else 'none'}" for s, n in splits.items())
        raise ProtocolError(
            "Protocol 'official' needs utterances of the splits 'train' and 'test'; the corpus has "
            f"{found}. Fill the manifest's 'split' column, or use 'speaker-kfold-5' or 'loso'."
        )
    notes = []
    if splits[None]:
        notes.append(f"{splits[None]:,} utterances without a split take no part.")
    return [("official", [u for u in rows if u.split == "test"])], notes


PROTOCOLS: Mapping[str, Protocol] = {
    p.name: p
    for p in (
        Protocol(name="loso", summary="leave one speaker out", divide=_loso("loso")),
        Protocol(
            name="ravdess-6fold-emobox",
            summary="EmoBox's six folds of four RAVDESS actors",
            divide=_emobox,
        ),
        Protocol(
            name="emodb-loso",
            summary="EmoDB, leave one of ten speakers out",
            divide=_loso("emodb-loso", 10, EMODB_SPEAKERS),
        ),
        Protocol(
            name="nemo-loso",
            summary="nEMO, leave one of nine speakers out",
            divide=_loso("nemo-loso", 9),
        ),
        Protocol(
            name="demo-loso",
            summary="demo corpus, leave one speaker out",
            divide=_loso("demo-loso"),
        ),
        Protocol(name="official", summary="the corpus's own split", divide=_official),
    )
}
_FAMILIES: Mapping[
    str, tuple[str, Callable[[int], Callable[[Sequence[Utterance], int], tuple[_Parts, list[str]]]]]
] = {
    "speaker-kfold": ("K folds of whole speakers, balanced in gender and size", _speaker_kfold),
    "utterance-kfold": (
        "K folds of utterances balanced in classes, speakers mixed",
        _utterance_kfold,
    ),
}


def names() -> tuple[str, ...]:
    """Return the names of all protocols; K stands for a number of folds."""
    return (*PROTOCOLS, *(f"{family}-K" for family in _FAMILIES))


def protocol(name: str) -> Protocol:
    """Return the protocol called ``name``.

    Raises
    ------
    UnknownNameError
        No such protocol; near misses are suggested.
    ProtocolError
        Fewer than two folds.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    match = re.fullmatch(r"(.+)-(\d+)", name)
    if match is None or match[1] not in _FAMILIES:
        known = (*PROTOCOLS, *(f"{family}-5" for family in _FAMILIES))
        raise UnknownNameError("protocol", name, known)
    num_folds = int(match[2])
    if num_folds < 2:
        raise ProtocolError(f"Protocol {name!r}: at least two folds are needed.")
    summary, build = _FAMILIES[match[1]]
    return Protocol(name=name, summary=summary, divide=build(num_folds))


_find = protocol  # for functions with a parameter of that name


# --- validation ----------------------------------------------------------------------------------


def _default_rule(rows: Sequence[Utterance], parts: _Parts) -> str:
    """Keep speakers apart where enough of them remain to train on."""
    if _is_official(parts) and any(u.split == "validation" for u in rows):
        return "official"
    return "next-fold" if len(parts) >= 2 + MIN_TRAINING_GROUPS else "stratified-20%"


def _with_validation(
    rows: Sequence[Utterance], parts: _Parts, rule: str, seed: int, protocol: str
) -> tuple[Fold, ...]:
    share = validation_share(rule)
    folds = []
    official = _is_official(parts)
    for i, (name, test) in enumerate(parts):
        tested = {u.id for u in test}
        rest = [u for u in rows if u.id not in tested]
        given: set[str] = set()
        if official:
            given = {u.id for u in rest if u.split == "validation"}
            rest = [u for u in rest if u.split in ("train", "validation")]
        if rule == "official":
            chosen = given
        elif rule == "next-fold":
            if len(parts) < 3:
                raise ProtocolError(
                    f"Validation rule 'next-fold' needs three folds, protocol {protocol!r} has "
                    f"{len(parts)} here. Use 'stratified-20%'."
                )
            chosen = {u.id for u in parts[(i + 1) % len(parts)][1]}
        elif rule.startswith("speakers"):
            chosen = _some_speakers(rest, share, seed, name, protocol)
        else:
            chosen = _stratified(rest, share, seed, name)
        if not chosen and rule == "official":
            raise ProtocolError(
                "The official split has no validation part. Choose evaluation.validation: "
                "'speakers-20%' or 'stratified-20%'."
            )
        folds.append(
            Fold(
                name,
                train=tuple(u.id for u in rest if u.id not in chosen),
                validation=tuple(u.id for u in rest if u.id in chosen),
                test=tuple(u.id for u in test),
            )
        )
    return tuple(folds)


def _is_official(parts: _Parts) -> bool:
    return len(parts) == 1 and parts[0][0] == "official"


def validation_share(rule: str) -> float:
    """Return the share that a validation rule names; 0 for rules without one.

    Raises
    ------
    UnknownNameError
        No such rule; near misses are suggested.
    """
    if rule in ("next-fold", "official"):
        return 0.0
    match = re.fullmatch(r"(stratified|speakers)-(\d+)%", rule)
    if match is None or not 1 <= int(match[2]) <= 50:
        known = ("next-fold", "stratified-20%", "speakers-20%", "official")
        raise UnknownNameError("validation rule", rule, known)
    return int(match[2]) / 100


def _stratified(rest: Sequence[Utterance], share: float, seed: int, fold: str) -> set[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for u in rest:
        groups[u.label or ""].append(u.id)
    chosen: set[str] = set()
    for ids in groups.values():
        count = min(len(ids) - 1, max(1, math.floor(len(ids) * share + 0.5)))
        chosen.update(sorted(ids, key=lambda name: _draw(seed, fold, name))[:count])
    if not chosen and len(rest) > 1:  # one utterance per class: some class goes without training
        chosen.add(min((u.id for u in rest), key=lambda name: _draw(seed, fold, name)))
    return chosen


def _some_speakers(
    rest: Sequence[Utterance], share: float, seed: int, fold: str, protocol: str
) -> set[str]:
    speakers = sorted({u.speaker for u in rest if u.speaker is not None})
    if len(speakers) < 2 or any(u.speaker is None for u in rest):
        raise ProtocolError(
            f"Validation by speakers needs two known training speakers; protocol {protocol!r}, "
            f"fold {fold!r} has {len(speakers)}. Use 'stratified-20%'."
        )
    count = min(len(speakers) - 1, max(1, math.floor(len(speakers) * share + 0.5)))
    chosen = set(sorted(speakers, key=lambda name: _draw(seed, fold, name))[:count])
    return {u.id for u in rest if u.speaker in chosen}


def _draw(*what: object) -> bytes:
    """Return a random-looking sort key: adding an utterance never changes another one's place."""
    return hashlib.blake2b("|".join(map(str, what)).encode(), digest_size=8).digest()


def _missing_classes(rows: Sequence[Utterance], folds: Sequence[Fold]) -> list[str]:
    label = {u.id: u.label for u in rows}
    classes = sorted({u.label for u in rows if u.label is not None})
    notes = []
    for part in ("train", "validation", "test"):
        short = {}
        for fold in folds:
            present = {label[name] for name in getattr(fold, part)}
            if absent := [c for c in classes if c not in present]:
                short[fold.name] = absent
        if short:
            text = "; ".join(f"{name}: {', '.join(absent)}" for name, absent in short.items())
            notes.append(f"Classes without an utterance in the {part} part of {text}.")
    return notes


# --- leak guard ----------------------------------------------------------------------------------


def find_leaks(
    rows: Iterable[Utterance], folds: Iterable[Fold], content: Mapping[str, bytes] | None = None
) -> list[str]:
    """Return what crosses from training or validation to test, one sentence per kind and fold."""
    utterances = list(rows)
    speaker = {u.id: u.speaker for u in utterances if u.speaker is not None}
    dialogue = {u.id: u.dialogue for u in utterances if u.dialogue is not None}
    pairs = _shared_recordings(utterances, content or {})
    leaks = []
    for fold in folds:
        outside = {*fold.train, *fold.validation}
        inside = set(fold.test)
        shared = [
            f"{a} and {b}" if a in outside else f"{b} and {a}"
            for a, b in pairs
            if (a in outside and b in inside) or (b in outside and a in inside)
        ]
        for what, both in (
            ("speaker", _values(speaker, outside) & _values(speaker, inside)),
            ("dialogue", _values(dialogue, outside) & _values(dialogue, inside)),
            ("recording", shared),
        ):
            if both:
                number = f"{len(both)} {what}s are" if len(both) > 1 else f"one {what} is"
                leaks.append(
                    f"in fold {fold.name!r} {number} both in training and test: "
                    f"{_some(sorted(both))}."
                )
    return leaks


def _values(known: Mapping[str, str], ids: Iterable[str]) -> set[str]:
    return {value for value in map(known.get, ids) if value is not None}


def _shared_recordings(
    utterances: Sequence[Utterance], content: Mapping[str, bytes]
) -> list[tuple[str, str]]:
    """Return all pairs of ids that share a stretch of one channel of one recording."""
    by_recording: dict[object, list[Utterance]] = defaultdict(list)
    for u in utterances:
        if u.path is not None:
            by_recording[str(u.path)].append(u)  # hashes faster than a Path
        if u.id in content:
            by_recording[content[u.id]].append(u)
    pairs: dict[tuple[str, str], None] = {}
    for group in by_recording.values():
        if len(group) == 1:
            continue
        running: list[Utterance] = []
        for u in sorted(group, key=lambda u: u.start_s or 0.0):
            running = [other for other in running if _end(other) > (u.start_s or 0.0)]
            pairs.update({(o.id, u.id): None for o in running if _same_channel(o, u)})
            running.append(u)
    return list(pairs)


def _end(u: Utterance) -> float:
    return math.inf if u.end_s is None else u.end_s


def _same_channel(a: Utterance, b: Utterance) -> bool:
    """Tell whether two utterances of one file share a channel; none given means all of them."""
    return a.channel is None or b.channel is None or a.channel == b.channel


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - NAMED:,} more" if len(items) > NAMED else ""
    return ", ".join(repr(item) for item in items[:NAMED]) + more
