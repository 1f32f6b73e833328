"""Copying frames into another floating type.

numpy widens float16 at 2 GB/s and narrows at 1 GB/s; torch, where the process has loaded it, does
both at 9 GB/s a core with the same bits. Nothing here loads it.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from mer.cache.spec import OutputSpec

_WORTH_TORCH = 1024  # elements: below, the call costs more than the copy
_ONE_THREAD = 32_767  # elements that torch copies in the calling thread

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def read_dtype(output: OutputSpec) -> np.dtype:
    """Return the type in which an output is read where none is asked for.

    float32 for floats: sums over float16 overflow. Codes as they are declared.
    """
    return np.dtype(output.dtype if output.kind == "codes" else np.float32)


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
    elif not _forked:
        from_numpy(out).copy_(from_numpy(frames))
    else:  # torch's threads stayed with the parent, and a child that asks for them waits for ever
        target, source = from_numpy(out), from_numpy(frames)
        rows = max(1, _ONE_THREAD // max(1, frames[0].size))
        for at in range(0, len(frames), rows):
            if frames[0].size <= _ONE_THREAD:
                target[at : at + rows].copy_(source[at : at + rows])
            else:
                out[at] = frames[at]


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
