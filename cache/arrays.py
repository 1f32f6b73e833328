"""A store as one lazy array, for statistics over more frames than fit in memory."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from mer.cache.casting import copy_into, read_dtype
from mer.cache.errors import MissingDependencyError
from mer.cache.spec import OutputSpec

if TYPE_CHECKING:
    import dask.array
    import xarray

    from mer.cache.store import Store


def flat_frames(
    store: Store, output: OutputSpec, dtype: DTypeLike | None = None
) -> dask.array.Array:
    """See ``Store.dask``."""
    import dask.array
    from dask.delayed import delayed

    make: Any = dask.array  # not typed
    kind = read_dtype(output) if dtype is None else np.dtype(dtype)
    seen, rows = store.all_rows()
    lengths = seen.spans(output.name)[1]
    numbers = seen.part_of_row[rows]
    read = delayed(_read, pure=False, traverse=False)
    arrays = []
    for number in np.unique(numbers).tolist():
        mine = rows[numbers == number]
        count = int(lengths[mine].sum())
        block = read(store, output.name, seen.keys_of(mine), count, kind)
        arrays.append(make.from_delayed(block, (count, output.dim), kind))
    if not arrays:
        return make.empty((0, output.dim), dtype=kind)
    return make.concatenate(arrays)


@lru_cache(maxsize=8)
def _opened(url: str) -> Store:
    """Return a store opened once per process: tasks carry its URL alone."""
    from mer.cache.store import Store

    return Store(url)


def _read(store: Store, output: str, keys: list[bytes], count: int, dtype: np.dtype) -> np.ndarray:
    """Return the frames of some utterances behind each other, (count, D)."""
    store = _opened(store.url)
    out = np.empty((count, store.output(output).dim), dtype)
    stops = np.cumsum(store.num_frames(keys, output)).tolist()
    stop_of = dict(zip(keys, stops, strict=True))  # a merge meanwhile may have changed the order
    for key, frames in store.scan(output, keys):
        copy_into(out[stop_of[key] - len(frames) : stop_of[key]], frames)
    return out


def labelled_frames(
    store: Store, output: OutputSpec, dtype: DTypeLike | None = None
) -> xarray.DataArray:
    """See ``Store.xarray``."""
    try:
        import xarray
    except ImportError as error:
        raise MissingDependencyError(
            "xarray is not installed: pip install 'mer[tables]'."
        ) from error

    seen, rows = store.all_rows()
    lengths = seen.spans(output.name)[1][rows]
    utterance = np.repeat(np.arange(len(lengths)), lengths)
    coords: dict[str, object] = {"utterance": ("frame", utterance)}
    if output.columns is not None:
        coords["feature"] = list(output.columns)
    return xarray.DataArray(
        flat_frames(store, output, dtype),
        dims=("frame", "feature"),
        coords=coords,
        name=output.name,
        attrs={
            "store": store.name,
            "fingerprint": store.fingerprint,
            "licence": store.spec.licence or "",
            "rate_hz": output.rate_hz or "",
        },
    )
