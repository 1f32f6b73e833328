"""safetensors: a folder of files of at most 2 GiB, in each one tensor (T, D) per utterance.

``<output>-00001-of-00003.safetensors`` holds tensors named by utterance id, in the type they are
stored in. Its metadata has ``mer`` (the provenance as JSON), ``output``, and ``utterances`` (JSON:
id to [key in hex, input length]). ``provenance.json`` lies beside the files.

Source: the format is the one that huggingface/safetensors documents in its README: 8 bytes of
header length, a JSON header, the tensors' bytes without gaps. It is written here directly, because
the library wants all tensors of a file in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mer.cache.errors import UsageError
from mer.cache.exchange.incoming import (
    DEFAULT_OUTPUT,
    Incoming,
    Skipped,
    Utterance,
    Wanted,
    output_name,
    own_outputs,
    parse_provenance,
)
from mer.cache.exchange.options import whole
from mer.cache.exchange.outgoing import PROVENANCE, Outgoing, appearing
from mer.cache.spec import OutputSpec

SHARD_BYTES = 2 << 30
_MAX_TENSORS = 200_000  # per file: the library reads headers of up to 100 MB
_HEADER_ALIGN = 8
_TYPES = {"float16": "F16", "float32": "F32", "uint8": "U8", "uint16": "U16", "uint32": "U32"}
_METADATA = "__metadata__"


def write(
    source: Outgoing, target: Path, overwrite: bool, *, shard_bytes: int | str = SHARD_BYTES
) -> list[Path]:
    """Write a folder.

    Parameters
    ----------
    shard_bytes : int, default=2 GiB
        A file ends before the utterance with which it would be larger.
    """
    limit = whole("shard_bytes", shard_bytes, 1)
    if _METADATA in source.ids:
        raise UsageError(f"The id {_METADATA!r} has a meaning of its own in safetensors.")
    with appearing(target, overwrite) as temporary:
        temporary.mkdir()
        for output in source.outputs:
            _write_output(source, output, temporary, limit, output is source.outputs[-1])
        (temporary / PROVENANCE).write_text(source.provenance_json + "\n", "ascii")
    return [target]


def _write_output(
    source: Outgoing, output: OutputSpec, folder: Path, limit: int, is_last: bool
) -> None:
    kinds = _kinds(source, output)
    lengths = source.num_frames(output.name)
    sizes = [int(n) * output.dim * k.itemsize for n, k in zip(lengths, kinds, strict=True)]
    shards = _shards(sizes, limit)
    frames = source.scan(output.name)
    steps = source.input_length()
    for number, (first, stop) in enumerate(shards, 1):
        header: dict[str, Any] = {
            _METADATA: {
                "format": "pt",
                "mer": source.provenance_json,
                "output": output.name,
                "utterances": json.dumps(
                    {
                        source.ids[n]: [source.keys[n].hex(), int(steps[n])]
                        for n in range(first, stop)
                    }
                ),
            }
        }
        at = 0
        for n in range(first, stop):
            header[source.ids[n]] = {
                "dtype": _TYPES[kinds[n].name],
                "shape": [int(lengths[n]), output.dim],
                "data_offsets": [at, at + sizes[n]],
            }
            at += sizes[n]
        text = json.dumps(header, separators=(",", ":")).encode("ascii")
        text += b" " * (-len(text) % _HEADER_ALIGN)
        path = folder / f"{output.name}-{number:05}-of-{len(shards):05}.safetensors"
        with open(path, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for n in range(first, stop):
                place, values = next(frames)
                assert place == n
                assert values.dtype == kinds[n]
                file.write(np.ascontiguousarray(values).data)
                if is_last:
                    source.advance()


def _kinds(source: Outgoing, output: OutputSpec) -> list[np.dtype]:
    """Return the stored type of every utterance: that of its part."""
    by_key: dict[bytes, np.dtype] = {}
    for part in source.store.readers():
        kind = part.dtype(output.name)
        keys = part.keys()
        for key in keys:
            by_key.setdefault(key.tobytes(), kind)
    return [by_key[key] for key in source.keys]


def _shards(sizes: list[int], limit: int) -> list[tuple[int, int]]:
    bounds, first, total = [], 0, 0
    for n, size in enumerate(sizes):
        if n > first and (total + size > limit or n - first >= _MAX_TENSORS):
            bounds.append((first, n))
            first, total = n, 0
        total += size
    return [*bounds, (first, len(sizes))]


# -- reading ---------------------------------------------------------------------------------------


def read(source: Path) -> Incoming:
    """Find the tensors of one file, or of all files of a folder.

    Files of others are read too: every tensor is an utterance, named as it is.

    Raises
    ------
    UsageError
        No safetensors file, or one that cannot be read.
    """
    paths = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not paths:
        raise UsageError(f"{source} holds no .safetensors file.")
    where: dict[str, dict[str, Path]] = {}  # id -> output -> file
    keys: dict[str, bytes] = {}
    lengths: dict[str, int] = {}
    provenance: dict[str, Any] = {}
    for path in paths:
        with _open(path) as file:
            metadata = file.metadata() or {}
            claims = parse_provenance(metadata.get("mer"))
            output = DEFAULT_OUTPUT
            if claims:
                provenance = provenance or claims
                output = output_name(metadata.get("output", DEFAULT_OUTPUT))
                _read_links(metadata.get("utterances"), keys, lengths)
            names = file.keys()
            for name in names:
                if output in where.setdefault(name, {}):
                    raise UsageError(f"{source}: the tensor {name!r} is in two files.")
                where[name][output] = path

    def reader(wanted: Wanted) -> Iterator[Utterance | Skipped]:
        return _read(where, wanted)

    return Incoming(
        files={path.name if source.is_dir() else "": path for path in paths},
        ids=list(where),
        read=reader,
        outputs=own_outputs(provenance) if provenance else None,
        keys=keys,
        input_length=lengths,
        claims=provenance,
    )


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read as safetensors: {error}.") from error


def _read_links(text: str | None, keys: dict[str, bytes], lengths: dict[str, int]) -> None:
    try:
        links = json.loads(text or "")
        for name, (key, length) in links.items():
            if len(bytes.fromhex(key)) == 16 and int(length) >= 0:
                keys[name], lengths[name] = bytes.fromhex(key), int(length)
    except (ValueError, TypeError, AttributeError):
        return


def _read(where: dict[str, dict[str, Path]], wanted: Wanted) -> Iterator[Utterance | Skipped]:
    files: dict[Path, Any] = {}
    for name, outputs in where.items():
        if not wanted(name):
            continue
        try:
            for path in outputs.values():
                if path not in files:
                    files[path] = _open(path)
            arrays = {output: files[path].get_tensor(name) for output, path in outputs.items()}
        except (TypeError, ValueError, AttributeError) as error:  # a type that numpy lacks
            yield Skipped(name, f"cannot be read: {error}")
            continue
        yield Utterance(name, arrays)
