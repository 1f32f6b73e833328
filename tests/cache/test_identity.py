"""Keys and fingerprints: equal for equal inputs, different for different ones."""

from __future__ import annotations

import enum
import json
import math
import subprocess
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import strategies
import xxhash
from hypothesis import assume, given
from hypothesis import strategies as st

from mer.cache.identity import (
    audio_key,
    canonical_json,
    content_hash,
    fingerprint,
    normalise_text,
    store_name,
    text_key,
)
from mer.cache.spec import FeatureSpec, OutputSpec

CONTENT = bytes(range(16))


def reordered(value: object) -> object:
    """The same value with the keys of every mapping in the opposite order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    if isinstance(value, list):
        return [reordered(item) for item in value]
    return value


@given(strategies.identities)
def test_fingerprint_ignores_the_order_of_settings(identity):
    assert fingerprint(reordered(identity)) == fingerprint(identity)


@given(strategies.identities, st.data())
def test_fingerprint_differs_for_any_changed_value(identity, data):
    key = data.draw(st.sampled_from(sorted(identity)))
    value = data.draw(strategies.json_values)
    assume(canonical_json(value) != canonical_json(identity[key]))
    assert fingerprint({**identity, key: value}) != fingerprint(identity)


@given(strategies.identities)
def test_canonical_json_reads_back_as_the_same_value(identity):
    text = canonical_json(identity)
    assert text.isascii()
    assert json.loads(text) == identity


@pytest.mark.parametrize(
    ("left", "right"),
    [
        pytest.param(1, 1.0, id="integer and float"),
        pytest.param(1, True, id="integer and bool"),
        pytest.param(None, "null", id="null and string"),
        pytest.param("1", 1, id="string and integer"),
        pytest.param([1, 2], [2, 1], id="order of a list"),
        pytest.param([], {}, id="empty list and mapping"),
        pytest.param(0.1, math.nextafter(0.1, 1), id="neighbouring floats"),
        pytest.param("é", unicodedata.normalize("NFD", "é"), id="composed and decomposed"),
    ],
)
def test_values_that_look_alike_have_different_fingerprints(left, right):
    assert fingerprint({"a": left}) != fingerprint({"a": right})


def test_lists_and_tuples_are_one_thing():
    assert canonical_json((1, (2,))) == canonical_json([1, [2]])


class Mode(enum.StrEnum):
    MEAN = "mean"


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        pytest.param(math.nan, ValueError, r"identity\.a is nan", id="nan"),
        pytest.param([0, math.inf], ValueError, r"identity\.a\[1\] is inf", id="infinity"),
        pytest.param("\ud83d\ude00", ValueError, r"not valid Unicode", id="lone surrogates"),
        pytest.param({1: 2}, TypeError, r"identity\.a has the key 1", id="integer key"),
        pytest.param(Path("x"), TypeError, r"of type \w*Path", id="path"),
        pytest.param(b"x", TypeError, r"of type bytes", id="bytes"),
        pytest.param({1}, TypeError, r"of type set", id="set"),
        pytest.param(np.float64(1), TypeError, r"of type float64", id="numpy scalar"),
        pytest.param(Mode.MEAN, TypeError, r"of type Mode", id="enum that is a string"),
    ],
)
def test_identity_refuses_what_json_cannot_hold_exactly(value, error, message):
    with pytest.raises(error, match=message):
        fingerprint({"a": value})


def spec(slug: str) -> FeatureSpec:
    output = OutputSpec(name="final", dim=1, rate_hz=None)
    return FeatureSpec(slug=slug, identity={"name": "x"}, outputs=(output,))


def test_store_name_is_slug_and_half_the_fingerprint():
    assert store_name(spec("wavlm-L24")) == "wavlm-L24-" + fingerprint({"name": "x"})[:16]


@pytest.mark.parametrize("slug", ["../../x", "a/b", "a b:c", "", "..", "ü" * 300])
def test_store_name_is_one_plain_folder_name_for_any_slug(slug):
    name = store_name(spec(slug))
    assert Path(name).name == name
    assert name.isascii()
    assert not name.startswith((".", "-"))
    assert len(name) < 128


@given(st.integers(0, 4 * 3600 * 192_000))
def test_bounds_that_differ_by_one_sample_at_192_khz_have_different_keys(sample):
    start, after = sample / 192_000, (sample + 1) / 192_000
    assert audio_key(CONTENT, start, None, None) != audio_key(CONTENT, after, None, None)
    end, later = after, (sample + 2) / 192_000
    assert audio_key(CONTENT, 0, end, None) != audio_key(CONTENT, 0, later, None)


@given(st.integers(0, 10**10), st.integers(1, 10**9))
def test_bounds_written_and_read_as_decimal_text_keep_their_key(start_us, length_us):
    start, end = start_us / 1e6, (start_us + length_us) / 1e6
    text = [float(f"{value:.6f}") for value in (start, end)]
    assert audio_key(CONTENT, start, end, 0) == audio_key(CONTENT, *text, 0)


def test_every_part_of_an_audio_key_matters():
    variants = [
        (CONTENT, None, None, None),
        (CONTENT[::-1], None, None, None),
        (CONTENT, 1.0, None, None),
        (CONTENT, None, 1.0, None),
        (CONTENT, None, None, 0),
        (CONTENT, None, None, 1),
        (CONTENT, 1.0, 2.0, None),
        (CONTENT, 2.0, 3.0, None),
    ]
    assert len({audio_key(*variant) for variant in variants}) == len(variants)


def test_no_start_is_the_start_of_the_recording():
    assert audio_key(CONTENT, None, 2.0, 1) == audio_key(CONTENT, 0.0, 2.0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((b"short", None, None, None), "5 bytes, expected 16", id="hash"),
        pytest.param((CONTENT, -0.1, None, None), "start_s=-0.1", id="negative start"),
        pytest.param((CONTENT, math.nan, None, None), "start_s=nan", id="nan"),
        pytest.param((CONTENT, None, math.inf, None), "end_s=inf", id="infinite end"),
        pytest.param((CONTENT, 2.0, 2.0, None), "end_s=2.0 is not after", id="empty segment"),
        pytest.param((CONTENT, None, None, -1), "channel=-1", id="channel"),
    ],
)
def test_audio_key_refuses_impossible_bounds(arguments, message):
    with pytest.raises(ValueError, match=message):
        audio_key(*arguments)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_normalising_text_twice_changes_nothing(text):
    once = normalise_text(text)
    assert normalise_text(once) == once
    assert text_key(text) == text_key(once)


def test_text_key_ignores_white_space_and_composition_but_not_case():
    assert normalise_text(" a\t\n b\u00a0c ") == "a b c"
    assert text_key("cafe\u0301  noir") == text_key(" café noir\n")
    assert text_key("Yes") != text_key("yes")


def test_content_hash_is_xxh3_128_of_the_bytes_whatever_the_name(tmp_path):
    data = bytes(range(256)) * 40_000  # more than one read
    for name in ("a.wav", "b.flac"):
        (tmp_path / name).write_bytes(data)
    assert content_hash(tmp_path / "a.wav") == xxhash.xxh3_128_digest(data)
    assert content_hash(tmp_path / "b.flac") == content_hash(tmp_path / "a.wav")
    (tmp_path / "b.flac").write_bytes(data[:-1] + b"x")
    assert content_hash(tmp_path / "b.flac") != content_hash(tmp_path / "a.wav")


def test_fingerprint_can_be_recomputed_with_b2sum(tmp_path):
    file = tmp_path / "identity.json"
    file.write_text('{"name":"logmel","version":1}')
    try:
        result = subprocess.run(["b2sum", "-l", "128", file], capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("b2sum is not installed")
    assert result.stdout.split()[0].decode() == fingerprint({"version": 1, "name": "logmel"})
