"""Pickles of strangers: what they may hold arrives, and nothing they ask for happens."""

from __future__ import annotations

import codecs
import collections
import io
import logging
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mer.cache.errors import UsageError
from mer.cache.restricted import GLOBALS, load

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
MANY = 100_000


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        path = tmp_path / "features.pkl"
        path.write_bytes(data)
        return load(path)

    return read


# -- what may be in a pickle -----------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "nothing": None,
    "truth": [True, False],
    "integers": [0, 1, 255, 256, 65_536, -1, 2**31, -(2**63), 2**200],
    "floats": [0.0, -0.5, 1e300, float("inf")],
    "complex": 1 + 2j,
    "text": ["", "a", "Größe 惊喜 \U0001f600", 'it\'s "so"', "x" * 70_000, "\n\\"],
    "bytes": [b"", b"abc", bytes(range(256)) * 40],
    "bytearray": bytearray(b"abc"),
    "lists": [[], [[1], [2, [3]]]],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (((1,),),)],
    "dicts": {1: {"a": {}}, (1, "b"): 2, None: 3, 1.5: 4, False: 5, b"k": 6},
    "sets": [set(), {1, 2}, frozenset(), frozenset({"a"})],
    "many": list(range(3000)),
    "shared": [["x"]] * 3,
}
ARRAYS: dict[str, np.ndarray] = {
    "float64": np.linspace(-1, 1, 6).reshape(2, 3),
    "half": np.arange(70_000, dtype=np.float16).reshape(-1, 7),
    "float32 of the other byte order": np.arange(6, dtype=">f4").reshape(3, 2),
    "column order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "no order": np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
    "strided": np.arange(10.0)[::2],
    "bytes": np.arange(5, dtype=np.uint8),
    "int64": np.array([-1, 2**40]),
    "bool": np.array([[True], [False]]),
    "complex": np.array([1 + 2j]),
    "no dimension": np.array(3.5),
    "empty": np.zeros((0, 4), np.float32),
    "text": np.array(["ab", "ü惊", ""]),
    "byte strings": np.array([b"ab", b"c"]),
    "not finite": np.array([np.nan, -np.inf, -0.0]),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_arrive_as_they_were(read, protocol):
    found = read(pickle.dumps(PLAIN, protocol))
    assert found.pop("bytearray") == b"abc"
    assert found == {name: value for name, value in PLAIN.items() if name != "bytearray"}
    assert type(found["sets"][1]) is set
    assert type(found["sets"][2]) is frozenset


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_arrive_bit_for_bit(read, name, protocol):
    array = ARRAYS[name]
    found = read(pickle.dumps(array, protocol))
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scalars_of_numpy_arrive_as_numbers(read, protocol):
    values = [
        np.float32(0.5),
        np.int64(-7),
        np.float16(2),
        np.bool_(True),
        np.str_("hü"),
        np.str_(),
    ]
    assert read(pickle.dumps(values, protocol)) == [0.5, -7, 2.0, True, "hü", ""]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_special_dicts_arrive_as_dicts(read, protocol):
    ordered = collections.OrderedDict([("b", 1), ("a", [2])])
    default = collections.defaultdict(list, {"x": [1]})
    found = read(pickle.dumps([ordered, default], protocol))
    assert found == [{"b": 1, "a": [2]}, {"x": [1]}]
    assert list(found[0]) == ["b", "a"]
    assert [type(value) for value in found] == [dict, dict]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_array_of_objects_arrives_as_a_list(read, protocol):
    array = np.empty(3, object)
    array[:] = ["text", None, np.arange(3)]
    found = read(pickle.dumps(array, protocol))
    assert found[:2] == ["text", None]
    np.testing.assert_array_equal(found[2], [0, 1, 2])


def test_a_large_array_is_a_view_of_the_file(read):
    found = read(pickle.dumps({"audio": np.arange(1e5)}, 4))
    assert not found["audio"].flags.writeable
    assert not found["audio"].flags.owndata


def test_values_stay_readable_after_the_file_is_gone(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(np.arange(1e5), 5))
    found = load(path)
    path.unlink()
    assert found.sum() == np.arange(1e5).sum()


def test_pickles_of_numpy_1_are_read(read):
    data = pickle.dumps([np.arange(3.0), np.float32(2)], 3)
    assert b"numpy._core" in data
    found = read(data.replace(b"numpy._core", b"numpy.core"))
    np.testing.assert_array_equal(found[0], np.arange(3.0))
    assert found[1] == 2


def python_2_string(data: bytes) -> bytes:
    """A `str` as Python 2 wrote it in protocol 2."""
    if len(data) < 256:
        return b"U" + bytes([len(data)]) + data
    return b"T" + struct.pack("<i", len(data)) + data


def python_2_array(array: np.ndarray) -> bytes:
    """An array as Python 2 and numpy 1 wrote it in protocol 2: its bytes are a `str`."""
    shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in array.shape) + b"t"
    dtype = (
        b"cnumpy\ndtype\n" + python_2_string(array.dtype.str[1:].encode()) + b"K\x00K\x01\x87R"
        b"(K\x03" + python_2_string(b"<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + shape + dtype + b"\x89" + python_2_string(array.tobytes()) + b"tb"
    )


@pytest.mark.parametrize("count", [1, 5_000])
def test_arrays_and_text_of_python_2_are_read(read, count):
    array = np.linspace(0, 1, 2 * count).reshape(count, 2)
    key = b"Ses01F_impro01_F000"
    caf = python_2_string("é".encode("latin-1"))
    found = read(
        b"\x80\x02}(" + python_2_string(key) + python_2_array(array) + caf + b"c__builtin__\nset\n"
        b"](" + python_2_string(b"a") + python_2_string(b"b") + b"e\x85Ru."
    )
    np.testing.assert_array_equal(found["Ses01F_impro01_F000"], array)
    assert found["é"] == {"a", "b"}
    reference = pickle.loads(b"\x80\x02" + python_2_array(array) + b".", encoding="latin1")
    np.testing.assert_array_equal(reference, array)


def test_text_pickles_of_python_2_are_read(read):
    assert read(b"(dp0\nS'it\\'s'\np1\nI01\nsS\"a\\xe9\"\nL12L\nsV\\u00fc\nF1.5\ns.") == {
        "it's": True,
        "aé": 12,
        "ü": 1.5,
    }


def test_what_follows_the_value_is_not_read_and_said(read, caplog):
    with caplog.at_level(logging.WARNING):
        assert read(pickle.dumps(1) + pickle.dumps(2)) == 1
    assert "bytes behind its value" in caplog.text


# -- what a pickle may not do ----------------------------------------------------------------------


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


class Plain:
    pass


def hostile(canary: Path) -> dict[str, bytes]:
    """Pickles that would create ``canary`` (or do other harm) in the standard library's reader."""
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    import builtins
    import functools
    import operator

    pickles: dict[str, bytes] = {}
    for protocol in PROTOCOLS:
        for name, value in {
            "os.system": Calls(os.system, touch),
            "eval": Calls(eval, code),
            "exec": Calls(exec, code),
            "open": Calls(open, str(canary), "w"),
            "subprocess": Calls(subprocess.call, ["touch", str(canary)]),
            "getattr": Calls(getattr, 1, "real"),
            "import": Calls(__import__, "os"),
            "partial": Calls(functools.partial, os.system, touch),
            "methodcaller": Calls(operator.methodcaller("system", touch), 1),
            "attrgetter": operator.attrgetter("__class__"),
            "map": Calls(map, os.system, [touch]),
            "numpy.load": Calls(np.load, str(canary), None, True),
            "numpy.fromfile": Calls(np.fromfile, "/etc/hostname"),
            "numpy.save": Calls(np.save, str(canary), [1]),
            "memmap on a file": Calls(np.memmap, str(canary), "u1", "w+", 0, (1,)),
            "class": Plain(),
            "type": Calls(type, "T", (), {}),
            "copyreg": Calls(__import__("copyreg")._reconstructor, Plain, object, None),
            "pickle.loads": Calls(pickle.loads, pickle.dumps(1)),
            "within an array of objects": np.array([Calls(os.system, touch), 1], object),
            "within a scalar": [np.float32(1), Calls(os.system, touch)],
            "as state of a dict": Calls(collections.OrderedDict, state={"x": Calls(exec, code)}),
            "codecs.decode": Calls(codecs.decode, "abc", "rot13"),
            "encode otherwise": Calls(codecs.encode, "abc", "idna"),
            "structured": np.zeros(2, [("a", "f4")]),
            "matrix class": Calls(np._core.multiarray._reconstruct, np.recarray, (0,), b"b"),
            "slice": slice(1),
            "range": range(3),
            "print": builtins.print,
        }.items():
            pickles[f"{name} in protocol {protocol}"] = pickle.dumps(value, protocol)
    posix = b"cposix\nsystem\n"
    shell = b"X" + struct.pack("<I", len(touch)) + touch.encode()
    pickles |= {
        "posix.system": b"\x80\x04" + posix + shell + b"\x85R.",
        "INST": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(" + posix + shell + b"o.",
        "NEWOBJ": b"\x80\x04" + posix + shell + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + posix + shell + b"\x85}\x92.",
        "PERSID": b"Pwhatever\n.",
        "BINPERSID": b"\x80\x02X\x01\x00\x00\x00aQ.",
        "EXT1": b"\x80\x02\x82\x01.",
        "EXT2": b"\x80\x02\x83\x01\x00.",
        "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "NEXT_BUFFER": b"\x80\x05\x97.",
        "READONLY_BUFFER": b"\x80\x05C\x01a\x98.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.__new__\x93.",
        "dotted module": b"\x80\x04\x8c\x08builtins\x8c\x0cdict.popitem\x93.",
        "numpy under another name": b"cnumpy.core.multiarray\nfromstring\n.",
        "ctypes": b"cnumpy.ctypeslib\nload_library\n.",
        "state for a symbol": b"cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb.",
        "slot state for a symbol": b"c_codecs\nencode\nN}X\x08\x00\x00\x00__code__K\x01s\x86b.",
        "state for a list": b"]}b.",
        "state for a finished array twice with objects": (
            pickle.dumps(np.zeros(1), 2)[:-1] + b"(K\x01K\x01\x85cnumpy\ndtype\nU\x02O8K\x00K\x01"
            b"\x87R\x89]" + posix + b"atb."
        ),
        "call of a symbol that is none": b"cnumpy\nndarray\n)R.",
        "call of a list": b"])R.",
        "call of text": b"X\x09\x00\x00\x00os.system)R.",
        "call with a list": b"cnumpy\ndtype\n]R.",
        "symbol as a value": b"cnumpy\nndarray\n.",
        "symbol as a key": b"}cnumpy\nndarray\nK\x01s.",
    }
    return pickles


def test_nothing_of_a_hostile_pickle_runs(tmp_path, read):
    canary = tmp_path / "canary"
    pickles = hostile(canary)
    assert len(pickles) > 150
    for name, data in pickles.items():
        before = set(sys.modules)
        with pytest.raises(UsageError, match=r"features\.pkl as a pickle: it .*runs nothing"):
            pytest.fail(f"{name} was read as {read(data)!r}")
        assert not canary.exists(), name
        assert set(sys.modules) == before, name


def test_the_canary_would_be_noticed(tmp_path):
    canary = tmp_path / "canary"
    pickle.loads(hostile(canary)["os.system in protocol 4"])
    assert canary.exists()


def test_the_message_names_file_wish_and_policy(tmp_path):
    path = tmp_path / "iemocap.pkl"
    path.write_bytes(pickle.dumps(Calls(os.system, "true")))
    with pytest.raises(UsageError, match="asks for") as caught:
        load(path)
    text = str(caught.value)
    assert str(path) in text
    assert f"{os.system.__module__}.system" in text
    assert "convert it to .npy files or HDF5" in text


def test_only_inert_names_are_known():
    modules = {module for module, _ in GLOBALS}
    assert modules == {
        *("numpy", "numpy.core.multiarray", "numpy._core.multiarray"),
        *("numpy.core.numeric", "numpy._core.numeric", "numpy.core.memmap", "numpy._core.memmap"),
        *("collections", "_codecs", "builtins", "__builtin__"),
    }
    assert not any("." in name for _, name in GLOBALS)


def test_the_module_has_no_means_to_call_or_import():
    import ast

    import mer.cache.restricted as module

    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"getattr", "setattr", "eval", "exec", "__import__", "import_module"}


TORCH = "torch tensors: save it with torch.save and import the .pt file"


def test_tensors_in_a_pickle_are_refused_with_a_way_out(read):
    import torch

    with pytest.raises(UsageError, match=TORCH):
        read(pickle.dumps({"a": torch.zeros(2)}))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"PK\x03\x04", "zip archive, as torch.save writes"),
        (b"\x1f\x8b\x08", "compressed with gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x93NUMPY", r"it is a \.npy file"),
        (b"\x89HDF\r\n", "HDF5 file"),
    ],
)
def test_files_that_are_no_pickles_are_named(read, start, message):
    with pytest.raises(UsageError, match=message):
        read(start + bytes(100))


def test_an_empty_or_missing_file_is_an_error(tmp_path, read):
    with pytest.raises(UsageError, match="it is empty"):
        read(b"")
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "none.pkl")


# -- what a pickle may not claim -------------------------------------------------------------------


def array_claiming(shape: bytes, dtype: bytes, data: bytes) -> bytes:
    return (
        b"\x80\x04cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01"
        + shape
        + b"cnumpy\ndtype\nX"
        + struct.pack("<I", len(dtype))
        + dtype
        + b"\x89\x88\x87R\x89C"
        + bytes([len(data)])
        + data
        + b"tb."
    )


HUGE = b"\x8a\x06" + (2**40).to_bytes(6, "little")
NEGATIVE = b"J" + struct.pack("<i", -1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (array_claiming(HUGE + b"\x85", b"f8", b"12345678"), "brings 8 bytes"),
        (array_claiming(HUGE + HUGE + b"\x86", b"f8", b""), "brings 0 bytes"),
        (array_claiming(NEGATIVE + b"\x85", b"f8", b""), "shape"),
        (array_claiming(b"(" + b"K\x01" * 40 + b"t", b"f4", b"1234"), "shape"),
        (array_claiming(b"K\x01\x85", b"f4,f4", b"12345678"), "type 'f4,f4'"),
        (array_claiming(b"K\x01\x85", b"V8", b"12345678"), "type 'V8'"),
        (array_claiming(b"K\x01\x85", b"M8[s]", b"12345678"), "type"),
        (array_claiming(b"K\x01\x85", b"f3", b"123"), "type 'f3'"),
        (array_claiming(b"K\x01\x85", b"U1", b"\xff\xff\xff\xff"), "not Unicode"),
        (array_claiming(b"K\x01\x85", b"O8", b"12345678"), "no plain list"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc.", "ends in the middle"),
        (b"\x80\x04B" + struct.pack("<I", 2**31) + b"abc.", "ends in the middle"),
        (b"\x80\x04\x8b" + struct.pack("<I", 2**30) + b".", "integer of"),
        (b"\x80\x02T" + struct.pack("<i", -1) + b".", "ends in the middle"),
        (b"I" + b"9" * 5000 + b"\n.", "integer of 5000 digits"),
        (b"L" + b"9" * 5000 + b"L\n.", "integer of 5000 digits"),
        (b"K\x01", "ends in the middle"),
        (b"S'abc", "ends in the middle"),
        (b"\x80\x09.", "protocol 9"),
        (b"\xff.", "unknown instruction 0xff"),
        (b".", "where there is none"),
        (b"a.", "where there is none"),
        (b"t.", "did not begin"),
        (b"h\x05.", "did not keep"),
        (b"g999999999\n.", "did not keep"),
        (b"q\x05.", "keeps a value"),
        (b"K\x01K\x02a.", "appends to something else"),
        (b"](K\x01K\x02K\x03u.", "sets items of something else"),
        (b"}(K\x01u.", "without a value"),
        (b"}]K\x01s.", "uses list as a key"),
        (b"\x8f(]\x90.", "uses list as a key"),
        (b"V\\ud800\\uZZZZ\n.", "not Unicode"),
        (b"S'abc\n.", "without quotes"),
        (b"Fabc\n.", "number that is none"),
        (b"c\xff\xfe\na\n.", "not Unicode"),
        (b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "bytes of an array"),
        (b"c__builtin__\nlist\nX\x03\x00\x00\x00abc\x85R.", "makes a list of 'abc'"),
        (b"c__builtin__\nint\nX\x01\x00\x00\x001\x85R.", "makes int of"),
        (b"c__builtin__\nset\nK\x01K\x02K\x03\x87R.", "wrong arguments"),
        (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R.",
            "not say",
        ),
    ],
)
def test_claims_that_do_not_hold_are_refused(read, data, message):
    with pytest.raises(UsageError, match=message):
        read(data)


def test_a_container_within_itself_is_refused(read):
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UsageError, match="contains itself"):
        read(pickle.dumps(loop))
    knot: dict[str, Any] = {}
    knot["a"] = [(knot,)]
    with pytest.raises(UsageError, match="contains itself"):
        read(pickle.dumps(knot))


def test_deep_nesting_is_refused_without_recursion(read):
    with pytest.raises(UsageError, match="more than 64 deep"):
        read(b"\x80\x04)" + b"\x85" * MANY + b".")
    with pytest.raises(UsageError, match="more than 64 deep"):
        read(b"]" * MANY + b"a" * (MANY - 1) + b".")
    with pytest.raises(UsageError, match="more than 256 containers"):
        read(b"(" * MANY + b".")
    with pytest.raises(UsageError, match="uses tuple as a key"):
        read(b"})" + b"\x85" * MANY + b"K\x01s.")


def test_a_bomb_of_shared_lists_is_refused(read):
    laughs: Any = ["ha"] * 10
    for _ in range(12):
        laughs = [laughs] * 10
    with pytest.raises(UsageError, match="repeats parts of itself"):
        read(pickle.dumps(laughs))


def test_a_bomb_of_copies_is_refused(read):
    data = b"\x80\x02](" + b"K\x01" * MANY + b"eq\x000(" + b"c__builtin__\nlist\nh\x00\x85R" * 900
    with pytest.raises(UsageError, match="repeats parts of itself"):
        read(data + b"l.")


def test_one_array_under_many_names_is_refused_when_it_adds_up(read):
    array = np.zeros(MANY)
    assert len(read(pickle.dumps([array] * 10, 4))) == 10
    with pytest.raises(UsageError, match="repeats parts of itself"):
        read(pickle.dumps([array] * 100, 4))


def test_every_cut_is_an_error(read):
    data = pickle.dumps({"a": np.arange(4.0), "b": ["x", (1, 2)]}, 4)
    for end in range(1, len(data)):
        with pytest.raises(UsageError, match="Cannot read"):
            read(data[:end])


def test_random_damage_gives_a_value_or_the_one_error(read):
    data = pickle.dumps([{"a": np.arange(4.0), "b": ["x", (1, 2)]}, {1}, b"abc", np.float32(1)], 4)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(2_000):
        changed = np.frombuffer(data, np.uint8).copy()
        changed[rng.integers(0, len(data), 2)] = rng.integers(0, 256, 2)
        try:
            read(changed.tobytes())
        except UsageError:
            refused += 1
    assert refused > 500


def test_reading_agrees_with_the_standard_library(read):
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, 4)
    shared = {"id": ["a$_$1", "a$_$2"], "audio": np.arange(12, dtype=np.float32).reshape(2, 3, 2)}
    pickler.dump({"train": shared, "valid": shared, "n": (1, [2.5, None])})
    ours, theirs = read(stream.getvalue()), pickle.loads(stream.getvalue())
    np.testing.assert_array_equal(ours["train"].pop("audio"), theirs["train"].pop("audio"))
    assert ours == theirs
