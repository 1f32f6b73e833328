"""Sizes and ages as options give them, tables as people read them."""

from __future__ import annotations

import pytest

from mer.cache.errors import UsageError
from mer.pipelines.tables import parse_age, parse_size, size, table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("50GB", 50 * 10**9),
        ("50 gb", 50 * 10**9),
        ("1.5 GiB", 3 << 29),
        (" 2TiB ", 2 << 40),
        (".5kB", 500),
        ("7B", 7),
    ],
)
def test_sizes_are_bytes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "50 bytes", "-1GB", "1e9", "5,0GB", "50G", "nan"])
def test_what_is_no_size_is_refused_by_value(text):
    with pytest.raises(UsageError, match=f"'{text}' is no size; expected e.g. 50GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30d", 2_592_000), ("12h", 43_200), ("90 m", 5_400), ("1w", 604_800), ("0.5y", 15_768_000)],
)
def test_ages_are_seconds(text, expected):
    assert parse_age(text) == expected


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "30 days", "1h30m"])
def test_what_is_no_age_is_refused_by_value(text):
    with pytest.raises(UsageError, match=f"'{text}' is no age; expected e.g. 30d"):
        parse_age(text)


def test_numbers_stand_to_the_right_and_no_line_ends_in_space():
    text = table(["name", "count"], [["a", 5], ["long name", 1234]])
    assert text.splitlines() == [
        "name       count",
        "---------  -----",
        "a              5",
        "long name   1234",
    ]


def test_small_sizes_are_not_zero():
    assert [size(n) for n in (0, 999, 10**6, 10**9)] == ["0.0 kB", "1.0 kB", "1.0 MB", "1,000.0 MB"]
