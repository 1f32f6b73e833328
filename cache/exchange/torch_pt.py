"""Folders of ``.pt`` files, one per utterance, or one file that maps ids to tensors.

A file is a tensor, a list of tensors (layers), or a dict of tensors by output. Only tensors and
plain containers are read: ``torch.load`` with ``weights_only=True`` runs nothing of a file.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
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
)

SUFFIXES = (".pt", ".pth")
_REFUSED = re.compile(r"GLOBAL ([A-Za-z_][\w.]{0,80})")


def read(source: Path) -> Incoming:
    """Find the tensors of a folder (an id is the path below it, without suffix) or of one file.

    Raises
    ------
    UsageError
        Nothing is there, or the one file cannot be read or is no dict.
    """
    if not source.is_dir():
        return _read_file(source)
    files = {
        path.relative_to(source).as_posix(): path
        for path in sorted(source.rglob("*"))
        if path.suffix in SUFFIXES and path.is_file()
    }
    if not files:
        raise UsageError(f"{source} holds no {' or '.join(SUFFIXES)} file.")
    ids = [str(Path(name).with_suffix("").as_posix()) for name in files]

    def reader(wanted: Wanted) -> Iterator[Utterance | Skipped]:
        for name, path in zip(ids, files.values(), strict=True):
            if wanted(name):
                try:
                    yield Utterance(name, _arrays(_load(path)), path)
                except ValueError as error:  # UsageError too
                    yield Skipped(name, str(error))

    return Incoming(files=files, ids=ids, read=reader)


def _read_file(path: Path) -> Incoming:
    content = _load(path)
    if not isinstance(content, Mapping):
        raise UsageError(
            f"{path} is no dict of utterance id to tensor. Import a folder with one file per "
            "utterance, or save such a dict."
        )

    def reader(wanted: Wanted) -> Iterator[Utterance | Skipped]:
        for raw, value in content.items():
            if wanted(str(raw)):
                try:
                    yield Utterance(str(raw), _arrays(value))
                except ValueError as error:
                    yield Skipped(str(raw), str(error))

    return Incoming(files={"": path}, ids=[str(name) for name in content], read=reader)


def _load(path: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it likes on files that are not its own
        # Not in torch's words, which advise to run what the file says.
        refused = _REFUSED.search(str(error))
        reason = f"it refers to {refused[1]}" if refused else "it is damaged, or something else"
        raise UsageError(
            f"{path} cannot be read as tensors alone: {reason}. Save the tensors themselves "
            "(torch.save of a tensor, or of a dict of tensors), or convert to .npy."
        ) from error


def _arrays(value: Any) -> dict[str, np.ndarray]:
    """Return an utterance's arrays by output.

    Raises
    ------
    ValueError
        It is neither a tensor nor a list or dict of tensors.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return {DEFAULT_OUTPUT: _numpy(value)}
    if isinstance(value, Mapping) and value:
        items = {output_name(str(name)): inner for name, inner in value.items()}
    elif isinstance(value, list | tuple) and value:
        items = {f"layer_{n}": inner for n, inner in enumerate(value)}
    else:
        raise ValueError(f"it holds a {type(value).__name__}, expected tensors")
    tensors = {n: inner for n, inner in items.items() if isinstance(inner, torch.Tensor)}
    if len(tensors) < len(items):
        other = next(type(v).__name__ for n, v in items.items() if n not in tensors)
        raise ValueError(f"it holds a {other} beside tensors")
    return {name: _numpy(tensor) for name, tensor in tensors.items()}


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ValueError("it holds a sparse or quantized tensor")
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:  # numpy has none; float32 holds every value
        tensor = tensor.float()
    return np.asarray(tensor.numpy())
