"""The identity of imported features, and the feature string that names them in a recipe.

An import knows bytes and nothing of the model that made them. So its identity is those bytes and
how they were read, under a name that the user gives: never a model, a revision or a layer.

``imported:name=NAME,format=FORMAT,content=HEX,outputs=OUTPUT[,OUTPUT…]`` says all of it, and
``modality=text`` where keys are those of transcripts. FORMAT holds the options that the format was
read with, ``+KEY=VALUE`` each, percent-encoded. Nothing in a feature string means anything to a
shell. An OUTPUT is ``NAME/DIM/DTYPE/KIND/RATE/CODES``, fields left empty where they are usual:
frames of float16 at no even rate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from mer.cache import layout
from mer.cache.errors import UsageError
from mer.cache.spec import FeatureSpec, OutputSpec

EXTRACTOR = "imported"
VERSION = 1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_OUTPUT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_CONTENT = re.compile(r"[0-9a-f]{32}")
_USUAL = ("float16", "frames", "", "")
_KINDS = ("frames", "codes", "pooled")


def imported_spec(
    name: str,
    format: str,
    content: str,
    outputs: Sequence[OutputSpec],
    *,
    modality: str = "audio",
    licence: str | None = None,
    source: Mapping[str, Any] | None = None,
) -> FeatureSpec:
    """Return what a store of imported features holds.

    Parameters
    ----------
    name : str
        The user's name for the features.
    format : str
        Layout they were read from, as `format_field` writes it.
    content : str
        32 hex digits over the bytes of the files.
    outputs : sequence of OutputSpec
        As they are stored; part of the identity, because a narrower type changes values.
    modality : {"audio", "text"}
        Whether keys are those of recordings or of transcripts.
    licence, source : optional
        Notes that are kept and not hashed.

    Raises
    ------
    UsageError
        A name that is none, or content that is no hash.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name imported features; expected letters, digits and ._+- "
            "(it becomes part of a folder and of a feature string)."
        )
    if not _CONTENT.fullmatch(content):
        raise UsageError(f"content={content} is no hash of 32 hex digits; copy it from the import.")
    for output in outputs:
        _check(output)
    return FeatureSpec(
        slug=f"{EXTRACTOR}-{name}",
        identity={
            "extractor": EXTRACTOR,
            "version": VERSION,
            "options": {
                "name": name,
                "format": format,
                "content": content,
                "modality": modality,
                "outputs": [output_field(output) for output in outputs],
            },
        },
        outputs=tuple(outputs),
        licence=licence,
        source=source,
    )


def feature_string(spec: FeatureSpec) -> str:
    """Return the feature string of an imported store.

    Examples
    --------
    >>> output = OutputSpec(name="final", dim=768, rate_hz=50.0)
    >>> feature_string(imported_spec("mine", "npy", "0" * 32, [output]))
    'imported:name=mine,format=npy,content=00000000000000000000000000000000,outputs=final/768///50'
    """
    return feature_of(spec.identity)


def feature_of(identity: Mapping[str, Any]) -> str:
    """Return the same from an identity alone.

    Raises
    ------
    KeyError
        It is not that of imported features.
    """
    options = identity["options"]
    pieces = [f"{key}={options[key]}" for key in ("name", "format", "content")]
    pieces.append("outputs=" + ",".join(options["outputs"]))
    if options["modality"] != "audio":
        pieces.append(f"modality={options['modality']}")
    return f"{EXTRACTOR}:" + ",".join(pieces)


def format_field(format: str, options: Mapping[str, Any]) -> str:
    """Return a format with the options it was read with: they decide which values an id has.

    Examples
    --------
    >>> format_field("conversations", {"pattern": "dia{dialogue},{turn}"})
    'conversations+pattern=dia%7Bdialogue%7D%2C%7Bturn%7D'
    """
    given = [f"+{name}={quote(str(options[name]), safe='')}" for name in sorted(options)]
    return format + "".join(given)


def output_field(output: OutputSpec) -> str:
    """Return an output as the feature string has it."""
    rate = "" if output.rate_hz is None else f"{output.rate_hz:.17g}"
    codes = "" if output.num_codes is None else str(output.num_codes)
    fields = [
        "" if given == usual else given
        for given, usual in zip((output.dtype, output.kind, rate, codes), _USUAL, strict=True)
    ]
    return "/".join([output.name, str(output.dim), *fields]).rstrip("/")


def parse_outputs(text: str) -> tuple[OutputSpec, ...]:
    """Return the outputs that ``outputs=`` of a feature string lists.

    Raises
    ------
    UsageError
        A field that is not what it should be.

    Examples
    --------
    >>> parse_outputs("f0_code/1/uint16/codes/100/257")[0].num_codes
    257
    """
    outputs = tuple(_parse(field.strip()) for field in text.split(","))
    if len({output.name for output in outputs}) < len(outputs):
        raise UsageError(f"outputs={text} names an output twice.")
    return outputs


def _parse(text: str) -> OutputSpec:
    fields = text.split("/")
    if not 2 <= len(fields) <= 6:
        raise UsageError(f"Output {text!r} is not NAME/DIM[/DTYPE/KIND/RATE/CODES].")
    name, dim, *rest = fields
    rest += [""] * (4 - len(rest))
    dtype, kind, rate, codes = (given or usual for given, usual in zip(rest, _USUAL, strict=True))
    try:
        output = OutputSpec(
            name=name,
            dim=int(dim),
            rate_hz=float(rate) if rate else None,
            dtype=dtype,
            kind=kind,  # type: ignore[arg-type]
            num_codes=int(codes) if codes else None,
        )
    except ValueError as error:
        raise UsageError(f"Output {text!r}: {error}.") from error
    _check(output)
    return output


def _check(output: OutputSpec) -> None:
    allowed = layout.CODE_DTYPES if output.kind == "codes" else layout.FLOAT_DTYPES
    problem = None
    if not _OUTPUT_NAME.fullmatch(output.name) or output.name in (layout.KEY, layout.INPUT_LENGTH):
        problem = "its name is not letters, digits and ._+-"
    elif output.kind not in _KINDS:
        problem = f"kind {output.kind!r}, expected {', '.join(_KINDS)}"
    elif output.dim < 1:
        problem = f"width {output.dim}"
    elif output.dtype not in allowed:
        problem = f"type {output.dtype}, expected {', '.join(allowed)}"
    elif output.rate_hz is not None and not 0 < output.rate_hz < 1e6:
        problem = f"rate {output.rate_hz} Hz"
    elif output.num_codes is not None and not 0 < output.num_codes <= 2**32:
        problem = f"{output.num_codes} codes"
    if problem:
        raise UsageError(f"Output {output.name!r} cannot be imported: {problem}.")
