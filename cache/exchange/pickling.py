"""Writing a pickle of plain containers and arrays, block by block.

The standard library's pickler would hold every array twice in memory and name numpy's functions as
numpy 2 calls them, which releases before 1.26 cannot read. The names written here are read by all.

Source: protocol 4 as the standard library's ``pickletools`` documents it; what stands for an array
is what ``ndarray.__reduce__`` of numpy 1 returned.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np


@dataclass(frozen=True, slots=True)
class Streamed:
    """An array whose rows are made while they are written.

    Parameters
    ----------
    shape : tuple of int
        All axes.
    dtype : dtype
        Of numbers.
    blocks : callable
        Yields the values in order; together as many as ``shape`` says.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterable[np.ndarray]]


def dump(value: Any, file: BinaryIO) -> None:
    """Write a value of dict, list, str, int, float, bool, None, arrays of numbers, `Streamed`."""
    file.write(b"\x80\x04")
    _write(value, file)
    file.write(b".")


def _write(value: Any, file: BinaryIO) -> None:
    if value is None or type(value) is bool:
        file.write({None: b"N", True: b"\x88", False: b"\x89"}[value])
    elif type(value) is int:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        file.write(b"\x8a" + bytes([len(data)]) + data)
    elif type(value) is float:
        file.write(b"G" + struct.pack(">d", value))
    elif type(value) is str:
        data = value.encode("utf-8", "surrogatepass")
        file.write(b"X" + len(data).to_bytes(4, "little") + data)
    elif isinstance(value, Mapping):
        file.write(b"}(")
        for key, item in value.items():
            _write(key, file)
            _write(item, file)
        file.write(b"u")
    elif isinstance(value, Streamed):
        _write_array(value, file)
    elif isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        _write_array(Streamed(value.shape, value.dtype, lambda: [array]), file)
    elif isinstance(value, Sequence):
        file.write(b"](")
        for item in value:
            _write(item, file)
        file.write(b"e")
    else:
        raise TypeError(f"A {type(value).__name__} is not written to a pickle.")


def _write_array(array: Streamed, file: BinaryIO) -> None:
    kind = array.dtype.newbyteorder("<")
    if kind.kind not in "biufc":
        raise TypeError(f"An array of {kind} is not written to a pickle.")
    file.write(b"cnumpy.core.multiarray\n_reconstruct\n")
    file.write(b"cnumpy\nndarray\n" + b"K\x00\x85" + b"C\x01b" + b"\x87R")
    file.write(b"(K\x01(")
    for length in array.shape:
        _write(int(length), file)
    file.write(b"t" + b"cnumpy\ndtype\n")
    _write(f"{kind.kind}{kind.itemsize}", file)
    order = "<" if kind.itemsize > 1 else "|"
    file.write(b"\x89\x88\x87R" + b"(K\x03X\x01\x00\x00\x00" + order.encode("ascii"))
    file.write(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb" + b"\x89")
    expected = int(np.prod(array.shape, dtype=np.int64)) * kind.itemsize
    file.write(b"\x8e" + expected.to_bytes(8, "little"))
    written = 0
    for block in array.blocks():
        data = np.ascontiguousarray(block, kind)
        written += data.nbytes
        file.write(data.data if data.size else b"")
    assert written == expected, (written, expected)
    file.write(b"tb")
