"""From a recipe to arrays: the utterances of a corpus, their classes, and their cached features.

N utterances, C classes, T frames, D feature width.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mer.cache.errors import MissingFeatureError, RecipeError, UsageError
from mer.cache.exchange.feature import EXTRACTOR
from mer.cache.home import Cache
from mer.cache.spec import OutputSpec
from mer.cache.store import Store
from mer.extract.contract import Extractor
from mer.extract.inputs import Memo, Recording, Resolved, read_recordings, resolve
from mer.extract.registry import create, parse_feature
from mer.pipelines import corpora, labels
from mer.pipelines.extraction import sources_of
from mer.pipelines.labels import LabelScheme
from mer.pipelines.manifest import Manifest, Utterance
from mer.pipelines.recipe import Recipe, StreamRecipe

if TYPE_CHECKING:
    from mer.heads.contract import StreamShape
    from mer.pipelines.training import FeatureSet

logger = logging.getLogger(__name__)

NAMED = 3  # utterances that a message names as examples
BASELINES_WITH_FEATURES = frozenset({"logreg", "svm"})


@dataclass(frozen=True, slots=True)
class Input:
    """One output of one feature, as a stream or a baseline reads it.

    Parameters
    ----------
    feature : str
        Feature string without output.
    output : OutputSpec
        What is read.
    pool : int or "mean"
        Frames averaged into one.
    """

    feature: str
    output: OutputSpec
    pool: Any = 1

    def __str__(self) -> str:
        return f"{self.feature}#{self.output.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a recipe reads, found out without touching a frame.

    Parameters
    ----------
    manifest : Manifest
        The whole corpus.
    scheme : LabelScheme
        The task.
    utterances : tuple of Utterance
        Those with a class; ``label`` is the class.
    streams : mapping of str to Input
        What the head reads.
    baseline : tuple of Input
        What the baselines read; empty where none reads features.
    extractors : mapping of str to Extractor
        By feature string.
    notes : tuple of str
        Of the corpus and the scheme.
    """

    manifest: Manifest
    scheme: LabelScheme
    utterances: tuple[Utterance, ...]
    streams: Mapping[str, Input]
    baseline: tuple[Input, ...]
    extractors: Mapping[str, Extractor]
    notes: tuple[str, ...]

    def shapes(self) -> dict[str, StreamShape]:
        """Return the shape of every stream, as a head is constructed with it."""
        from mer.heads.contract import StreamShape

        return {
            name: StreamShape(_codes(source.output), "codes")
            if source.output.kind == "codes"
            else StreamShape(source.output.dim)
            for name, source in self.streams.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Everything an experiment reads, in memory or memory-mapped.

    Parameters
    ----------
    features : FeatureSet
        Streams and classes of the N utterances that take part.
    utterances : tuple of Utterance
        The same N, in the same order.
    baseline : ndarray or None
        (N, D) float32, what logistic regression and SVM read.
    stores : mapping of str to mapping
        Feature string to the name and fingerprint of its store, and the extractor's identity.
    dropped : tuple of str
        Utterances left out for lack of a feature.
    notes : tuple of str
        What a reader of the results should know.
    """

    features: FeatureSet
    utterances: tuple[Utterance, ...]
    baseline: np.ndarray | None
    stores: Mapping[str, Mapping[str, Any]]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan(recipe: Recipe) -> Plan:
    """Read the manifest, name the classes and find the outputs that a recipe wants.

    Raises
    ------
    UsageError
        No dataset, an unknown corpus, scheme, feature or output, a label the scheme lacks, or
        codes that are to be averaged.
    """
    name = recipe.dataset.name
    if name is None:
        raise RecipeError(
            f"Recipe {recipe.name!r} names no dataset. Give one: --dataset ravdess --root DIR, "
            "or --dataset manifest.csv."
        )
    manifest = corpora.load(name, recipe.dataset.root)
    scheme_name = recipe.dataset.labels or _corpus_default(name, "scheme", labels.AS_GIVEN)
    scheme = labels.resolve(scheme_name, manifest, recipe.dataset.target)
    labelled = labels.apply(manifest, scheme, recipe.dataset.target)
    extractors: dict[str, Extractor] = {}

    def read(stream: StreamRecipe, where: str) -> Input:
        if stream.feature not in extractors:
            extractors[stream.feature] = create(stream.feature)
        output = _choose(extractors[stream.feature], stream, where)
        return Input(stream.feature, output, stream.pool)

    streams = {name: read(s, f"features.{name}") for name, s in recipe.features.items()}
    baseline: tuple[Input, ...] = ()
    if BASELINES_WITH_FEATURES & set(recipe.evaluation.baselines):
        wanted = recipe.evaluation.baseline_features
        if wanted is None:
            baseline = tuple(s for s in streams.values() if s.output.kind != "codes")
        else:
            where = "evaluation.baseline_features"
            baseline = tuple(read(StreamRecipe(feature=f), where) for f in wanted)
        if not baseline or any(s.output.kind == "codes" for s in baseline):
            raise RecipeError(
                "Baselines average frames, and codes cannot be averaged. Name a feature of frames "
                "or functionals in evaluation.baseline_features, e.g. egemaps."
            )
    return Plan(
        manifest=manifest,
        scheme=scheme,
        utterances=labelled.utterances,
        streams=streams,
        baseline=baseline,
        extractors=extractors,
        notes=(*manifest.notes, *labelled.notes),
    )


def default_protocol(recipe: Recipe, utterances: Sequence[Utterance]) -> str:
    """Return the protocol of a recipe, or the one its corpus is usually reported on.

    A manifest's own is its split, where every utterance has one, else leave one speaker out.
    """
    splits = {u.split for u in utterances}
    own = "official" if None not in splits and {"train", "test"} <= splits else "loso"
    return recipe.evaluation.protocol or _corpus_default(recipe.dataset.name, "protocol", own)


def _corpus_default(dataset: str | None, attribute: str, otherwise: str) -> str:
    if dataset is None or corpora.is_manifest(dataset):
        return otherwise
    return str(getattr(corpora.corpus(dataset), attribute))


def _choose(extractor: Extractor, stream: StreamRecipe, where: str) -> OutputSpec:
    """Return the output that a stream reads."""
    if stream.output is not None:
        output = extractor.spec.output(stream.output)
    elif len(extractor.outputs) == 1:
        output = extractor.outputs[0]
    else:
        names = [o.name for o in extractor.outputs]
        raise RecipeError(
            f"{where}: feature {stream.feature!r} has the outputs {', '.join(names)}; say which, "
            f"e.g. {stream.feature}#{names[0]}."
        )
    if output.kind == "codes" and stream.pool != 1:
        raise RecipeError(
            f"{where}.pool: {stream.feature}#{output.name} holds codes, which cannot be averaged. "
            "Leave pool out."
        )
    return output


def _codes(output: OutputSpec) -> int:
    return output.num_codes or int(np.iinfo(output.dtype).max) + 1


# -- reading ---------------------------------------------------------------------------------------


def identify(planned: Plan, cache: Cache) -> Resolved:
    """Return the keys of all utterances of a plan: what their sound and words hash to."""
    modalities = {extractor.modality for extractor in planned.extractors.values()}
    taking_part = {u.id for u in planned.utterances}
    sources = [s for s in sources_of(planned.manifest) if s.id in taking_part]
    return resolve(sources, cache.root, audio="audio" in modalities, text="text" in modalities)


def recordings(planned: Plan, resolved: Resolved, cache: Cache) -> dict[str, bytes]:
    """Return the hash of the whole file that each utterance with an audio key is cut from.

    A key stands for one stretch of a recording; to find two stretches that overlap, in copies of it
    under two names, takes the hash of the file itself. The memo of ``identify`` has it.
    """
    paths = {u.id: str(u.path) for u in planned.utterances if u.id in resolved.audio_keys}
    memo = Memo(cache.root)
    found, _ = read_recordings(dict.fromkeys(paths.values()), memo)
    memo.save()
    return {
        name: recording.content
        for name, path in paths.items()
        if isinstance(recording := found[path], Recording)
    }


def load(recipe: Recipe, planned: Plan, resolved: Resolved, cache: Cache) -> Dataset:
    """Read all features of a plan from the cache.

    Raises
    ------
    MissingFeatureError
        Features that are not in the cache: names the `mer extract` command that brings them.
    """
    stores = {name: cache.open(e.spec) for name, e in planned.extractors.items()}
    missing = {
        feature: _missing(
            [u.id for u in planned.utterances], _keys(resolved, extractor), stores[feature]
        )
        for feature, extractor in planned.extractors.items()
    }
    dropped = _drop_or_refuse(recipe, planned, cache, resolved, missing, stores)
    utterances = tuple(u for u in planned.utterances if u.id not in dropped)
    ids = [u.id for u in utterances]

    def reader(wanted: Input) -> tuple[Store, list[bytes]]:
        store = stores[wanted.feature]
        assert store is not None
        keys = _keys(resolved, planned.extractors[wanted.feature])
        return store, [keys[i] for i in ids]

    streams = {name: _frames(source, *reader(source)) for name, source in planned.streams.items()}
    baseline = None
    if planned.baseline:
        baseline = np.hstack([_vectors(s.output, *reader(s)) for s in planned.baseline])
    notes = list(planned.notes)
    if recipe.dataset.normalise == "speaker":
        speakers = _speakers(utterances)
        for name, source in planned.streams.items():
            if source.output.kind != "codes":
                streams[name] = standardise_by_speaker(streams[name], speakers)
        if baseline is not None:
            baseline = np.stack(standardise_by_speaker(list(baseline), speakers))
        notes.append(
            "Features are standardised per speaker, test speakers included (labels unseen): the "
            "numbers hold where several recordings of a new speaker are at hand."
        )
    if dropped:
        notes.append(
            f"{len(dropped)} of {len(planned.utterances)} utterances are left out because a "
            f"feature is missing: {_some(dropped)}."
        )
        logger.warning(notes[-1])
    return Dataset(
        features=_feature_set(planned, utterances, streams),
        utterances=utterances,
        baseline=baseline,
        stores={
            feature: {
                "store": store.name,
                "fingerprint": store.fingerprint,
                "identity": dict(planned.extractors[feature].spec.identity),
            }
            for feature, store in stores.items()
            if store is not None
        },
        dropped=tuple(sorted(dropped)),
        notes=tuple(notes),
    )


def _keys(resolved: Resolved, extractor: Extractor) -> Mapping[str, bytes]:
    return resolved.audio_keys if extractor.modality == "audio" else resolved.text_keys


def _missing(ids: Sequence[str], keys: Mapping[str, bytes], store: Store | None) -> list[str]:
    """Return the utterances that have no key or are not in the store."""
    keyed = [i for i in ids if i in keys]
    stored = set()
    if store is not None and keyed:
        contained = store.contains([keys[i] for i in keyed])
        stored = {i for i, there in zip(keyed, contained, strict=True) if there}
    return [i for i in ids if i not in stored]


def _drop_or_refuse(
    recipe: Recipe,
    planned: Plan,
    cache: Cache,
    resolved: Resolved,
    missing: Mapping[str, Sequence[str]],
    stores: Mapping[str, Store | None],
) -> frozenset[str]:
    """Return the utterances to leave out, if the recipe allows it and every store is there."""
    lacking = {feature: ids for feature, ids in missing.items() if ids}
    dropped = frozenset(i for ids in lacking.values() for i in ids)
    absent = [feature for feature in lacking if stores[feature] is None]
    everything = len(dropped) == len(planned.utterances)
    if not dropped or (recipe.dataset.missing == "drop" and not absent and not everything):
        return dropped
    reasons = {failure.utterance: failure.reason for failure in resolved.failures}
    known = [f"{i}: {reasons[i]}" for i in sorted(dropped) if i in reasons]
    listed = "; ".join(
        f"{feature!r} of {'all' if len(ids) == len(planned.utterances) else f'{len(ids)} of'} "
        f"{len(planned.utterances)} utterances"
        + ("" if len(ids) == len(planned.utterances) else f" ({_some(ids)})")
        for feature, ids in lacking.items()
    )
    text = f"The cache {cache.url} lacks features of {recipe.dataset.name!r}: {listed}."
    extractable = [feature for feature in lacking if not _is_imported(feature)]
    if extractable:
        text += f" Run `{extract_command(recipe, extractable, cache)}`."
    if len(extractable) < len(lacking):
        text += (
            " Imported features cannot be computed: import them again, with "
            f"`mer cache import … --dataset {shlex.quote(str(recipe.dataset.name))}` so that they "
            "are linked to these utterances."
        )
    if known:
        text += f" These cannot be read: {'; '.join(known[:NAMED])}."
    if not absent and not everything:
        text += " To train without utterances whose extraction fails: --set dataset.missing=drop."
    raise MissingFeatureError(text)


def extract_command(recipe: Recipe, features: Iterable[str], cache: Cache) -> str:
    """Return the `mer extract` command that brings ``features`` of a recipe's dataset."""
    parts = ["mer", "extract", str(recipe.dataset.name)]
    if recipe.dataset.root is not None:
        parts += ["--root", recipe.dataset.root]
    for feature in features:
        parts += ["-f", feature]
    if not _is_default(cache):
        parts += ["--cache", cache.url]
    return shlex.join(parts)


def _is_imported(feature: str) -> bool:
    return parse_feature(feature).name == EXTRACTOR


def _is_default(cache: Cache) -> bool:
    try:
        return Cache.from_url(None).url == cache.url
    except UsageError:
        return False


def _some(ids: Iterable[str]) -> str:
    ids = sorted(ids)
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return ", ".join(ids[:NAMED]) + more


def _feature_set(
    planned: Plan,
    utterances: Sequence[Utterance],
    streams: Mapping[str, Sequence[np.ndarray]],
) -> FeatureSet:
    from mer.pipelines.training import FeatureSet

    index = {name: i for i, name in enumerate(planned.scheme.classes)}
    return FeatureSet(
        streams=streams,
        ids=[u.id for u in utterances],
        classes=planned.scheme.classes,
        labels=np.array([index[str(u.label)] for u in utterances], dtype=np.int64),
        speakers=[u.speaker for u in utterances],
        num_codes={
            name: _codes(s.output)
            for name, s in planned.streams.items()
            if s.output.kind == "codes"
        },
    )


def _frames(wanted: Input, store: Store, keys: Sequence[bytes]) -> list[np.ndarray]:
    name = wanted.output.name
    if wanted.pool == "mean" and wanted.output.kind == "frames":
        return list(store.pooled(name, keys)[:, :1])  # (B, 1, D)
    whole = wanted.pool in (1, "mean")
    frames = {
        key: array if whole else average(array, wanted.pool)
        for key, array in store.scan(name, keys)
    }
    return [frames[key] for key in keys]


def _vectors(output: OutputSpec, store: Store, keys: Sequence[bytes]) -> np.ndarray:
    """Return (N, D) float32: functionals as they are, frames as mean and standard deviation."""
    if output.kind == "pooled":
        vectors = {key: frames[0] for key, frames in store.scan(output.name, keys)}
        return np.stack([vectors[key] for key in keys]).astype(np.float32)
    pooled = store.pooled(output.name, keys)  # (N, 2, D)
    return pooled.reshape(len(keys), -1)


def average(frames: np.ndarray, group: int) -> np.ndarray:
    """Return the means of every ``group`` frames, (ceil(T / group), D) float32.

    The last mean is over the frames that are left, so that nothing is invented and nothing lost.

    Examples
    --------
    >>> average(np.array([[1.0], [3.0], [7.0]]), 2).tolist()
    [[2.0], [7.0]]
    """
    starts = np.arange(0, len(frames), group)
    sums = np.add.reduceat(frames.astype(np.float32), starts, axis=0)
    counts = np.minimum(group, len(frames) - starts).astype(np.float32)
    return np.asarray(sums / counts[:, None], dtype=np.float32)


def _speakers(utterances: Sequence[Utterance]) -> list[str]:
    unknown = [u.id for u in utterances if u.speaker is None]
    if unknown:
        raise RecipeError(
            f"dataset.normalise: speaker needs to know who speaks, but {len(unknown)} of "
            f"{len(utterances)} utterances have no speaker ({_some(unknown)}). Add a 'speaker' "
            "column to the manifest, or leave normalise out."
        )
    return [str(u.speaker) for u in utterances]


def standardise_by_speaker(
    arrays: Sequence[np.ndarray], speakers: Sequence[str]
) -> list[np.ndarray]:
    """Return every array shifted and scaled by the statistics of its speaker.

    Parameters
    ----------
    arrays : sequence of ndarray
        N of (T, D) or (D,) float.
    speakers : sequence of str
        N names.

    Returns
    -------
    list of ndarray
        Of the same shapes, float32; over all frames of a speaker, every dimension has mean 0 and
        variance 1, or is 0 where it does not vary.
    """
    rows: dict[str, list[int]] = {}
    for row, speaker in enumerate(speakers):
        rows.setdefault(speaker, []).append(row)
    done: list[np.ndarray] = list(arrays)
    for of_speaker in rows.values():
        frames = np.concatenate([np.atleast_2d(arrays[row]) for row in of_speaker])
        mean = frames.mean(axis=0, dtype=np.float64)
        std = frames.astype(np.float64).std(axis=0)
        # What float16 rounding makes of a constant is not variation.
        varies = std > 1e-4 * np.maximum(np.abs(mean), 1e-6)
        scale = np.divide(1.0, std, out=np.zeros_like(std), where=varies)
        for row in of_speaker:
            done[row] = ((arrays[row] - mean) * scale).astype(np.float32)
    return done
