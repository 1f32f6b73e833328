"""Pickles that nobody vouches for: arrays, numbers, text and plain containers out, nothing run.

A pickle is a program for a small stack machine, and the machine of the standard library calls what
the program names. This one cannot: it has no import, no attribute access and no call. It knows the
instructions that build plain values, and a short table of names (`GLOBALS`) that numpy and the
containers of the standard library write. Such a name stays a symbol; applying it to arguments means
that *we* look at the arguments and make the value. Everything else is an error that names what the
file asked for, before anything is made of it.

Arrays are views into the mapped file where the pickle holds their bytes (protocols 2 to 5), so
that reading a large one costs no memory until its pages are touched.

Source: the instructions are those documented in the standard library's ``pickletools`` (protocols
0 to 5); how arrays, types and scalars are written is what numpy's ``__reduce__`` methods return.
Strings of Python 2 are read as Latin-1, as numpy's own files need.
"""

from __future__ import annotations

import codecs
import logging
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Hashable, Iterable
from enum import Enum, auto
from pathlib import Path
from typing import Any, Final

import numpy as np

from mer.cache.errors import UsageError

logger = logging.getLogger(__name__)

MAX_DEPTH = 64  # containers within containers
MAX_MARKS = 256  # unfinished containers
MAX_INT_BYTES = 64
MAX_KEY_ITEMS = 16
EXPANSION = 16  # times the file's size that its content may take, shared parts counted each time
_SLACK_BYTES = 1 << 20
_SMALL_BYTES = 4096  # up to here bytes are copied, beyond they stay in the file
_MAX_NDIM = 32
_BOMB = "it repeats parts of itself so often that reading it would fill the memory"

POLICY = (
    "A pickle is a program; mer reads arrays, numbers, text, lists, tuples, sets and dicts out of "
    "it and runs nothing. If you trust whoever made the file, convert it to .npy files or HDF5 "
    "with the code that wrote it, and import those."
)


class _Symbol(Enum):
    """What a name of `GLOBALS` stands for; never the object of that name itself."""

    RECONSTRUCT = auto()
    NDARRAY = auto()
    DTYPE = auto()
    SCALAR = auto()
    FROMBUFFER = auto()
    ENCODE = auto()
    ORDERED_DICT = auto()
    DEFAULT_DICT = auto()
    LIST = auto()
    TUPLE = auto()
    DICT = auto()
    SET = auto()
    FROZENSET = auto()
    BYTES = auto()
    BYTEARRAY = auto()
    COMPLEX = auto()
    STR = auto()
    INT = auto()
    FLOAT = auto()


def _globals() -> dict[tuple[str, str], _Symbol]:
    table: dict[tuple[str, str], _Symbol] = {
        ("numpy", "ndarray"): _Symbol.NDARRAY,
        ("numpy", "memmap"): _Symbol.NDARRAY,
        ("numpy", "dtype"): _Symbol.DTYPE,
        ("_codecs", "encode"): _Symbol.ENCODE,
        ("collections", "OrderedDict"): _Symbol.ORDERED_DICT,
        ("collections", "defaultdict"): _Symbol.DEFAULT_DICT,
    }
    for core in ("numpy.core", "numpy._core"):  # before and since numpy 2
        table[f"{core}.multiarray", "_reconstruct"] = _Symbol.RECONSTRUCT
        table[f"{core}.multiarray", "scalar"] = _Symbol.SCALAR
        table[f"{core}.numeric", "_frombuffer"] = _Symbol.FROMBUFFER
        table[f"{core}.memmap", "memmap"] = _Symbol.NDARRAY
    for builtins in ("builtins", "__builtin__"):  # Python 3 and 2
        for name in (
            *("list", "tuple", "dict", "set", "frozenset"),
            *("bytes", "bytearray", "complex", "str", "int", "float"),
        ):
            table[builtins, name] = _Symbol[name.upper()]
    return table


GLOBALS: Final = _globals()


def _limit(num_bytes: int) -> int:
    """Return what a file of so many bytes may unfold to."""
    return EXPANSION * num_bytes + _SLACK_BYTES


class _RefusedError(Exception):
    """Why a file is not read; ``load`` adds which file."""


class _Blob:
    """A long string of bytes, or of Python 2 text, that stays in the file until it is wanted."""

    __slots__ = ("is_text", "view")
    __hash__ = None  # type: ignore[assignment]  # never a key by accident

    def __init__(self, view: memoryview, is_text: bool) -> None:
        self.view = view
        self.is_text = is_text

    def value(self) -> str | bytes:
        return str(self.view, "latin-1") if self.is_text else bytes(self.view)


_TYPE = re.compile(r"([|<>=]?)([biufcSU?O])(\d{0,9})")
_SIZES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8), "c": (8, 16)}


class _DType:
    """A numpy type that is being described."""

    __slots__ = ("kind", "order", "size")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, text: Any) -> None:
        match = _TYPE.fullmatch(_text(text, "the name of a numpy type"))
        if not match:
            raise _RefusedError(f"it holds an array of type {_shown(text)}")
        self.order, self.kind = match[1], match[2]
        if self.kind == "?":
            self.kind, size = "b", 1
        else:
            size = int(match[3] or 0)
        if self.kind == "O":
            size = 8
        elif self.kind in _SIZES and size not in _SIZES[self.kind]:
            raise _RefusedError(f"it holds an array of type {_shown(text)}")
        self.size = size

    def build(self, state: Any) -> None:
        """Take the byte order; anything structured is refused."""
        if type(state) is not tuple or not 8 <= len(state) <= 9:
            raise _RefusedError("it describes a numpy type in an unknown way")
        if any(field is not None for field in state[2:5]):
            raise _RefusedError("it holds an array of a structured type (records)")
        order = _text(state[1], "a byte order")
        if order not in ("<", ">", "=", "|"):
            raise _RefusedError(f"it gives a numpy type the byte order {order!r}")
        self.order = order

    def numpy(self) -> np.dtype:
        order = {"|": "", "=": "<"}.get(self.order, self.order)
        return np.dtype(f"{order}{self.kind}{self.size}")


class _Array:
    """A numpy array that is being described; its bytes stay where they are."""

    __slots__ = ("axes", "data", "dtype", "fortran", "shape")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.dtype: _DType | None = None
        self.shape: tuple[int, ...] = ()
        self.data: memoryview | list[Any] = []
        self.fortran = False
        self.axes: tuple[int, ...] | None = None

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) not in (4, 5):
            raise _RefusedError("it describes a numpy array in an unknown way")
        shape, dtype, fortran, data = state[-4:]  # a version comes first since numpy 1.0
        self.set(shape, dtype, bool(fortran), data)

    def set(self, shape: Any, dtype: Any, fortran: bool, data: Any) -> None:
        if not isinstance(dtype, _DType):
            raise _RefusedError("it describes an array without a numpy type")
        if (
            type(shape) is not tuple
            or len(shape) > _MAX_NDIM
            or any(type(n) is not int or not 0 <= n < 2**62 for n in shape)
        ):
            raise _RefusedError(f"it describes an array of the shape {_shown(shape)}")
        count = math.prod(shape)
        if dtype.kind == "O":
            if type(data) is not list or len(shape) != 1 or len(data) != count:
                raise _RefusedError("it holds an array of Python objects that is no plain list")
            self.data = data
        else:
            view = _view(data)
            size = dtype.size * (4 if dtype.kind == "U" else 1)
            if len(view) != count * size:
                raise _RefusedError(
                    f"it claims an array of the shape {shape} and brings {len(view)} bytes for it"
                )
            self.data = view
        self.dtype, self.shape, self.fortran = dtype, shape, fortran

    def value(self) -> np.ndarray | list[Any]:
        if self.dtype is None:
            raise _RefusedError("it names an array and does not say what is in it")
        if isinstance(self.data, list):
            return self.data
        array = _values(self.data, self.dtype)
        try:
            array = array.reshape(self.shape, order="F" if self.fortran else "C")
            return array if self.axes is None else array.transpose(self.axes)
        except ValueError as error:
            raise _RefusedError(f"it describes an impossible array ({error})") from error


def _values(data: memoryview, dtype: _DType) -> np.ndarray:
    """Return the values of an array as a view of ``data``, in one dimension."""
    kind = dtype.numpy()
    if not kind.itemsize or not len(data):
        return np.zeros(0, kind)
    if kind.kind == "b":  # a byte beyond 1 would be neither true nor false
        return np.frombuffer(data, np.uint8) != 0
    if kind.kind == "U":
        points = np.frombuffer(data, np.dtype("u4").newbyteorder(kind.byteorder))
        if points.size and int(points.max()) > 0x10FFFF:
            raise _RefusedError("it holds text that is not Unicode")
    return np.frombuffer(data, kind)


def _shown(value: Any) -> str:
    """Return a short description of a value for a message, without trusting its ``repr``."""
    if type(value) in (str, bytes, int, float, bool, type(None)):
        return repr(value)[:80]
    if type(value) is tuple and all(type(v) in (int, str) for v in value[:8]):
        return repr(value[:8])[:80]
    return type(value).__name__.strip("_").lower()


def _text(value: Any, what: str) -> str:
    if isinstance(value, _Blob):
        value = value.value()
    if type(value) is bytes:
        value = value.decode("latin-1")
    if type(value) is not str:
        raise _RefusedError(f"it gives {_shown(value)} for {what}")
    return value


def _view(data: Any) -> memoryview:
    """Return the bytes an array is made of; text is what Python 2 called a string."""
    if isinstance(data, _Blob):
        return data.view
    if type(data) is str:
        try:
            data = data.encode("latin-1")
        except UnicodeEncodeError:
            raise _RefusedError("it gives text for the bytes of an array") from None
    if type(data) not in (bytes, bytearray):
        raise _RefusedError(f"it gives {_shown(data)} for the bytes of an array")
    return memoryview(data)


_SCALARS = (str, int, float, bool, bytes, type(None), complex)


def _hashable(value: Any) -> Hashable:
    """Return a key of a dict or an element of a set: a scalar, or a short tuple of scalars."""
    if type(value) in _SCALARS:
        return value
    if (
        type(value) is tuple
        and len(value) <= MAX_KEY_ITEMS
        and all(type(v) in _SCALARS for v in value)
    ):
        return value
    raise _RefusedError(f"it uses {_shown(value)} as a key")


def _items(values: Any, what: str) -> Iterable[Any]:
    if type(values) not in (list, tuple, set, frozenset):
        raise _RefusedError(f"it makes a {what} of {_shown(values)}")
    return values


def _pairs(values: Any) -> dict[Hashable, Any]:
    if type(values) is dict:
        return dict(values)
    made: dict[Hashable, Any] = {}
    for pair in _items(values, "dict"):
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise _RefusedError("it makes a dict of something other than pairs")
        made[_hashable(pair[0])] = pair[1]
    return made


# -- what applying a symbol means: the arguments are looked at, nothing of that name is called -----


def _reconstruct(subtype: Any, shape: Any, code: Any) -> _Array:
    if subtype is not _Symbol.NDARRAY:
        raise _RefusedError("it makes an array of a class of its own")
    return _Array()


def _dtype(text: Any, align: Any = False, copy: Any = True) -> _DType:
    return _DType(text)


def _scalar(dtype: Any, data: Any) -> Any:
    made = _Array()
    made.set((1,), dtype, False, data)
    if made.dtype is not None and made.dtype.kind == "O":
        raise _RefusedError("it holds a numpy scalar that is a Python object")
    return np.asarray(made.value())[0].item() if len(_view(data)) else ""


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    made = _Array()
    made.set(shape, dtype, order == "F", data)
    if axes is not None:
        if type(axes) is not tuple or any(type(axis) is not int for axis in axes):
            raise _RefusedError("it gives the axes of an array in an unknown way")
        made.axes = axes
    return made


def _encode(text: Any, encoding: Any) -> Any:
    if encoding not in ("latin1", "latin-1") or type(text) is not str:
        raise _RefusedError("it encodes text in another way than Latin-1")
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise _RefusedError("it encodes text as Latin-1 that is not") from None


def _ordered_dict(pairs: Any = ()) -> dict[Hashable, Any]:
    return _pairs(pairs)


def _default_dict(factory: Any = None, pairs: Any = ()) -> dict[Hashable, Any]:
    if factory is not None and not isinstance(factory, _Symbol):
        raise _RefusedError("it makes a defaultdict with an unknown default")
    return _pairs(pairs)


def _bytearray(data: Any = b"", encoding: Any = "latin-1") -> Any:
    return _encode(data, encoding) if type(data) is str else bytes(_view(data))


def _complex(real: Any = 0.0, imag: Any = 0.0) -> complex:
    if type(real) not in (int, float) or type(imag) not in (int, float):
        raise _RefusedError("it makes a complex number of something else")
    return complex(real, imag)


def _plain(kind: type) -> Callable[..., Any]:
    def make(value: Any = 0) -> Any:
        if type(value) not in (str, int, float, bool) or (kind is not str and type(value) is str):
            raise _RefusedError(f"it makes {kind.__name__} of {_shown(value)}")
        return kind(value)

    return make


_APPLY: Final[dict[_Symbol, Callable[..., Any]]] = {
    _Symbol.RECONSTRUCT: _reconstruct,
    _Symbol.DTYPE: _dtype,
    _Symbol.SCALAR: _scalar,
    _Symbol.FROMBUFFER: _frombuffer,
    _Symbol.ENCODE: _encode,
    _Symbol.ORDERED_DICT: _ordered_dict,
    _Symbol.DEFAULT_DICT: _default_dict,
    _Symbol.LIST: lambda values=(): list(_items(values, "list")),
    _Symbol.TUPLE: lambda values=(): tuple(_items(values, "tuple")),
    _Symbol.DICT: _ordered_dict,
    _Symbol.SET: lambda values=(): {_hashable(v) for v in _items(values, "set")},
    _Symbol.FROZENSET: lambda values=(): frozenset(
        _hashable(v) for v in _items(values, "frozenset")
    ),
    _Symbol.BYTES: _bytearray,
    _Symbol.BYTEARRAY: _bytearray,
    _Symbol.COMPLEX: _complex,
    _Symbol.STR: _plain(str),
    _Symbol.INT: _plain(int),
    _Symbol.FLOAT: _plain(float),
}

_REFUSED_CODES: Final = {
    b"i": "INST",
    b"o": "OBJ",
    b"\x81": "NEWOBJ",
    b"\x92": "NEWOBJ_EX",
    b"P": "PERSID",
    b"Q": "BINPERSID",
    b"\x82": "EXT1",
    b"\x83": "EXT2",
    b"\x84": "EXT4",
    b"2": "DUP",
    b"\x97": "NEXT_BUFFER",
    b"\x98": "READONLY_BUFFER",
}


class _Machine:
    """Runs the instructions of one pickle."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.end = len(data)
        self.at = 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}
        self.made = 0  # items and bytes that were copied on the file's behalf

    def run(self) -> Any:
        data, codes = self.data, _CODES
        while self.at < self.end:
            code = data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self.pop()
            act = codes[code]
            if act is None:
                name = _REFUSED_CODES.get(bytes([code]))
                what = f"the instruction {name}" if name else f"the unknown instruction {code:#x}"
                raise _RefusedError(f"it uses {what} at byte {self.at - 1}")
            act(self)
        raise _RefusedError("it ends in the middle")

    # -- reading

    def take(self, count: int) -> memoryview:
        start, self.at = self.at, self.at + count
        if self.at > self.end:
            raise _RefusedError("it ends in the middle")
        return self.data[start : self.at]

    def uint(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def line(self) -> bytes:
        start, step = self.at, 256
        while True:
            piece = bytes(self.data[start : start + step])
            found = piece.find(b"\n")
            if found >= 0:
                self.at = start + found + 1
                return piece[:found]
            if start + step >= self.end:
                raise _RefusedError("it ends in the middle")
            step *= 4

    def pop(self) -> Any:
        if not self.stack:
            raise _RefusedError("it takes a value where there is none")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marked:
            raise _RefusedError("it ends a container that it did not begin")
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def top(self, kind: type | tuple[type, ...], what: str) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise _RefusedError(f"it {what} something else")
        return self.stack[-1]

    # -- instructions

    def skip(self, count: int) -> None:
        self.take(count)

    def proto(self) -> None:
        version = self.uint(1)
        if version > 5:
            raise _RefusedError(f"it is of protocol {version}; 0 to 5 are known")

    def mark(self) -> None:
        if len(self.marked) >= MAX_MARKS:
            raise _RefusedError(f"it opens more than {MAX_MARKS} containers within each other")
        self.marked.append(self.stack)
        self.stack = []

    def pop_one(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def int_line(self) -> None:
        text = self.line()
        if text in (b"00", b"01"):
            self.stack.append(text == b"01")
        else:
            self.stack.append(_integer(text))

    def long_line(self) -> None:
        self.stack.append(_integer(self.line().removesuffix(b"L")))

    def long(self, width: int) -> None:
        count = self.uint(width)
        if count > MAX_INT_BYTES:
            raise _RefusedError(f"it holds an integer of {count} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def bin_int(self) -> None:
        self.stack.append(int.from_bytes(self.take(4), "little", signed=True))

    def float_line(self) -> None:
        text = self.line()
        try:
            self.stack.append(float(text))
        except ValueError:
            raise _RefusedError("it holds a number that is none") from None

    def bin_float(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    def string_line(self) -> None:
        text = self.line().strip()
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in b"'\"":
            raise _RefusedError("it holds a string without quotes")
        try:
            value = codecs.escape_decode(text[1:-1])[0]
        except ValueError:
            raise _RefusedError("it holds a string that is none") from None
        self.stack.append(value.decode("latin-1"))

    def string(self, width: int) -> None:
        self.stack.append(_short_or_blob(self.take(self.uint(width)), is_text=True))

    def bytes_(self, width: int) -> None:
        self.stack.append(_short_or_blob(self.take(self.uint(width)), is_text=False))

    def unicode_line(self) -> None:
        self.stack.append(_decoded(self.line(), "raw-unicode-escape"))

    def unicode(self, width: int) -> None:
        self.stack.append(_decoded(bytes(self.take(self.uint(width))), "utf-8"))

    def append(self) -> None:
        value = self.pop()
        self.top(list, "appends to").append(value)

    def appends(self) -> None:
        items = self.pop_mark()
        self.top(list, "appends to").extend(items)

    def list_(self) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def tuple_of_mark(self) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def tuple_(self, count: int) -> None:
        if len(self.stack) < count:
            raise _RefusedError("it takes a value where there is none")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def dict_(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set_items(items)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self._set_items([key, value])

    def set_items(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.top(dict, "sets items of")
        if len(items) % 2:
            raise _RefusedError("it sets a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_hashable(key)] = value

    def add_items(self) -> None:
        items = self.pop_mark()
        self.top(set, "adds to").update([_hashable(item) for item in items])

    def frozenset_(self) -> None:
        items = self.pop_mark()
        self.stack.append(frozenset([_hashable(item) for item in items]))

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise _RefusedError("it refers to a value that it did not keep")
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        if not self.stack:
            raise _RefusedError("it keeps a value where there is none")
        self.memo[index] = self.stack[-1]

    def global_line(self) -> None:
        module, name = self.line(), self.line()
        self._global(_decoded(module, "utf-8"), _decoded(name, "utf-8"))

    def global_stack(self) -> None:
        name, module = self.pop(), self.pop()
        self._global(_text(module, "a module"), _text(name, "a name"))

    def _global(self, module: str, name: str) -> None:
        symbol = GLOBALS.get((module, name))
        if symbol is None:
            asked = f"{module}.{name}"
            raise _RefusedError(f"it asks for {asked[:100]!r}{_hint(module)}")
        self.stack.append(symbol)

    def reduce(self) -> None:
        arguments, symbol = self.pop(), self.pop()
        apply = _APPLY.get(symbol) if isinstance(symbol, _Symbol) else None
        if apply is None or type(arguments) is not tuple:
            raise _RefusedError(f"it calls {_shown(symbol)}")
        try:
            value = apply(*arguments)
        except TypeError as error:  # a wrong number of arguments
            raise _RefusedError(f"it calls {symbol.name.lower()} with wrong arguments") from error
        if type(value) in (list, tuple, dict, set, frozenset, bytes):
            self.made += len(value)
            if self.made > _limit(self.end):
                raise _RefusedError(_BOMB)
        self.stack.append(value)

    def build(self) -> None:
        state = self.pop()
        self.top((_Array, _DType), "gives a state to").build(state)


def _integer(text: bytes) -> int:
    if len(text) > 3 * MAX_INT_BYTES:
        raise _RefusedError(f"it holds an integer of {len(text)} digits")
    try:
        return int(text)
    except ValueError:
        raise _RefusedError("it holds an integer that is none") from None


def _decoded(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")
    except UnicodeDecodeError:
        raise _RefusedError("it holds text that is not Unicode") from None


def _short_or_blob(view: memoryview, is_text: bool) -> Any:
    blob = _Blob(view, is_text)
    return blob.value() if len(view) <= _SMALL_BYTES else blob


def _hint(module: str) -> str:
    top = module.partition(".")[0]
    if top == "torch":
        return ", so it holds torch tensors: save it with torch.save and import the .pt file"
    if top == "pandas":
        return ", so it holds pandas tables: save them as Parquet or .npy"
    return ""


_CODES: Final[list[Callable[[_Machine], None] | None]] = [None] * 256


def _install() -> None:
    table: dict[bytes, Callable[[_Machine], None]] = {
        b"\x80": _Machine.proto,
        b"\x95": lambda m: m.skip(8),  # FRAME
        b"(": _Machine.mark,
        b"0": _Machine.pop_one,
        b"1": lambda m: (m.pop_mark(), None)[1],
        b"N": lambda m: m.stack.append(None),
        b"\x88": lambda m: m.stack.append(True),
        b"\x89": lambda m: m.stack.append(False),
        b"I": _Machine.int_line,
        b"L": _Machine.long_line,
        b"J": _Machine.bin_int,
        b"K": lambda m: m.stack.append(m.uint(1)),
        b"M": lambda m: m.stack.append(m.uint(2)),
        b"\x8a": lambda m: m.long(1),
        b"\x8b": lambda m: m.long(4),
        b"F": _Machine.float_line,
        b"G": _Machine.bin_float,
        b"S": _Machine.string_line,
        b"T": lambda m: m.string(4),
        b"U": lambda m: m.string(1),
        b"C": lambda m: m.bytes_(1),
        b"B": lambda m: m.bytes_(4),
        b"\x8e": lambda m: m.bytes_(8),
        b"\x96": lambda m: m.bytes_(8),  # BYTEARRAY8
        b"V": _Machine.unicode_line,
        b"\x8c": lambda m: m.unicode(1),
        b"X": lambda m: m.unicode(4),
        b"\x8d": lambda m: m.unicode(8),
        b"]": lambda m: m.stack.append([]),
        b"a": _Machine.append,
        b"e": _Machine.appends,
        b"l": _Machine.list_,
        b")": lambda m: m.stack.append(()),
        b"t": _Machine.tuple_of_mark,
        b"\x85": lambda m: m.tuple_(1),
        b"\x86": lambda m: m.tuple_(2),
        b"\x87": lambda m: m.tuple_(3),
        b"}": lambda m: m.stack.append({}),
        b"d": _Machine.dict_,
        b"s": _Machine.set_item,
        b"u": _Machine.set_items,
        b"\x8f": lambda m: m.stack.append(set()),
        b"\x90": _Machine.add_items,
        b"\x91": _Machine.frozenset_,
        b"g": lambda m: m.get(_integer(m.line())),
        b"h": lambda m: m.get(m.uint(1)),
        b"j": lambda m: m.get(m.uint(4)),
        b"p": lambda m: m.put(_integer(m.line())),
        b"q": lambda m: m.put(m.uint(1)),
        b"r": lambda m: m.put(m.uint(4)),
        b"\x94": lambda m: m.put(len(m.memo)),
        b"c": _Machine.global_line,
        b"\x93": _Machine.global_stack,
        b"R": _Machine.reduce,
        b"b": _Machine.build,
    }
    for code, act in table.items():
        _CODES[code[0]] = act


_install()


# -- from what the machine left to plain values ----------------------------------------------------


class _Finished:
    """A value of the result: how deep it nests, how large it is with shared parts counted anew."""

    __slots__ = ("depth", "size", "value")

    def __init__(self, value: Any, depth: int, size: int) -> None:
        self.value, self.depth, self.size = value, depth, size


def _finish(root: Any, limit: int) -> Any:
    """Replace descriptions by arrays, bottom up, without recursion.

    Raises
    ------
    _RefusedError
        A container within itself, too deep, or so shared that unfolding it would fill the memory.
    """
    finished: dict[int, _Finished] = {}
    alive: list[Any] = []  # so that no id is used twice
    open_: set[int] = set()
    todo: list[tuple[Any, bool]] = [(root, False)]
    while todo:
        value, entered = todo.pop()
        if id(value) in finished:
            continue
        children = _children(value)
        if children and not entered:
            if id(value) in open_:
                raise _RefusedError("it holds a container that contains itself")
            open_.add(id(value))
            todo.append((value, True))
            for child in children:
                if _is_inner(child) and id(child) not in finished:
                    if id(child) in open_:
                        raise _RefusedError("it holds a container that contains itself")
                    todo.append((child, False))
            continue
        depth = size = 1
        for child in children:
            inner = finished.get(id(child)) if _is_inner(child) else None
            depth = max(depth, 1 + (inner.depth if inner else 0))
            size += inner.size if inner else 1
        if depth > MAX_DEPTH:
            raise _RefusedError(f"it nests containers more than {MAX_DEPTH} deep")
        made = _made(value, finished)
        if isinstance(made, np.ndarray):
            size = 1 + made.nbytes
        if size > limit:
            raise _RefusedError(_BOMB)
        finished[id(value)] = _Finished(made, depth, size)
        alive.append(value)
        open_.discard(id(value))
    return finished[id(root)].value


def _is_inner(value: Any) -> bool:
    return type(value) in (list, tuple, dict, set, frozenset, _Array, _Blob, _DType, _Symbol)


def _children(value: Any) -> Iterable[Any]:
    if type(value) is dict:
        return value.values()
    if type(value) in (list, tuple):
        return value
    if type(value) is _Array and isinstance(value.data, list):
        return value.data
    return ()


def _made(value: Any, finished: dict[int, _Finished]) -> Any:
    def plain(child: Any) -> Any:
        return finished[id(child)].value if _is_inner(child) else child

    if isinstance(value, _DType | _Symbol):
        raise _RefusedError(f"it holds {_shown(value)} where a value belongs")
    if isinstance(value, _Blob):
        return value.value()
    if isinstance(value, _Array):
        made = value.value()
        return [plain(child) for child in made] if isinstance(made, list) else made
    if type(value) is list:
        value[:] = [plain(child) for child in value]
    elif type(value) is dict:
        for key, child in value.items():
            value[key] = plain(child)
    elif type(value) is tuple:
        return tuple(plain(child) for child in value)
    return value


# -- files -----------------------------------------------------------------------------------------

_NOT_PICKLES = {
    b"PK\x03\x04": "it is a zip archive, as torch.save writes: import it as a .pt file",
    b"\x1f\x8b": "it is compressed with gzip: unpack it first",
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"\x93NUMPY": "it is a .npy file: import its folder as npy",
    b"\x89HDF": "it is an HDF5 file: import it as hdf5",
}


def load(path: Path) -> Any:
    """Return what a pickle holds: None, numbers, text, bytes, containers and numpy arrays.

    Parameters
    ----------
    path : Path
        A pickle of protocol 0 to 5, of Python 2 or 3. It stays mapped while its arrays are used.

    Returns
    -------
    object
        Built of dict, list, tuple, set, frozenset, str, bytes, int, float, complex, bool, None and
        read-only numpy arrays of numbers or text. Arrays of Python objects become lists, an
        OrderedDict or defaultdict becomes a dict.

    Raises
    ------
    UsageError
        The file cannot be read, is no pickle, is cut off, or asks for anything else. Nothing of
        what it asked for was imported or called.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from error
    try:
        if not os.fstat(descriptor).st_size:
            raise UsageError(f"Cannot read {path}: it is empty.")
        data = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from error
    finally:
        os.close(descriptor)
    return _load(data, str(path))


def _load(data: memoryview, where: str) -> Any:
    for magic, reason in _NOT_PICKLES.items():
        if data[: len(magic)] == magic:
            raise UsageError(f"Cannot read {where} as a pickle: {reason}.")
    machine = _Machine(data)
    try:
        value = _finish(machine.run(), _limit(len(data)))
    except _RefusedError as error:
        raise UsageError(f"Cannot read {where} as a pickle: {error}. {POLICY}") from error
    if machine.at < len(data):
        logger.warning("%s holds %d bytes behind its value.", where, len(data) - machine.at)
    return value
