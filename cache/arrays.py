"""A store as one lazy array, for statistics over more frames than fit in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mer.cache.errors import MissingDependencyError
from mer.cache.spec import OutputSpec

if TYPE_CHECKING:
    import dask.array
    import xarray

    from mer.cache.reader import PartReader
    from mer.cache.store import Store


def flat_frames(store: Store, output: OutputSpec) -> dask.array.Array:
    """See ``Store.dask``."""
    import dask.array
    from dask.delayed import delayed

    make: Any = dask.array  # not typed
    seen = store.listing
    starts, lengths = seen.spans(output.name)
    numbers = seen.part_of_row[seen.rows]
    used = np.unique(numbers).tolist()
    dtypes = [seen.parts[number].dtype(output.name) for number in used]
    dtype = np.result_type(*dtypes) if dtypes else np.dtype(output.dtype)
    read = delayed(_read, pure=False, traverse=False)
    arrays = []
    for number in used:
        rows = seen.rows[numbers == number]
        count = int(lengths[rows].sum())
        block = read(seen.parts[number], output.name, starts[rows], lengths[rows], dtype)
        arrays.append(make.from_delayed(block, (count, output.dim), dtype))
    if not arrays:
        return make.empty((0, output.dim), dtype=dtype)
    return make.concatenate(arrays)


def _read(
    part: PartReader, output: str, starts: np.ndarray, lengths: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """Return the frames of some utterances of a part behind each other, (F, D)."""
    whole = int(lengths.sum())
    if whole == part.num_frames(output):
        return part.frames(output, 0, whole).astype(dtype, copy=False)
    spans = zip(starts.tolist(), lengths.tolist(), strict=True)
    frames = [part.frames(output, start, start + length) for start, length in spans]
    return np.concatenate(frames).astype(dtype, copy=False)


def labelled_frames(store: Store, output: OutputSpec) -> xarray.DataArray:
    """See ``Store.xarray``."""
    try:
        import xarray
    except ImportError as error:
        raise MissingDependencyError(
            "xarray is not installed: pip install 'mer[tables]'."
        ) from error

    seen = store.listing
    lengths = seen.spans(output.name)[1][seen.rows]
    utterance = np.repeat(np.arange(len(lengths)), lengths)
    coords: dict[str, object] = {"utterance": ("frame", utterance)}
    if output.columns is not None:
        coords["feature"] = list(output.columns)
    return xarray.DataArray(
        flat_frames(store, output),
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
