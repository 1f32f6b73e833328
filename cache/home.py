"""A cache: a folder, or a prefix of a bucket, with stores in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mer.cache import layout
from mer.cache.errors import StoreFormatError, UnknownNameError, UsageError
from mer.cache.identity import FINGERPRINT_IN_NAME, fingerprint, store_name
from mer.cache.place import Home, LocalHome, home_at, is_store_name, place_at
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store

_OUTPUT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_RESERVED = {layout.KEY, layout.INPUT_LENGTH, layout.METADATA}


class Cache:
    """A place for stores.

    Parameters
    ----------
    root : Path, str or Home
        Folder, or URL. Need not exist; it is created with the first store.

    Raises
    ------
    StoreFormatError
        The path, or a folder above it, is a file.
    UsageError
        A URL of a kind that is not supported.
    """

    def __init__(self, root: Path | str | Home) -> None:
        self.home: Home
        if isinstance(root, str):
            self.home = home_at(root)
        else:
            self.home = LocalHome(root) if isinstance(root, Path) else root

    def __repr__(self) -> str:
        return f"Cache({self.home.url!r})"

    @property
    def url(self) -> str:
        """Path or URL."""
        return self.home.url

    @property
    def root(self) -> Path:
        """Folder for what is kept beside the stores; of a folder itself."""
        return self.home.folder

    @property
    def is_local(self) -> bool:
        """Whether it is a folder."""
        return self.home.is_local

    @classmethod
    def from_url(cls, url: str | None = None) -> Cache:
        """Return the cache at a path or URL (``file://``, ``s3://``, ``gs://``, ``http(s)://``).

        ``None`` is ``$MER_CACHE``, else the platform's cache directory. Raises like the class.
        """
        if url is None:
            url = os.environ.get("MER_CACHE") or None
        if url is None:
            import platformdirs

            return cls(Path(platformdirs.user_cache_dir("mer", appauthor=False)))
        return cls(url)

    def stores(self) -> list[Store]:
        """Return all stores by name, unopened: ``info`` of a damaged one says what is wrong."""
        return [Store(self.home.place(name)) for name in self.home.names()]

    def __iter__(self) -> Iterator[Store]:
        return iter(self.stores())

    def __getitem__(self, name: str) -> Store:
        """Return the store whose name is, or alone begins with, ``name``.

        Raises
        ------
        UnknownNameError
            There is none.
        UsageError
            Several names begin so.
        """
        names = self.home.names()
        found = [n for n in names if n == name] or [n for n in names if n.startswith(name)]
        if not found:
            raise UnknownNameError("store", name, names, "mer cache ls")
        if len(found) > 1:
            raise UsageError(
                f"{len(found)} stores begin with {name!r}: {', '.join(found)}. Give more of a name."
            )
        return Store(self.home.place(found[0]))

    def open(self, spec: FeatureSpec, create: bool = False) -> Store | None:
        """Return the store of a feature, its parts listed and their manifests verified.

        Parameters
        ----------
        spec : FeatureSpec
            The store is found by the fingerprint of its identity, whatever slug it was created
            under.
        create : bool, default=False
            Make an empty store if there is none, and the metadata of one that has lost it.

        Returns
        -------
        Store or None
            None if there is no store and ``create`` is false.

        Raises
        ------
        DamagedStoreError, StoreFormatError
            There is one that cannot be trusted, or read.
        StorageFullError, StoreError
            It cannot be created.
        """
        name = self._find(spec)
        if name is None and not create:
            return None
        place = self.home.place(name or store_name(spec))
        store = Store(place)
        if name is None or (create and not place.has_metadata()):
            place.create(_root_document(spec))
        _check_same(store, spec)
        store.refresh()
        return store

    def _find(self, spec: FeatureSpec) -> str | None:
        name = store_name(spec)
        ending = "-" + fingerprint(spec.identity)[:FINGERPRINT_IN_NAME]
        if self.is_local and (self.root / name).is_dir():
            return name
        names = [found for found in self.home.names() if found.endswith(ending)]
        return name if name in names else next(iter(names), None)


def open_store(url: str | Path | None = None) -> Store:
    """Return one store by its path or URL.

    Parameters
    ----------
    url : str or Path, optional
        Of a store, or of a cache that holds exactly one; the default cache if not given.

    Raises
    ------
    UsageError
        There is no store, or there are several: their names are listed.
    """
    cache = Cache.from_url(None if url is None else str(url).rstrip("/") or "/")
    place = place_at(cache.url)
    if is_store_name(place.name) or (place.path is not None and place.has_metadata()):
        return _existing(Store(place))
    names = cache.home.names()
    if len(names) != 1:
        listed = f"Open one of them: {', '.join(names)}." if names else "`mer extract` makes them."
        raise UsageError(f"{cache.url} is a cache of {len(names)} stores. {listed}")
    return _existing(Store(cache.home.place(names[0])))


def _existing(store: Store) -> Store:
    if store.place.path is not None and not store.place.path.is_dir():
        raise UsageError(
            f"There is no store at {store.url}. `mer cache ls --cache {store.place.path.parent}` "
            "shows those that are there."
        )
    store.refresh()
    return store


def _root_document(spec: FeatureSpec) -> bytes:
    names = [output.name for output in spec.outputs]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"Outputs of {spec.slug!r} are {names}; expected distinct names.")
    for output in spec.outputs:
        _check_output(output)
    mer: dict[str, Any] = {
        "format": layout.FORMAT_VERSION,
        "slug": spec.slug,
        "identity": spec.identity,
        "fingerprint": fingerprint(spec.identity),
        "outputs": [layout.output_to_json(output) for output in spec.outputs],
        "licence": spec.licence,
        "created": _now(),
    }
    if spec.source is not None:
        mer["source"] = dict(spec.source)
    return layout.to_bytes(layout.group_document(mer))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _check_output(output: OutputSpec) -> None:
    if not _OUTPUT_NAME.fullmatch(output.name) or output.name in _RESERVED:
        raise ValueError(f"{output.name!r} cannot be the name of an output.")
    allowed = layout.CODE_DTYPES if output.kind == "codes" else layout.FLOAT_DTYPES
    if output.dtype not in allowed:
        raise ValueError(
            f"Output {output.name!r} of kind {output.kind!r} has the type {output.dtype!r}, "
            f"expected one of {', '.join(allowed)}."
        )
    if output.dim < 1:
        raise ValueError(f"Output {output.name!r} has the width {output.dim}.")


def _check_same(store: Store, spec: FeatureSpec) -> None:
    """Refuse a store of another identity, or one whose extractor changed without saying so."""
    if store.fingerprint != fingerprint(spec.identity):
        raise StoreFormatError(f"{store.url} belongs to another feature: {store.spec.identity}.")
    for ours, theirs in zip(spec.outputs, store.spec.outputs, strict=False):
        if _shape(ours) != _shape(theirs):
            raise StoreFormatError(
                f"{store.url} holds {theirs}, the extractor now yields {ours}. "
                "An extractor whose outputs change must raise its version."
            )
    if len(spec.outputs) != len(store.spec.outputs):
        raise StoreFormatError(
            f"{store.url} holds {len(store.spec.outputs)} outputs, the extractor now yields "
            f"{len(spec.outputs)}. An extractor whose outputs change must raise its version."
        )


def _shape(output: OutputSpec) -> tuple[Any, ...]:
    return output.name, output.dim, output.rate_hz, output.dtype, output.kind, output.num_codes
