"""Corpora as they are distributed, each turned into a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

from mer.cache.errors import UnknownNameError, UsageError
from mer.pipelines.corpora.corpus import Corpus
from mer.pipelines.manifest import SUFFIXES, Manifest, read_manifest

CORPORA: Mapping[str, str] = MappingProxyType(
    {
        "ravdess": "mer.pipelines.corpora.ravdess:SPEECH",
        "ravdess-song": "mer.pipelines.corpora.ravdess:SONG",
        "emodb": "mer.pipelines.corpora.emodb:EMODB",
        "cremad": "mer.pipelines.corpora.cremad:CREMAD",
        "nemo": "mer.pipelines.corpora.nemo:NEMO",
        "demo": "mer.pipelines.corpora.demo:DEMO",
        "folder": "mer.pipelines.corpora.folder:FOLDER",
    }
)


def names() -> tuple[str, ...]:
    """Return the names of all corpora, in the order of the table."""
    return tuple(CORPORA)


def describe() -> list[dict[str, object]]:
    """Return one row per corpus: name, summary, licence, layout, published utterances, defaults."""
    rows: list[dict[str, object]] = []
    for name in CORPORA:
        entry = corpus(name)
        rows.append(
            {
                "name": entry.name,
                "summary": entry.title,
                "licence": entry.licence,
                "layout": entry.layout,
                "utterances": entry.published.total if entry.published else None,
                "labels": entry.scheme,
                "protocol": entry.protocol,
            }
        )
    return rows


def corpus(name: str) -> Corpus:
    """Return what is known about corpus ``name``; case does not matter.

    Raises
    ------
    UnknownNameError
        No such corpus; near misses are suggested.
    """
    try:
        module, _, attribute = CORPORA[name.lower()].partition(":")
    except KeyError:
        raise UnknownNameError("corpus", name, CORPORA, "mer corpora ls") from None
    found = getattr(import_module(module), attribute)
    assert isinstance(found, Corpus)
    return found


def is_manifest(dataset: str) -> bool:
    """Tell whether ``dataset`` means a manifest file rather than the name of a corpus."""
    return Path(dataset).suffix.lower() in SUFFIXES


def load(dataset: str, root: Path | str | None = None) -> Manifest:
    """Return the manifest of a dataset.

    Parameters
    ----------
    dataset : str
        Name of a corpus, or path of a ``.csv``, ``.parquet`` or ``.jsonl`` manifest.
    root : Path or str, optional
        Folder of the corpus; for a manifest, the folder its relative paths start at (default: its
        own). ``demo`` synthesises its recordings there when they are not there yet.

    Raises
    ------
    UnknownNameError
        Neither a corpus nor a manifest.
    UsageError
        A corpus without a root.
    ManifestError
        A root without the corpus's files, or a manifest that cannot be read.
    """
    if is_manifest(dataset):
        return read_manifest(dataset, root)
    if dataset.lower() not in CORPORA and Path(dataset).exists():
        kind = "folder" if Path(dataset).is_dir() else "file"
        raise UsageError(
            f"Dataset {dataset!r} is a {kind}, not the name of a corpus. For a tree with one "
            f"folder per class give `folder --root {dataset}`; a manifest ends in "
            f"{', '.join(SUFFIXES)}."
        )
    entry = corpus(dataset)
    if root is None:
        raise UsageError(
            f"Corpus {entry.name!r} needs the folder it lies in: --root DIR with {entry.layout}."
        )
    return entry.read(Path(root))
