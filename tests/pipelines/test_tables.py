"""Sizes and ages as options give them, tables as people read them."""

from __future__ import annotations

import pytest

from mer.cache.errors import UsageError
from mer.pipelines.tables import counted, parse_age, parse_size, size, table


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
    assert [size(n) for n in (0, 60, 999)] == ["0.0 kB", "0.1 kB", "1.0 kB"]


def test_large_sizes_are_short():
    assert [size(n) for n in (10**6 - 1, 10**6, 10**9, 25 * 10**11, 10**16)] == [
        "1.0 MB",
        "1.0 MB",
        "1.0 GB",
        "2.5 TB",
        "10,000.0 TB",
    ]


def test_sizes_and_what_is_not_there_stand_to_the_right():
    text = table(["name", "size", "rate"], [["1", size(5), "-"], ["b", size(10**8), 50.0]])
    assert text.splitlines()[2:] == [
        "1       0.0 kB     -",
        "b     100.0 MB  50.0",
    ]


def test_one_is_singular():
    assert [counted(n, "part") for n in (0, 1, 2, 1000)] == [
        "0 parts",
        "1 part",
        "2 parts",
        "1,000 parts",
    ]
