"""Parquet and Arrow: one row per utterance, as Hugging Face datasets loads them.

Columns ``id`` (text), ``key`` (16 bytes), ``input_length`` (int64), and one per output: a list of T
lists of D values, in the stored type. The schema's metadata has ``mer``, the provenance as JSON.
The keys are plain binary, because not every release of datasets knows binary of a fixed size.

``datasets.load_dataset("parquet", data_files=…)`` and ``Dataset.from_parquet`` read the one,
``Dataset.from_file`` the other, which is an Arrow IPC stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mer.cache.errors import MissingDependencyError, UsageError
from mer.cache.exchange.incoming import (
    Incoming,
    Skipped,
    Utterance,
    Wanted,
    output_name,
    own_outputs,
    parse_provenance,
)
from mer.cache.exchange.options import whole
from mer.cache.exchange.outgoing import Outgoing, Row, appearing
from mer.cache.identity import KEY_BYTES

BLOCK_BYTES = 16 << 20
_LINKS = ("id", "key", "input_length")
_ID_COLUMNS = ("id", "utterance", "utterance_id", "name", "file")


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet and Arrow need pyarrow: pip install 'mer[tables]'."
        ) from error
    return pyarrow


# -- writing ---------------------------------------------------------------------------------------


def write_parquet(
    source: Outgoing, target: Path, overwrite: bool, *, block_bytes: int | str = BLOCK_BYTES
) -> list[Path]:
    """Write one Parquet file.

    Parameters
    ----------
    block_bytes : int, default=16 MiB
        Size of a row group, and of the memory that is needed.
    """
    _pyarrow()
    import pyarrow.parquet as pq

    schema = _schema(source)
    with (
        appearing(target, overwrite) as temporary,
        # None of these gains anything on features, and all of them cost.
        pq.ParquetWriter(
            temporary, schema, compression="none", use_dictionary=False, write_statistics=False
        ) as writer,
    ):
        for batch in _batches(source, schema, whole("block_bytes", block_bytes, 1)):
            writer.write_batch(batch)
    return [target]


def write_arrow(
    source: Outgoing, target: Path, overwrite: bool, *, block_bytes: int | str = BLOCK_BYTES
) -> list[Path]:
    """Write one Arrow IPC stream.

    Parameters
    ----------
    block_bytes : int, default=16 MiB
        Size of a record batch, and of the memory that is needed.
    """
    pa = _pyarrow()
    schema = _schema(source)
    with (
        appearing(target, overwrite) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for batch in _batches(source, schema, whole("block_bytes", block_bytes, 1)):
            writer.write_batch(batch)
    return [target]


def _schema(source: Outgoing) -> Any:
    pa = _pyarrow()
    taken = next((o.name for o in source.outputs if o.name in _LINKS), None)
    if taken is not None:
        raise UsageError(f"An output is named {taken!r}, which tables need themselves.")
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("key", pa.binary(), nullable=False),
        pa.field("input_length", pa.int64(), nullable=False),
    ]
    for output in source.outputs:
        value = pa.from_numpy_dtype(source.one_type(output.name))
        fields.append(pa.field(output.name, pa.list_(pa.list_(value, output.dim))))
    return pa.schema(fields, metadata={"mer": source.provenance_json})


def _batches(source: Outgoing, schema: Any, block_bytes: int) -> Iterator[Any]:
    rows: list[Row] = []
    size = 0
    for row in source.rows():
        rows.append(row)
        size += sum(array.nbytes for array in row.arrays.values()) + len(row.id) + KEY_BYTES
        if size >= block_bytes:
            yield _batch(rows, source, schema)
            rows, size = [], 0
    if rows:
        yield _batch(rows, source, schema)


def _batch(rows: list[Row], source: Outgoing, schema: Any) -> Any:
    pa = _pyarrow()
    columns = [
        pa.array([row.id for row in rows], pa.string()),
        pa.array([row.key for row in rows], pa.binary()),
        pa.array([row.input_length for row in rows], pa.int64()),
    ]
    for output in source.outputs:
        arrays = [row.arrays[output.name] for row in rows]
        kind = source.dtype(output.name)
        offsets = np.zeros(len(arrays) + 1, np.int32)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        flat = np.concatenate(arrays).astype(kind, copy=False).reshape(-1)
        frames = pa.FixedSizeListArray.from_arrays(pa.array(flat), output.dim)
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), frames))
    return pa.record_batch(columns, schema=schema)


# -- reading ---------------------------------------------------------------------------------------


def read(path: Path, *, id_column: str = "") -> Incoming:
    """Find the utterances of a Parquet file, an Arrow stream or an Arrow file.

    Parameters
    ----------
    id_column : str, optional
        Column with the ids; by default the first of id, utterance, utterance_id, name, file.

    Raises
    ------
    UsageError
        The file cannot be read, or has no column of ids or of features.
    """
    pa = _pyarrow()
    schema = _read_schema(path)
    column = id_column or next((c for c in _ID_COLUMNS if c in schema.names), "")
    if column not in schema.names:
        raise UsageError(
            f"{path} has no column of ids {column or ' or '.join(_ID_COLUMNS)!r}; it has "
            f"{', '.join(schema.names)}. Give id_column=…"
        )
    features = {
        field.name: output_name(field.name)
        for field in schema
        if field.name not in (*_LINKS, column) and _is_features(field.type)
    }
    if not features:
        raise UsageError(f"{path} has no column of lists of numbers: no features.")
    provenance = parse_provenance((schema.metadata or {}).get(b"mer"))
    ids, keys, lengths = [], {}, {}
    links = [name for name in _LINKS[1:] if provenance and name in schema.names]
    for batch in _read_batches(path, [column, *links]):
        names = [str(value) for value in batch.column(column).to_pylist()]
        ids += names
        if "key" in links:
            found = zip(names, batch.column("key").to_pylist(), strict=True)
            keys.update({n: k for n, k in found if isinstance(k, bytes) and len(k) == KEY_BYTES})
        if "input_length" in links:
            found = zip(names, batch.column("input_length").to_pylist(), strict=True)
            lengths.update({n: k for n, k in found if isinstance(k, int) and k >= 0})

    def reader(wanted: Wanted) -> Iterator[Utterance | Skipped]:
        for batch in _read_batches(path, [column, *features]):
            for n, value in enumerate(batch.column(column)):
                name = str(value.as_py())
                if not wanted(name):
                    continue
                try:
                    arrays = {
                        output: _frames(batch.column(raw), n, pa)
                        for raw, output in features.items()
                    }
                except (ValueError, pa.ArrowException) as error:
                    yield Skipped(name, f"cannot be read: {error}")
                    continue
                yield Utterance(name, arrays)

    return Incoming(
        files={"": path},
        ids=ids,
        read=reader,
        outputs=own_outputs(provenance) if provenance else None,
        keys=keys,
        input_length=lengths,
        claims=provenance,
    )


def _is_features(kind: Any) -> bool:
    """Whether a column holds lists, or lists of lists, of numbers."""
    import pyarrow.types as types

    depth = 0
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    return 1 <= depth <= 3 and (types.is_floating(kind) or types.is_integer(kind))


def _frames(column: Any, row: int, pa: Any) -> np.ndarray:
    """Return one row's list of lists as (T, D)."""
    value = column[row].values
    if value is None:
        raise ValueError("it is null")
    shape: list[int] = [len(value)]
    while not (pa.types.is_floating(value.type) or pa.types.is_integer(value.type)):
        if value.null_count:
            raise ValueError("it holds nulls")
        if pa.types.is_fixed_size_list(value.type):
            shape.append(value.type.list_size)
        else:
            widths = set(np.diff(value.offsets.to_numpy()).tolist())
            if len(widths) > 1:
                raise ValueError("its rows are of unequal length")
            shape.append(widths.pop() if widths else 0)
        value = value.flatten()
    if value.null_count:
        raise ValueError("it holds nulls")
    return np.asarray(value.to_numpy(zero_copy_only=False)).reshape(shape)


def _read_schema(path: Path) -> Any:
    pa = _pyarrow()
    import pyarrow.parquet as pq

    try:
        if _magic(path) == b"PAR1":
            return pq.read_schema(path)
        with pa.OSFile(str(path)) as file, _ipc(file) as reader:
            return reader.schema
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path} cannot be read as Parquet or Arrow: {error}.") from error


def _magic(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(6)[:4]


def _ipc(file: Any) -> Any:
    pa = _pyarrow()
    if file.read(6) == b"ARROW1":
        return pa.ipc.open_file(file)
    file.seek(0)
    return pa.ipc.open_stream(file)


def _read_batches(path: Path, columns: list[str]) -> Iterator[Any]:
    """Yield record batches with the columns asked for."""
    pa = _pyarrow()
    import pyarrow.parquet as pq

    if _magic(path) == b"PAR1":
        with closing(pq.ParquetFile(path)) as parquet:
            for group in range(parquet.num_row_groups):
                yield from parquet.read_row_group(group, columns=columns).to_batches()
        return
    with pa.OSFile(str(path)) as file, _ipc(file) as reader:
        if hasattr(reader, "num_record_batches"):
            for n in range(reader.num_record_batches):
                yield reader.get_batch(n).select(columns)
        else:
            for batch in reader:
                yield batch.select(columns)
