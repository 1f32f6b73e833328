"""The embedding cache: identity, store, reader, writer. ``FORMAT.md`` specifies the files.

>>> import mer.cache
>>> store = mer.cache.open("features/wavlm-large-…")          # doctest: +SKIP
>>> store[store.keys()[0]]                                    # doctest: +SKIP

It knows nothing of models and imports neither torch nor a Zarr library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mer.cache.home import Cache as Cache
    from mer.cache.home import open_store as open  # noqa: A004
    from mer.cache.store import Store as Store

__all__ = ["Cache", "Store", "open"]

_HOMES = {"Cache": ("home", "Cache"), "open": ("home", "open_store"), "Store": ("store", "Store")}


def __getattr__(name: str) -> Any:  # lazily: `mer --help` imports no numpy
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(f"mer.cache.{module}"), attribute)
