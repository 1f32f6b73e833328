"""Number formats: what a model computes in, what a store keeps, and exact float32 on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PRECISIONS = ("float32", "bfloat16", "float16")
STORED = ("float16", "float32")


def torch_dtype(precision: str) -> torch.dtype:
    """Return the torch type of a precision name."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
        precision
    ]


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep convolutions on CUDA in full float32.

    torch lets cuDNN round convolution inputs to TF32 (10 mantissa bits) by default; kernels then
    differ with the shape of the batch by about 1e-3, and batched would no longer equal alone.
    Matrix products are exact by default.
    """
    import torch

    cudnn: Any = torch.backends.cudnn
    if not cudnn.is_available():
        yield
        return
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before
