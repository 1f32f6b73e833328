"""What the commands of `mer cache` need of data sets: keys by utterance, and utterances by key.

A cache knows keys alone. A data set says which utterances they are, which of them it uses, and what
to call what is exported or imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mer.cache.errors import StoreError, UnknownNameError, UsageError
from mer.cache.exchange import EXPORTERS, IMPORTERS, check_options
from mer.cache.exchange.feature import EXTRACTOR
from mer.extract.inputs import Failure, resolve
from mer.pipelines import corpora
from mer.pipelines.extraction import sources_of

if TYPE_CHECKING:
    from mer.cache.home import Cache
    from mer.cache.store import Store
    from mer.pipelines.manifest import Manifest

Modality = Literal["audio", "text"]


@dataclass(frozen=True, slots=True)
class DatasetKeys:
    """The keys of a data set's utterances.

    Parameters
    ----------
    manifest : Manifest
        The data set.
    audio, text : mapping of str to bytes
        Utterance id to key, for those that have sound or words.
    failures : tuple of Failure
        Utterances whose recording cannot be read.
    """

    manifest: Manifest
    audio: Mapping[str, bytes]
    text: Mapping[str, bytes]
    failures: tuple[Failure, ...] = ()

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.manifest.name

    def used(self) -> set[bytes]:
        """Return every key that the data set reads.

        Raises
        ------
        UsageError
            A recording cannot be read, so that its key is not known.
        """
        if self.failures:
            first = self.failures[0]
            raise UsageError(
                f"{len(self.failures)} utterances of {self.name!r} cannot be read, so what it uses "
                f"is not known (the first: {first.utterance}: {first.reason}). Nothing was "
                "removed. Give the --root with all of its recordings."
            )
        return {*self.audio.values(), *self.text.values()}

    @property
    def modality(self) -> Modality:
        """``"text"`` for a data set of transcripts alone."""
        return "text" if self.text and not self.audio and not self.failures else "audio"

    def utterances(self) -> dict[bytes, list[str]]:
        """Return the ids behind each key, in the data set's order; twins share one."""
        return {**_by_key(self.text), **_by_key(self.audio)}

    def utterances_of(self, store: Store) -> dict[bytes, list[str]]:
        """Return the same of the modality that a store holds."""
        audio, text = (_by_key(keys) for keys in (self.audio, self.text))
        of_words = text and store.contains(list(text)).any()
        of_sound = audio and store.contains(list(audio)).any()
        return text if (of_words and not of_sound) or not audio else audio


def _by_key(keys: Mapping[str, bytes]) -> dict[bytes, list[str]]:
    found: dict[bytes, list[str]] = {}
    for name, key in keys.items():
        found.setdefault(key, []).append(name)
    return found


def dataset_keys(
    dataset: str,
    root: Path | None,
    cache: Cache,
    *,
    workers: int = 4,
    progress: Callable[[int], None] | None = None,
) -> DatasetKeys:
    """Read a data set's manifest and find the keys of its sound and words.

    Parameters
    ----------
    dataset, root : str, Path
        As `mer extract` takes them.
    cache : Cache
        Its memo spares reading what did not change.
    progress : callable, optional
        Called with 1 for every recording that had to be read.

    Raises
    ------
    UsageError
        No such data set.
    """
    manifest = corpora.load(dataset, root)
    resolved = resolve(sources_of(manifest), cache.root, workers=workers, progress=progress)
    failures = tuple(resolved.failures)
    return DatasetKeys(manifest, resolved.audio_keys, resolved.text_keys, failures)


def utterance_keys(
    dataset: str, root: Path | None, cache: Cache, modality: Modality
) -> dict[str, bytes]:
    """Return the key of each utterance's sound or words; see `dataset_keys`."""
    found = dataset_keys(dataset, root, cache)
    return dict(found.audio if modality == "audio" else found.text)


def pair_roots(datasets: Sequence[str], roots: Sequence[Path]) -> list[tuple[str, Path | None]]:
    """Give each data set its folder: as many roots as data sets, or as corpora among them.

    Raises
    ------
    UsageError
        Any other number of roots.
    """
    if len(roots) == len(datasets):
        return list(zip(datasets, roots, strict=True))
    named = [d for d in datasets if not corpora.is_manifest(d)]
    if len(roots) != len(named):
        raise UsageError(
            f"{len(roots)} --root for {len(datasets)} data sets; give one for each in their "
            "order (manifests do without)."
        )
    given = iter(roots)
    return [(d, None if corpora.is_manifest(d) else next(given)) for d in datasets]


def keys_in_use(
    datasets: Iterable[tuple[str, Path | None]],
    cache: Cache,
    progress: Callable[[int], None] | None = None,
) -> set[bytes]:
    """Return the keys that any of the data sets reads.

    Raises
    ------
    UsageError
        A data set that is not there as a whole: what it uses cannot be told.
    """
    used: set[bytes] = set()
    for dataset, root in datasets:
        used |= dataset_keys(dataset, root, cache, progress=progress).used()
    return used


# -- stores by name --------------------------------------------------------------------------------


def is_place(name: str) -> bool:
    """Tell whether ``name`` is a path or URL rather than (the beginning of) a store's name."""
    return "/" in name or os.sep in name or name in (".", "..") or name.startswith("~")


def find_store(name: str, cache: Cache) -> Store:
    """Return the store that ``name`` means: its path or URL, its name in ``cache`` or a prefix.

    Raises
    ------
    UnknownNameError
        There is none; near misses are suggested.
    UsageError
        Several are meant.
    """
    if not name.strip():
        raise UsageError("The name of a store is empty. `mer cache ls` shows all.")
    if not is_place(name) and (_is_called(name, cache) or not Path(name).is_dir()):
        return _by_name(name, cache)
    import mer.cache

    return mer.cache.open(name)


def _is_called(name: str, cache: Cache) -> bool:
    return any(known.startswith(name) for known in cache.home.names())


def _by_name(name: str, cache: Cache) -> Store:
    if not _is_called(name, cache):
        names = cache.home.names()
        if not names:
            raise UsageError(f"There is no store {name!r}: {cache.url} holds none.")
        # Suggested without their digits, which nobody misspells and which make names unlike.
        raise UnknownNameError("store", name, {_slug(known) for known in names}, "mer cache ls")
    return cache[name]


def _slug(store: str) -> str:
    return store.rpartition("-")[0]


def find_stores(name: str, cache: Cache) -> list[Store]:
    """Return the stores that ``name`` means: as `find_store`, or all of a cache's path or URL.

    A bare name is that of a folder only if no store is called so.
    """
    from mer.cache.home import Cache as AnyCache
    from mer.cache.place import is_store_name

    is_folder = is_place(name) or (Path(name).is_dir() and not _is_called(name, cache))
    if name and is_folder and not is_store_name(name.rstrip("/").rpartition("/")[2]):
        found = AnyCache.from_url(name).stores()
        if not found:
            raise UsageError(f"There are no stores in {name}.")
        return found
    return [find_store(name, cache)]


def num_bytes(stores: Iterable[Store]) -> int:
    """Return the bytes of all sound parts, for a bar's length."""
    total = 0
    for store in stores:
        with suppress(StoreError):
            total += sum(part.bytes for part in store.parts())
    return total


def recomputable(stores: Iterable[Store]) -> tuple[list[Store], tuple[str, ...]]:
    """Return the stores that `mer extract` can fill again, and a note on each other one.

    Imported features may be known by the ids of a stranger, which no manifest's keys match, and
    nothing can compute them.
    """
    chosen, notes = [], []
    for store in stores:
        with suppress(StoreError):
            if store.spec.identity.get("extractor") == EXTRACTOR:
                notes.append(
                    f"{store.name} is left as it is: it was imported; name it to choose it"
                )
                continue
        chosen.append(store)
    return chosen, tuple(notes)


# -- options of formats ----------------------------------------------------------------------------


def parse_options(pairs: Sequence[str], option: str = "--option") -> dict[str, str]:
    """Return ``KEY=VALUE`` pairs as a mapping.

    Raises
    ------
    UsageError
        A pair without ``=``.
    """
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{option} {pair!r} is not KEY=VALUE.")
        options[key.strip()] = value.strip()
    return options


def import_options(format: str, options: Sequence[str]) -> dict[str, str]:
    """Return the options of an import format as given: ``KEY=VALUE``.

    Raises
    ------
    UsageError
        A pair that is none, an unknown format or option.
    """
    chosen = parse_options(options)
    check_options("import format", format, IMPORTERS, chosen)
    return chosen


def mmsa_labels(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return what an MMSA pickle says of each utterance besides its features.

    ``label`` becomes the annotation, and the regression label where it is a number; further labels
    count under MMSA's own names (``label:regression_label_T`` …, ``label:classification_label``).
    """
    labels: dict[str, dict[str, Any]] = {}
    for utterance in manifest.utterances:
        row: dict[str, Any] = {
            "split": utterance.split,
            "annotation": utterance.label,
            "raw_text": utterance.text,
            "regression_label": _number(utterance.label),
        }
        for name, value in utterance.labels.items():
            if name.startswith("regression_label"):
                row[name] = _number(value)
            elif name == "classification_label":
                number = _number(value)
                row[name] = None if number is None else int(number)
        labels[utterance.id] = row
    return labels


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def export_options(
    format: str,
    options: Sequence[str],
    also: Sequence[str],
    keys: DatasetKeys | None,
    cache: Cache,
) -> dict[str, Any]:
    """Return the options of a format: those given, and what MMSA's takes from the data set.

    Parameters
    ----------
    options : sequence of str
        ``KEY=VALUE``.
    also : sequence of str
        ``MODALITY=STORE`` or ``MODALITY=STORE#OUTPUT``.

    Raises
    ------
    UsageError
        A pair that is none, a store that is not there, or no data set where one is needed.
    """
    chosen: dict[str, Any] = dict(parse_options(options))
    check_options("export format", format, EXPORTERS, chosen)
    if also and format != "mmsa":
        raise UsageError("--also goes with --format mmsa.")
    if format == "mmsa":
        if keys is None:
            raise UsageError("An MMSA pickle holds splits and labels: name the --dataset.")
        chosen["labels"] = mmsa_labels(keys.manifest)
    if also:
        if keys is None:
            raise UsageError("--also goes with --dataset, which says whose utterances they are.")
        streams = {}
        for modality, place in parse_options(also, "--also").items():
            name, _, output = place.partition("#")
            store = find_store(name, cache)
            streams[modality] = (store, output or None, keys.utterances_of(store))
        chosen["also"] = streams
    return chosen
