"""Copying frames into another floating type.

numpy widens float16 at 2 GB/s and narrows at 1 GB/s; torch, where the process has loaded it, does
both at 9 GB/s a core with the same bits. Nothing here loads it.
"""

from __future__ import annotations

import sys

import numpy as np

_WORTH_TORCH = 1024  # elements: below, the call costs more than the copy


class _Alias:
    """Claims that memory may be written, which torch wants to hear without warning."""

    def __init__(self, array: np.ndarray) -> None:
        self._owner = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def readable(array: np.ndarray) -> np.ndarray:
    """Return a view of read-only memory that torch takes without a warning.

    Nobody may write to it: the memory is mapped read-only and the process would die.
    """
    return np.asarray(_Alias(array)) if array.size else array


def copy_into(out: np.ndarray, frames: np.ndarray) -> None:
    """Copy ``frames`` into ``out`` of the same shape, converting between floating types.

    float16 to float32 is exact; the other way rounds to nearest even, infinite beyond 65504.
    """
    if out.dtype == frames.dtype:
        out[...] = frames
        return
    torch = sys.modules.get("torch") if frames.size >= _WORTH_TORCH else None
    from_numpy = getattr(torch, "from_numpy", None)  # None while torch is being imported
    if from_numpy is None or not _both_floats(out, frames):
        with np.errstate(over="ignore"):
            out[...] = frames
    else:
        from_numpy(out).copy_(from_numpy(frames))


def _both_floats(out: np.ndarray, frames: np.ndarray) -> bool:
    return (
        out.dtype.kind == "f"
        and frames.dtype.kind == "f"
        and out.dtype.isnative
        and frames.dtype.isnative
        and out.flags.writeable
        and frames.flags.writeable  # of memory that is not, torch warns: see ``readable``
        and out.dtype.itemsize <= 8
    )
