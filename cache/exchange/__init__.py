"""Features on their way out of a cache, into the layouts of others, and in from them.

A format is a row of `EXPORTERS` or `IMPORTERS`: the function that does it and the options it takes.
Modules are imported when their format is asked for.

>>> report = export(store, Path("wavlm.h5"), "hdf5")                            # doctest: +SKIP
>>> report = import_(Path("wavlm-UTT"), "npy", cache, name="wavlm", keys=keys)  # doctest: +SKIP
>>> report.feature                                                              # doctest: +SKIP
'imported:name=wavlm,format=npy,content=…,outputs=features/1024/float32/pooled'
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mer.cache.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from mer.cache.exchange.incoming import ImportReport
    from mer.cache.exchange.outgoing import ExportReport, Ids
    from mer.cache.home import Cache
    from mer.cache.store import Store

_HERE = "mer.cache.exchange"


@dataclass(frozen=True, slots=True)
class Format:
    """A layout.

    Parameters
    ----------
    function : str
        ``module:function``.
    summary : str
        What it looks like in a few words.
    takes : mapping of str to str
        Options that have a value in text, and what that value is.
    """

    function: str
    summary: str
    takes: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> Callable[..., Any]:
        """Return the function."""
        module, _, name = self.function.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found

    def options(self) -> tuple[str, ...]:
        """Return the names of all options of the function, those that are no text, too."""
        parameters = inspect.signature(self.load()).parameters.values()
        return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


EXPORTERS: dict[str, Format] = {
    "hdf5": Format(f"{_HERE}.hdf5:write_flat", "one HDF5 file, one dataset per output"),
    "hdf5-utterances": Format(
        f"{_HERE}.hdf5:write_utterances", "one HDF5 file, one dataset per utterance"
    ),
    "npy": Format(
        f"{_HERE}.npy:write",
        "MERTools' folders <model>-FRA or -UTT, a file each",
        {"level": "FRA|UTT", "model": "NAME"},
    ),
    "safetensors": Format(
        f"{_HERE}.tensors:write", "a folder of files up to 2 GiB", {"shard_bytes": "N"}
    ),
    "parquet": Format(
        f"{_HERE}.arrow:write_parquet", "one file for Hugging Face datasets", {"block_bytes": "N"}
    ),
    "arrow": Format(
        f"{_HERE}.arrow:write_arrow", "one stream for Hugging Face datasets", {"block_bytes": "N"}
    ),
    "mmsa": Format(
        f"{_HERE}.mmsa:write",
        "MMSA's feature pickle, with a manifest's labels",
        {"modality": "audio|text|vision", "max_frames": "N"},
    ),
}

IMPORTERS: dict[str, Format] = {
    "hdf5": Format(f"{_HERE}.hdf5:read", "an HDF5 file, flat or a dataset per utterance"),
    "npy": Format(f"{_HERE}.npy:read", "a folder of .npy files", {"level": "FRA|UTT"}),
    "safetensors": Format(f"{_HERE}.tensors:read", "a file or folder of safetensors"),
    "parquet": Format(f"{_HERE}.arrow:read", "a Parquet file", {"id_column": "NAME"}),
    "arrow": Format(f"{_HERE}.arrow:read", "an Arrow stream or file", {"id_column": "NAME"}),
    "emotion2vec": Format(f"{_HERE}.emotion2vec:read", "train.npy with train.lengths"),
    "pt": Format(f"{_HERE}.torch_pt:read", "a folder of .pt files, or one with a dict"),
    "mmsa": Format(f"{_HERE}.mmsa:read", "MMSA's feature pickle"),
    "conversations": Format(
        f"{_HERE}.conversations:read",
        "the pickles of DialogueRNN, COSMIC and their kin",
        {"pattern": "{dialogue}_{turn}"},
    ),
}
IMPORTERS["hdf5-utterances"] = IMPORTERS["hdf5"]
EVERY_IMPORT = {
    "outputs": "NAME,…",
    "dtype": "auto|float16|float32",
    "rate_hz": "HZ",
    "num_codes": "N",
}
"""Options that every import takes, and what their values are."""


def check_options(
    kind: str, format: str, table: Mapping[str, Format], given: Iterable[str]
) -> None:
    """Refuse options that a user cannot give to a format in text.

    Parameters
    ----------
    kind : str
        ``"export format"`` or ``"import format"``, for the message.
    format : str
        Row of ``table``.
    table : mapping
        `EXPORTERS` or `IMPORTERS`.
    given : iterable of str
        Names of options.

    Raises
    ------
    UnknownNameError
        An unknown format or option.
    UsageError
        An option of a format that has none.
    """
    if format not in table:
        raise UnknownNameError(kind, format, table)
    takes = [*table[format].takes, *(EVERY_IMPORT if table is IMPORTERS else ())]
    for option in given:
        if not takes:
            raise UsageError(f"The {kind} {format!r} has no options: leave out {option!r}.")
        if option not in takes:
            raise UnknownNameError(f"option of the {kind} {format!r}", option, takes)


def export(
    store: Store,
    target: Path,
    format: str,
    *,
    ids: Ids | None = None,
    outputs: Sequence[str] | None = None,
    keys: Sequence[bytes] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> ExportReport:
    """Write features of a store in a layout that others read.

    Utterances come in the order in which they are stored, and are never all in memory. Values are
    kept bit for bit; where a layout has one type for all utterances and some are float32 because
    float16 would have overflowed, all are float32 and a note says so. What appears is whole: it is
    written beside the target and renamed.

    Parameters
    ----------
    store : Store
        Source.
    target : Path
        New file or folder; for ``npy`` the folder in which the ``<model>-FRA`` folders appear.
    format : str
        One of `EXPORTERS`.
    ids : mapping, optional
        Key to utterance id, or to several; what it lacks is not exported. By default an id is the
        key in hexadecimal digits, and everything is exported.
    outputs : sequence of str, optional
        By default all.
    keys : sequence of bytes, optional
        Only these.
    overwrite : bool, default=False
        Whether an existing file, or folder that an export made, is replaced.
    progress : callable, optional
        Called with the number of utterances just written.
    **options
        Of the format.

    Raises
    ------
    UnknownNameError
        An unknown format, option or output.
    UsageError
        The target exists, ids clash, an option does not fit, or nothing is to export.
    MissingFeatureError
        One of ``keys`` is not stored.
    MissingDependencyError
        The format needs a package that is not installed.
    StorageFullError, StoreError
        The file system refuses; nothing is left behind.
    """
    from mer.cache.exchange.outgoing import ExportReport, select, size_of

    write = _function("export format", format, EXPORTERS, options)
    source, missing = select(store, ids, outputs, keys, progress)
    paths = write(source, Path(target).expanduser().absolute(), overwrite, **options)
    return ExportReport(
        format=format,
        paths=tuple(paths),
        utterances=len(source) - source.left_out,
        frames=source.frames(),
        bytes=size_of(paths),
        missing=missing,
        notes=tuple(source.notes),
    )


def import_(
    source: Path,
    format: str,
    cache: Cache,
    *,
    name: str,
    keys: Mapping[str, bytes] | None = None,
    licence: str | None = None,
    modality: str = "audio",
    outputs: str | Sequence[str] | None = None,
    dtype: str = "auto",
    rate_hz: float | str | None = None,
    num_codes: int | str | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> ImportReport:
    """Add features that others computed to a cache.

    Nothing is known of the model, so the store's identity is the name given, the bytes that were
    read and how. An utterance that cannot be used (NaN, another width, not in the manifest) is
    skipped and reported. Importing again adds what is missing, and nothing twice.

    Parameters
    ----------
    source : Path
        File or folder.
    format : str
        One of `IMPORTERS`.
    cache : Cache
        Where the store appears.
    name : str
        What the features are called from now on: letters, digits and ``._+-``.
    keys : mapping, optional
        Utterance id to 16-byte key, from a manifest: then a recipe finds the features of its
        recordings. Without it, keys of our own exports are kept; else they are hashes of the ids.
    licence : str, optional
        Note on the features' licence; by default what the source says.
    modality : {"audio", "text"}
        What the keys of the manifest stand for.
    outputs : sequence of str, optional
        By default all that are found.
    dtype : {"auto", "float16", "float32"}
        How floats are stored. By default float16 if that is what the source holds.
    rate_hz : float, optional
        Frames per second, if known.
    num_codes : int, optional
        How many codes there are, if the outputs are codes.
    progress : callable, optional
        Called with the number of utterances just dealt with.
    **options
        Of the format.

    Raises
    ------
    UnknownNameError
        An unknown format or option.
    UsageError
        The source cannot be read or nothing of it can be imported, or an option does not fit.
    MissingDependencyError
        The format needs a package that is not installed.
    StorageFullError, StoreError
        The cache cannot be written.
    """
    from mer.cache.exchange.incoming import bring_in

    read = _function("import format", format, IMPORTERS, options)
    source = Path(source).expanduser().absolute()
    if not source.exists() and format != "emotion2vec":
        raise UsageError(f"{source} does not exist.")
    if modality not in ("audio", "text"):
        raise UsageError(f"modality={modality}, expected audio or text.")
    return bring_in(
        read(source, **options),
        cache,
        name=name,
        format=format,
        options=options,
        file=source.name,
        keys=keys,
        licence=licence,
        modality=modality,
        outputs=outputs,
        dtype=dtype,
        rate_hz=rate_hz,
        num_codes=num_codes,
        progress=progress,
    )


def _function(
    kind: str, format: str, table: Mapping[str, Format], options: Mapping[str, Any]
) -> Callable[..., Any]:
    if format not in table:
        raise UnknownNameError(kind, format, table)
    known = table[format].options()
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of the {kind} {format!r}", option, known)
    return table[format].load()
