"""What makes two features the same feature: names of stores and keys of inputs.

A stored value is addressed by two independent parts. The *fingerprint* of an extractor's identity
names the store; the *key* of an input names a row in it. Neither knows about utterance ids, labels,
splits, paths or machines.

Everything here is part of the format (``FORMAT.md`` sections 1 and 2): a change makes every
existing cache a miss, and the golden files under ``tests/cache/golden`` notice.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from mer.cache.spec import FeatureSpec

KEY_BYTES = 16
FINGERPRINT_IN_NAME = 16  # hex digits of the fingerprint that end a store's name

_READ_BYTES = 4 << 20
_AUDIO_DOMAIN = b"mer.audio.1\0"
_TEXT_DOMAIN = b"mer.text.1\0"
_AUDIO_KEY = struct.Struct(
    "<16sqqq"
)  # content, start µs, end µs (-1: own bound), channel (-1: downmix)


def canonical_json(obj: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, ASCII only.

    Parameters
    ----------
    obj : mapping, list, tuple, str, int, float, bool or None
        Mappings have string keys; lists and tuples are the same thing; ``1`` and ``1.0`` are not.

    Returns
    -------
    str
        Equal for equal values whatever the order of their keys, different for different values.

    Raises
    ------
    TypeError
        A type JSON has no exact form for, or a key that is not a string.
    ValueError
        NaN, an infinity, or a string that is not valid Unicode.

    Examples
    --------
    >>> canonical_json({"b": 1, "a": [True, None, 0.5]})
    '{"a":[true,null,0.5],"b":1}'
    """
    return _dumps(_plain(obj, "identity"))


def _dumps(plain: Any) -> str:
    return json.dumps(
        plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def _plain(obj: Any, where: str) -> Any:
    """Return ``obj`` built of exact JSON types; ``where`` is the path to it, for messages."""
    kind = type(
        obj
    )  # not isinstance: subclasses (enums, numpy scalars) may print as something else
    if obj is None or kind is bool or kind is int:
        return obj
    if kind is float:
        if not math.isfinite(obj):
            raise ValueError(f"{where} is {obj!r}; an identity holds finite numbers only.")
        return obj
    if kind is str:
        # Two lone surrogates and the character they would spell have the same ASCII form.
        if any("\ud800" <= char <= "\udfff" for char in obj):
            raise ValueError(f"{where} is {obj!r}, which is not valid Unicode.")
        return obj
    if isinstance(obj, Mapping):
        plain = {}
        for key, value in obj.items():
            if type(key) is not str:
                raise TypeError(f"{where} has the key {key!r}; keys of an identity are strings.")
            plain[_plain(key, f"a key of {where}")] = _plain(value, f"{where}.{key}")
        return plain
    if isinstance(obj, list | tuple):
        return [_plain(value, f"{where}[{i}]") for i, value in enumerate(obj)]
    raise TypeError(
        f"{where} is {obj!r} of type {kind.__name__}; "
        "an identity holds JSON types only: mapping, list, str, int, float, bool, None."
    )


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Return the 32 hex digits (blake2b, 128 bits) that stand for an extractor's identity.

    Examples
    --------
    >>> fingerprint({"name": "logmel", "version": 1})
    '1006b4a757178f3bd022e361d1cdcc3f'
    """
    return hashlib.blake2b(canonical_json(identity).encode("ascii"), digest_size=16).hexdigest()


def store_name(spec: FeatureSpec) -> str:
    """Return the folder name of a feature's store: slug, dash, 16 digits of the fingerprint.

    Characters that are awkward in a file name become dashes; only the digits identify.
    """
    slug = re.sub(r"[^A-Za-z0-9._+=-]+", "-", spec.slug).strip("-.")[:100] or "feature"
    return f"{slug}-{fingerprint(spec.identity)[:FINGERPRINT_IN_NAME]}"


def audio_key(
    content: bytes, start_s: float | None, end_s: float | None, channel: int | None
) -> bytes:
    """Return the key of a stretch of a recording.

    Parameters
    ----------
    content : bytes
        16-byte ``content_hash`` of the file: a moved or renamed recording keeps its key.
    start_s, end_s : float or None
        Bounds in seconds, rounded to whole microseconds (one sample at 192 kHz is 5.2 µs). ``None``
        is the recording's own bound, so that a start of ``None`` and of 0 are one key.
    channel : int or None
        Channel from 0; ``None`` is the downmix.

    Returns
    -------
    bytes
        16 bytes.

    Raises
    ------
    ValueError
        A hash of another length, a bound that is negative or not finite, an end not after the
        start, a negative channel.
    """
    if len(content) != KEY_BYTES:
        raise ValueError(f"The content hash has {len(content)} bytes, expected {KEY_BYTES}.")
    start = 0 if start_s is None else _microseconds("start_s", start_s)
    end = -1 if end_s is None else _microseconds("end_s", end_s)
    if end_s is not None and end <= start:
        raise ValueError(f"end_s={end_s} is not after start_s={start_s}.")
    if channel is not None and channel < 0:
        raise ValueError(f"channel={channel} is negative; channels count from 0.")
    packed = _AUDIO_KEY.pack(content, start, end, -1 if channel is None else channel)
    return hashlib.blake2b(_AUDIO_DOMAIN + packed, digest_size=KEY_BYTES).digest()


def _microseconds(name: str, seconds: float) -> int:
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(
            f"{name}={seconds} is no time in a recording; expected finite seconds ≥ 0."
        )
    return round(seconds * 1_000_000)


def normalise_text(text: str) -> str:
    """Return ``text`` in Unicode NFC, each run of white space as one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def text_key(text: str) -> bytes:
    """Return the 16-byte key of a transcript: a hash of ``normalise_text(text)`` in UTF-8."""
    data = normalise_text(text).encode("utf-8")
    return hashlib.blake2b(_TEXT_DOMAIN + data, digest_size=KEY_BYTES).digest()


def content_hash(path: Path | str) -> bytes:
    """Return the 16-byte xxh3-128 of a file's bytes, read in blocks.

    Enough against accident at memory speed; published weights, where an adversary matters, are
    hashed with sha256.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.digest()
