"""What a run would do: which features of which utterances the cache does not hold yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mer.cache.errors import DamagedStoreError, StoreError, UtteranceError
from mer.cache.home import Cache
from mer.cache.spec import FeatureSpec
from mer.cache.store import Store
from mer.extract.contract import Extractor, Source
from mer.extract.inputs import Failure, FileState, check_unchanged, no_audio, no_text, resolve

# Rough speech rate, so that transcripts can be measured in seconds like recordings.
CHARACTERS_PER_SECOND = 15.0


class Ledger:
    """Failures, each listed once per utterance, cause and feature, and how many pairs they are."""

    def __init__(self) -> None:
        self.entries: list[Failure] = []
        self.pairs = 0
        self._listed: set[tuple[str, str, str | None]] = set()

    def add(
        self, source: Source, error: Exception | str, feature: str | None = None, pairs: int = 1
    ) -> None:
        """List ``source`` with the reason.

        Parameters
        ----------
        feature : str, optional
            The only feature affected.
        pairs : int, default=1
            How many features are.
        """
        self.pairs += pairs
        reason = error if isinstance(error, str) else _reason(error)
        if (source.id, reason, feature) not in self._listed:
            self._listed.add((source.id, reason, feature))
            self.entries.append(Failure(source.id, reason, feature))


def _reason(error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return (
        first_line if isinstance(error, UtteranceError) else f"{type(error).__name__}: {first_line}"
    )


@dataclass(slots=True)
class FeaturePlan:
    """One feature of a plan.

    Parameters
    ----------
    feature : str
        The feature string as requested.
    extractor : Extractor
        Not loaded yet.
    missing : list of int
        Sources to compute; of several with identical input, the first.
    reused : int
        Sources whose features are stored already.
    twins : dict
        Index of a missing source to those that share its input and will be served by its result.
    """

    feature: str
    extractor: Extractor
    missing: list[int]
    reused: int
    twins: dict[int, list[int]] = field(default_factory=dict)


@dataclass(slots=True)
class Plan:
    """What a run would do.

    Parameters
    ----------
    sources : sequence of Source
        All utterances.
    features : list of FeaturePlan
        One per requested feature, in order, each distinct configuration once.
    keys : dict
        ``"audio"`` and ``"text"``: utterance id to key.
    durations_s : dict
        Utterance id to seconds.
    states : dict
        Path of a recording, as written, to the state of the file that its key was computed from.
    failures : Ledger
        Found while planning: unreadable recordings, missing transcripts.
    """

    sources: Sequence[Source]
    features: list[FeaturePlan]
    keys: dict[str, dict[str, bytes]]
    durations_s: dict[str, float]
    states: dict[str, FileState] = field(default_factory=dict)
    failures: Ledger = field(default_factory=Ledger)

    @property
    def hours(self) -> float:
        """Hours of readable sound."""
        return sum(self.durations_s.values()) / 3600

    def check_unchanged(self, source: Source) -> None:
        """Raise ``AudioError`` if a recording is not any more what its key was computed from."""
        check_unchanged(source, self.states[str(source.path)], self.keys["audio"][source.id])

    def seconds(self, index: int, modality: str) -> float:
        """Return the size of source ``index`` in seconds (nominal ones for a transcript)."""
        source = self.sources[index]
        if modality == "audio":
            return self.durations_s[source.id]
        return len(source.text or "") / CHARACTERS_PER_SECOND


def plan(
    sources: Sequence[Source],
    features: Sequence[tuple[str, Extractor]],
    cache: Cache,
    *,
    workers: int = 4,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Find out what is missing, without loading a model or decoding a sample.

    Parameters
    ----------
    features : sequence of (str, Extractor)
        Feature strings with their extractors.
    progress : callable, optional
        Called for every recording that had to be hashed.
    """
    wanted = {extractor.modality for _, extractor in features}
    resolved = resolve(
        sources,
        cache.root,
        audio="audio" in wanted,
        text="text" in wanted,
        workers=workers,
        progress=progress,
    )
    keys = {"audio": resolved.audio_keys, "text": resolved.text_keys}
    planned = Plan(sources, [], keys, resolved.durations_s, resolved.states)
    for feature, extractor in features:
        if all(extractor.spec != other.extractor.spec for other in planned.features):
            planned.features.append(_plan_feature(planned, feature, extractor, cache))
    broken = {failure.utterance: failure.reason for failure in resolved.failures}
    per_modality = Counter(feature.extractor.modality for feature in planned.features)
    for source in sources:
        if per_modality["audio"] and source.id not in keys["audio"]:
            error = broken.get(source.id) or no_audio(source)
            planned.failures.add(source, error, pairs=per_modality["audio"])
        if per_modality["text"] and source.id not in keys["text"]:
            planned.failures.add(source, no_text(source), pairs=per_modality["text"])
    return planned


def _open(cache: Cache, spec: FeatureSpec) -> Store | None:
    """Open a feature's store; one whose metadata a repair took out gets it anew from the spec."""
    try:
        return cache.open(spec)
    except DamagedStoreError as damage:
        try:
            return cache.open(spec, create=True)  # makes what is missing, else raises again
        except StoreError:
            raise damage from None


def _plan_feature(planned: Plan, feature: str, extractor: Extractor, cache: Cache) -> FeaturePlan:
    sources, keys = planned.sources, planned.keys[extractor.modality]
    here = [i for i, source in enumerate(sources) if source.id in keys]
    store = _open(cache, extractor.spec)
    if store is None:
        stored = [False] * len(here)
    else:
        stored = store.contains([keys[sources[i].id] for i in here]).tolist()
    first: dict[bytes, int] = {}
    twins: dict[int, list[int]] = {}
    for i, is_stored in zip(here, stored, strict=True):
        if is_stored:
            continue
        representative = first.setdefault(keys[sources[i].id], i)
        if representative != i:
            twins.setdefault(representative, []).append(i)
    return FeaturePlan(feature, extractor, list(first.values()), sum(stored), twins)
