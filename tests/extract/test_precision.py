"""Number formats, and float32 that stays float32 on CUDA."""

from __future__ import annotations

import pytest
import torch

from mer.cache.errors import UsageError
from mer.extract.options import check_choice, real
from mer.extract.precision import PRECISIONS, exact_float32, torch_dtype


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_are_torch_types(precision: str) -> None:
    assert str(torch_dtype(precision)) == f"torch.{precision}"


def test_convolutions_keep_their_mantissa_only_inside_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    before = torch.backends.cudnn.allow_tf32
    inside = []

    def fail() -> None:
        with exact_float32():
            inside.append(torch.backends.cudnn.allow_tf32)
            raise RuntimeError("model")

    with pytest.raises(RuntimeError, match="model"):
        fail()
    assert inside == [False]
    assert torch.backends.cudnn.allow_tf32 is before


def test_a_value_out_of_a_closed_choice_is_refused() -> None:
    assert check_choice("wavlm", "dtype", "float16", ("float16", "float32")) == "float16"
    with pytest.raises(
        UsageError, match="'wavlm': dtype=half is not known; expected float16 or float32"
    ):
        check_choice("wavlm", "dtype", "half", ("float16", "float32"))


def test_numbers_stay_in_range() -> None:
    assert real("wavlm", "window_s", "2.5", 1, 10) == 2.5
    for value, message in (
        ("1e3", "a number from 1 to 10"),
        ("0", "a number from 1 to 10"),
        ("nan", "a number from 1 to 10"),
        ("x", "a number from 1 to 10"),
    ):
        with pytest.raises(UsageError, match=message):
            real("wavlm", "window_s", value, 1, 10)
